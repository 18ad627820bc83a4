// From a layer's parameters p, one flat vector, to the packed weights that the loops of cpu/ read: a sparse matrix
// times p, and the batch norms as scale and shift. No torch, nothing that depends on the instruction set.
#pragma once

#include <cmath>
#include <vector>

#include "plan.h"

namespace implicit_steer {

// packed[i] = Σ value[k] p[column[k]] for rowptr[i] <= k < rowptr[i + 1]
template <typename R>
struct SparseMatrix {
  int64_t n_rows;
  const int32_t *rowptr, *column;
  const R* value;

  // p: what gives number k as p[k]
  template <typename P>
  IST_HOST_DEVICE R multiply_row(int64_t i, const P& p) const {
    R sum = 0;
    for (int32_t k = rowptr[i]; k < rowptr[i + 1]; ++k) sum += value[k] * p[column[k]];
    return sum;
  }
  void multiply(const R* p, R* packed) const {
    for (int64_t i = 0; i < n_rows; ++i) packed[i] = multiply_row(i, p);
  }
  // grad_p += transpose · grad, over the first n rows
  void multiply_transposed(int64_t n, const R* grad, R* grad_p) const {
    for (int64_t i = 0; i < n; ++i)
      for (int32_t k = rowptr[i]; k < rowptr[i + 1]; ++k) grad_p[column[k]] += value[k] * grad[i];
  }
};

// Vectors that lie in several places, read or written as one vector, one behind the other.
template <typename R>
struct Pieces {
  static constexpr int kMost = 96;  // two such tables fit into a kernel's arguments
  R* at[kMost];
  int32_t first[kMost + 1];  // the number with which each begins, and how many there are
  int n;

  void add(R* piece, int64_t size) {
    at[n] = piece, first[0] = 0;
    first[n + 1] = first[n] + static_cast<int32_t>(size), ++n;
  }
  IST_HOST_DEVICE R& operator[](int64_t k) const {
    int low = 0;
    for (int high = n; high - low > 1;) {
      const int middle = (low + high) / 2;
      if (first[middle] <= k)
        low = middle;
      else
        high = middle;
    }
    return at[low][k - first[low]];
  }
};

// The transpose of a matrix's first n rows.
template <typename R>
struct Transposed {
  std::vector<int32_t> rowptr, column;
  std::vector<R> value;

  Transposed(const SparseMatrix<R>& matrix, int64_t n, int64_t n_columns) : rowptr(n_columns + 1), column(), value() {
    const int32_t n_values = matrix.rowptr[n];
    column.resize(n_values), value.resize(n_values);
    for (int32_t k = 0; k < n_values; ++k) ++rowptr[matrix.column[k] + 1];
    for (int64_t j = 0; j < n_columns; ++j) rowptr[j + 1] += rowptr[j];
    std::vector<int32_t> next(rowptr.begin(), rowptr.end() - 1);
    for (int64_t i = 0; i < n; ++i)
      for (int32_t k = matrix.rowptr[i]; k < matrix.rowptr[i + 1]; ++k) {
        const int32_t to = next[matrix.column[k]]++;
        column[to] = static_cast<int32_t>(i), value[to] = matrix.value[k];
      }
  }
};

// Calls f(from, to) for every weight of θ: its positions in the packed weights in the layouts [b][u][v, w] and
// [b][panel of u][v][w][u], whose rows of channels are padded; of a depthwise coupling [b][v, w] and [b][w][v].
template <typename R, typename F>
void for_theta(const PlanView<R>& plan, F f) {
  for (const CouplingView* next = plan.couplings; next < plan.couplings + plan.n_couplings; ++next) {
    const CouplingView& q = *next;
    for (int64_t b = 0; b < q.n_basis && q.depthwise; ++b)
      for (int64_t v = 0; v < q.n_in; ++v)
        for (int64_t w = 0; w < q.n_hidden; ++w)
          f(q.theta + b * q.theta_size + v * q.hidden_stride + w,
            q.theta_forward + (b * q.n_hidden + w) * q.out_stride + v);
    for (int64_t b = 0; b < q.n_basis && !q.depthwise; ++b)
      for (int u = 0; u < q.n_out; ++u)
        for (int64_t v = 0; v < q.n_in; ++v)
          for (int64_t w = 0; w < q.n_hidden; ++w)
            f(q.theta + (b * q.n_out + u) * q.theta_size + v * q.hidden_stride + w,
              q.theta_forward + b * q.forward_size() + q.forward_place(u) + (v * q.n_hidden + w) * q.panel_width(u));
  }
}

// Statistics of one batch norm: mean [W, n_trivial], variance [W].
template <typename R>
IST_HOST_DEVICE int64_t statistics_size(const PlanView<R>& p) {
  return int64_t{norm_channels(p)} * (p.n_trivial + 1);
}

// The sum of squared deviations from the mean of coordinate k, from sums [2, size] of h - shift and of its square.
IST_HOST_DEVICE inline double squared_deviations(const double* sums, int size, int k, double count) {
  const double found = sums[size + k] - sums[k] / count * sums[k];
  return found > 0 ? found : 0;
}

// Mean and sum of squared deviations, [2, size], of coordinate k of a batch norm's input in the order of its field,
// from such sums over `count` edges, which are in the order of the plan's frame.
template <typename R, typename Shift>
IST_HOST_DEVICE void coordinate_moments(const PlanView<R>& plan, int size, int k, const double* sums,
                                        const Shift* shift, double count, R* moments) {
  const int m = k % plan.d, own = k - m + (plan.kind == kZonal ? m : plan.coordinate[m]);
  moments[k] = static_cast<R>(shift[own] + sums[own] / count);
  moments[size + k] = static_cast<R>(squared_deviations(sums, size, own, count));
}

// Mean and variance of channel w of a batch norm, from such sums [2, channels * d] over `count` edges; the variance is
// unbiased, the mean over the field's coordinates.
template <typename R, typename Shift>
IST_HOST_DEVICE void channel_statistics(const PlanView<R>& plan, int channels, int w, const double* sums,
                                        const Shift* shift, double count, R* mean, R* variance) {
  double sum = 0;
  for (int k = w * plan.d; k < (w + 1) * plan.d; ++k)
    sum += squared_deviations(sums, channels * plan.d, k, count) / (count - 1);
  variance[w] = static_cast<R>(sum / plan.d);
  for (int k = 0; k < plan.n_trivial; ++k) {
    const int m = w * plan.d + plan.measured[k];
    mean[w * plan.n_trivial + k] = static_cast<R>(shift[m] + sums[m] / count);
  }
}

// scale = weight / sqrt(variance + eps) of channel w of batch norm n, shift = bias - mean * scale of its number k of
// [W, n_trivial]
template <typename R, typename P>
IST_HOST_DEVICE R norm_scale(const PlanView<R>& plan, int n, int w, const P& p, R variance) {
  return p[plan.layers[n].norm_weight + w] / std::sqrt(variance + plan.eps);
}
template <typename R, typename P>
IST_HOST_DEVICE R norm_shift(const PlanView<R>& plan, int n, int k, const P& p, R mean, R scale) {
  return p[plan.layers[n].norm_bias + k] - mean * scale;
}
template <typename R, typename P>
IST_HOST_DEVICE void pack_channel(const PlanView<R>& plan, int n, int w, const P& p, const R* statistics, R* packed) {
  const int channels = norm_channels(plan), trivial = plan.n_trivial;
  const R *mean = statistics + n * statistics_size(plan), *variance = mean + channels * trivial;
  R *scale = packed + plan.layers[n].affine, *shift = scale + channels;
  scale[w] = norm_scale(plan, n, w, p, variance[w]);
  for (int k = w * trivial; k < (w + 1) * trivial; ++k) shift[k] = norm_shift(plan, n, k, p, mean[k], scale[w]);
}
template <typename R>
void pack_affine(const PlanView<R>& plan, int n, const R* p, const R* statistics, R* packed) {
  for (int w = 0; w < norm_channels(plan); ++w) pack_channel(plan, n, w, p, statistics, packed);
}

// Their reverse, the statistics being constants, as in escnn: what scale and shift add to the gradient of the weight of
// channel w. That of a bias is its shift's.
template <typename R>
IST_HOST_DEVICE R norm_weight_gradient(const PlanView<R>& plan, int n, int w, const R* statistics, const R* grad) {
  const int channels = norm_channels(plan), trivial = plan.n_trivial;
  const R *mean = statistics + n * statistics_size(plan), *variance = mean + channels * trivial;
  const R *d_scale = grad + plan.layers[n].affine, *d_shift = d_scale + channels;
  R d = d_scale[w];
  for (int k = w * trivial; k < (w + 1) * trivial; ++k) d -= d_shift[k] * mean[k];
  return d / std::sqrt(variance[w] + plan.eps);
}
template <typename R>
void pack_affine_backward(const PlanView<R>& plan, int n, const R* statistics, const R* grad, R* grad_p) {
  const LayerView<R>& layer = plan.layers[n];
  const int channels = norm_channels(plan);
  const R* d_shift = grad + layer.affine + channels;
  for (int w = 0; w < channels; ++w)
    grad_p[layer.norm_weight + w] += norm_weight_gradient(plan, n, w, statistics, grad);
  for (int k = 0; k < channels * plan.n_trivial; ++k) grad_p[layer.norm_bias + k] += d_shift[k];
}

// ---- one packed weight, or the gradient of one parameter, after the other: for a thread each

// The statistics of all batch norms: `given`, statistics_size() numbers of each; or where that is null, the running
// ones: pieces 2 n and 2 n + 1 are the means [W, d] and the variances [W] of norm n, and of the means the columns
// trivial [n_layers, n_trivial] can differ from 0.
template <typename R>
struct NormStatistics {
  const R* given;
  const int64_t* trivial;
  Pieces<const R> running;

  // Number k of [W, n_trivial].
  IST_HOST_DEVICE R mean(const PlanView<R>& plan, int channels, int n, int k) const {
    if (given) return given[n * statistics_size(plan) + k];
    const int w = k / plan.n_trivial, width = (running.first[2 * n + 1] - running.first[2 * n]) / channels;
    return running.at[2 * n][w * width + trivial[n * plan.n_trivial + k % plan.n_trivial]];
  }
  IST_HOST_DEVICE R variance(const PlanView<R>& plan, int channels, int n, int w) const {
    return given ? given[n * statistics_size(plan) + channels * plan.n_trivial + w] : running.at[2 * n + 1][w];
  }
};

// Packed weight i: of a batch norm, else a row of the matrix.
template <typename R, typename P>
IST_HOST_DEVICE R packed_weight(const PlanView<R>& plan, const SparseMatrix<R>& matrix, int64_t i, const P& p,
                                const NormStatistics<R>& statistics) {
  const int channels = norm_channels(plan), trivial = plan.n_trivial;
  for (int n = 0; n < plan.n_layers && plan.has_norms; ++n) {
    const int64_t at = i - plan.layers[n].affine;
    if (at < 0 || at >= channels * (1 + trivial)) continue;
    const int k = static_cast<int>(at) - channels, w = k < 0 ? static_cast<int>(at) : k / trivial;
    const R scale = norm_scale(plan, n, w, p, statistics.variance(plan, channels, n, w));
    return k < 0 ? scale : norm_shift(plan, n, k, p, statistics.mean(plan, channels, n, k), scale);
  }
  return matrix.multiply_row(i, p);
}

// Number i of the statistics, as NormStatistics::given.
template <typename R>
IST_HOST_DEVICE R norm_statistic(const PlanView<R>& plan, const NormStatistics<R>& statistics, int64_t i) {
  const int channels = norm_channels(plan), means = channels * plan.n_trivial;
  const int n = static_cast<int>(i / statistics_size(plan)), k = static_cast<int>(i % statistics_size(plan));
  return k < means ? statistics.mean(plan, channels, n, k) : statistics.variance(plan, channels, n, k - means);
}

// What batch norms at given statistics add to the gradient of parameter j.
template <typename R>
IST_HOST_DEVICE R norm_gradient(const PlanView<R>& plan, int64_t j, const R* statistics, const R* grad) {
  const int channels = norm_channels(plan), trivial = plan.n_trivial;
  for (int n = 0; n < plan.n_layers && plan.has_norms; ++n) {
    const LayerView<R>& layer = plan.layers[n];
    const int64_t k = j - layer.norm_bias, w = j - layer.norm_weight;
    if (trivial && k >= 0 && k < channels * trivial) return grad[layer.affine + channels + k];
    if (w >= 0 && w < channels) return norm_weight_gradient(plan, n, static_cast<int>(w), statistics, grad);
  }
  return 0;
}

}  // namespace implicit_steer
