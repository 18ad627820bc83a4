// What every caller of the loops needs: the table of an instruction set, and the statistics of batch norms. No torch.
#pragma once

#include <type_traits>
#include <vector>

#include "../packing.h"
#include "blocks.h"
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

// Over a.n_edges > 0 edges, of every coordinate [W, d] of the input h of batch norm n: sums of h - shift and of its
// square, [2, W * d], and the shift. The packed weights hold the scales and shifts of the norms before it.
struct Sums {
  std::vector<double> sums, shift;
};

template <typename R>
Sums batch_sums(const ConvTable<R>& table, ConvArgs<R>& a, int n) {
  const int size = norm_input_size(*a.plan);
  a.layer = n;
  Sums found{std::vector<double>(int64_t{2} * size * statistics_blocks(a)), std::vector<double>(size)};
  a.sums = found.sums.data(), a.shift = found.shift.data();
  table.statistics(a);
  return found;
}

// Means of the trivial coefficients [W, n_trivial] and variance [W] (unbiased, the mean over a field's coordinates) of
// every batch norm's input over a.n_edges edges, one norm after the other into `statistics`; the packed weights get the
// norms' scales and shifts. p: the unpacked parameters.
template <typename R>
void batch_statistics(const ConvTable<R>& table, ConvArgs<R>& a, const R* p, R* packed, R* statistics) {
  const PlanView<R>& plan = *a.plan;
  const int channels = norm_channels(plan);
  for (int n = 0; n < plan.n_layers; ++n) {
    R *mean = statistics + n * statistics_size(plan), *variance = mean + channels * plan.n_trivial;
    const Sums found = batch_sums(table, a, n);
    for (int w = 0; w < channels; ++w)
      channel_statistics(plan, channels, w, found.sums.data(), found.shift.data(), static_cast<double>(a.n_edges), mean,
                         variance);
    pack_affine(plan, n, p, statistics, packed);
  }
}

}  // namespace implicit_steer
