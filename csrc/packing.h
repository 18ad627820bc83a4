// From a layer's parameters p, one flat vector, to the packed weights that the loops of cpu/ read: a sparse matrix
// times p, and the batch norms as scale and shift. No torch, nothing that depends on the instruction set.
#pragma once

#include <cmath>

#include "plan.h"

namespace implicit_steer {

// packed[i] = Σ value[k] p[column[k]] for rowptr[i] <= k < rowptr[i + 1]
template <typename R>
struct SparseMatrix {
  int64_t n_rows;
  const int32_t *rowptr, *column;
  const R* value;

  void multiply(const R* p, R* packed) const {
    for (int64_t i = 0; i < n_rows; ++i) {
      R sum = 0;
      for (int32_t k = rowptr[i]; k < rowptr[i + 1]; ++k) sum += value[k] * p[column[k]];
      packed[i] = sum;
    }
  }
  // grad_p += transpose · grad, over the first n rows
  void multiply_transposed(int64_t n, const R* grad, R* grad_p) const {
    for (int64_t i = 0; i < n; ++i)
      for (int32_t k = rowptr[i]; k < rowptr[i + 1]; ++k) grad_p[column[k]] += value[k] * grad[i];
  }
};

// Calls f(from, to) for every weight of θ: its positions in the packed weights in the layouts [b][u][v, w] and
// [b][v][w][u], whose rows of channels are padded.
template <typename R, typename F>
void for_theta(const PlanView<R>& plan, F f) {
  const auto padded = [](int64_t n) { return (n + kChannels - 1) / kChannels * kChannels; };
  for (const CouplingView& q : plan.coupling_storage) {
    const int64_t row = q.constant ? 1 : padded(q.n_hidden), slot = padded(q.n_in * row), outputs = padded(q.n_out);
    for (int64_t b = 0; b < q.n_basis; ++b)
      for (int64_t u = 0; u < q.n_out; ++u)
        for (int64_t v = 0; v < q.n_in; ++v)
          for (int64_t w = 0; w < q.n_hidden; ++w)
            f(q.theta + (b * q.n_out + u) * slot + v * row + w,
              q.theta_forward + ((b * q.n_in + v) * q.n_hidden + w) * outputs + u);
  }
}

// Statistics of one batch norm: mean [W, n_trivial], variance [W].
template <typename R>
int64_t statistics_size(const PlanView<R>& p) {
  return p.has_norms ? int64_t{p.layers[0].out / p.c} * (p.n_trivial + 1) : 0;
}

// scale = weight / sqrt(variance + eps), shift = bias - mean * scale of batch norm n
template <typename R>
void pack_affine(const PlanView<R>& plan, int n, const R* p, const R* statistics, R* packed) {
  const LayerView<R>& layer = plan.layers[n];
  const int channels = layer.out / plan.c, trivial = plan.n_trivial;
  const R *mean = statistics + n * statistics_size(plan), *variance = mean + channels * trivial;
  R *scale = packed + layer.affine, *shift = scale + channels;
  for (int w = 0; w < channels; ++w) {
    scale[w] = p[layer.norm_weight + w] / std::sqrt(variance[w] + plan.eps);
    for (int k = w * trivial; k < (w + 1) * trivial; ++k) shift[k] = p[layer.norm_bias + k] - mean[k] * scale[w];
  }
}

// Its reverse; the statistics are constants, as in escnn.
template <typename R>
void pack_affine_backward(const PlanView<R>& plan, int n, const R* statistics, const R* grad, R* grad_p) {
  const LayerView<R>& layer = plan.layers[n];
  const int channels = layer.out / plan.c, trivial = plan.n_trivial;
  const R *mean = statistics + n * statistics_size(plan), *variance = mean + channels * trivial;
  const R *d_scale = grad + layer.affine, *d_shift = d_scale + channels;
  for (int w = 0; w < channels; ++w) {
    R d = d_scale[w];
    for (int k = w * trivial; k < (w + 1) * trivial; ++k) {
      grad_p[layer.norm_bias + k] += d_shift[k];
      d -= d_shift[k] * mean[k];
    }
    grad_p[layer.norm_weight + w] += d / std::sqrt(variance[w] + plan.eps);
  }
}

}  // namespace implicit_steer
