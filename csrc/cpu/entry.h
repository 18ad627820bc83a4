// What every caller of the loops needs: the table of an instruction set, and the statistics of batch norms. No torch.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../packing.h"
#include "conv.h"
#include "instruction_set.h"

namespace implicit_steer {

// The entry points of the set `isa`, 1 .. widest_instruction_set().
template <typename R>
const ConvTable<R>& conv_table([[maybe_unused]] int isa) {
  if constexpr (std::is_same_v<R, float>)
    return IST_TABLE(isa, kConvFloat);
  else
    return IST_TABLE(isa, kConvDouble);
}

// Of every coordinate [W, d] of a batch norm's input over the edges: mean, and sum of squared deviations from it.
struct Moments {
  std::vector<double> mean, squares;
};

// Those of batch norm n over a.n_edges > 0 edges; the packed weights hold the scales and shifts of the norms before it.
template <typename R>
Moments batch_moments(const ConvTable<R>& table, ConvArgs<R>& a, int n) {
  const PlanView<R>& plan = *a.plan;
  const int size = plan.layers[n].out / plan.c * plan.d;
  const double count = static_cast<double>(a.n_edges);
  std::vector<double> sums(int64_t{2} * size * a.threads);
  Moments found{std::vector<double>(size), std::vector<double>(size)};
  a.layer = n, a.sums = sums.data(), a.shift = found.mean.data();
  table.statistics(a);
  for (int k = 0; k < size; ++k) {
    found.mean[k] += sums[k] / count;
    found.squares[k] = std::max(sums[size + k] - sums[k] / count * sums[k], 0.0);
  }
  return found;
}

// Means of the trivial coefficients [W, n_trivial] and variance [W] (unbiased, the mean over a field's coordinates) of
// every batch norm's input over a.n_edges edges, one norm after the other into `statistics`; the packed weights get the
// norms' scales and shifts. p: the unpacked parameters.
template <typename R>
void batch_statistics(const ConvTable<R>& table, ConvArgs<R>& a, const R* p, R* packed, R* statistics) {
  const PlanView<R>& plan = *a.plan;
  for (int n = 0; n < plan.n_layers; ++n) {
    const int channels = plan.layers[n].out / plan.c;
    R *mean = statistics + n * statistics_size(plan), *variance = mean + channels * plan.n_trivial;
    const Moments found = batch_moments(table, a, n);
    for (int w = 0; w < channels; ++w) {
      double sum = 0;
      for (int k = w * plan.d; k < (w + 1) * plan.d; ++k) sum += found.squares[k] / static_cast<double>(a.n_edges - 1);
      variance[w] = static_cast<R>(sum / plan.d);
      for (int k = 0; k < plan.n_trivial; ++k)
        mean[w * plan.n_trivial + k] = static_cast<R>(found.mean[w * plan.d + plan.measured[k]]);
    }
    pack_affine(plan, n, p, statistics, packed);
  }
}

}  // namespace implicit_steer
