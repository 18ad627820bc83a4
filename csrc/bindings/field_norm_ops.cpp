// Batch norm of node features as torch operators. x [N, C] holds fields, their channels in the order `channels` [C], or
// as they are if that is empty: kind by kind, field by field. The F fields of one kind have d = sizes[kind] coordinates
// each, a variance [F], a weight [F], a mean [F, d] and a bias [F, T] on `basis` [d, T]; of the last three any may be
// empty. Statistics are constants.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../cpu/blocks.h"
#include "arguments.h"

namespace {

using namespace implicit_steer;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr int64_t kRows = 64;             // rows that are added up in their own precision, these sums in double
constexpr int64_t kNumbersPerEdge = 128;  // of x, that take about as long as an edge of a convolution

// Of the rows of x, each of which leaves `sums` numbers to be added up; and threads for them.
int blocks_of(const Tensor& x, int64_t sums) { return block_count(x.numel() / kNumbersPerEdge, sums); }
int threads_for(int blocks) { return std::min(blocks, static_cast<int>(torch::stable::get_num_threads())); }

// Calls row(n, sums) for all rows of x; what they add to `sums` [width], which starts at 0.
template <typename R, typename Row>
std::vector<double> sum_rows(const Tensor& x, int64_t width, Row row) {
  const int64_t rows = x.size(0);
  const int blocks = blocks_of(x, width), threads = threads_for(blocks);
  std::vector<double> totals(blocks * width);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int b = 0; b < blocks; ++b) {
    std::vector<R> sums(width);
    double* total = totals.data() + b * width;
    const int64_t last = first_of_block(rows, b + 1, blocks);
    for (int64_t n = first_of_block(rows, b, blocks); n < last;) {
      std::fill(sums.begin(), sums.end(), R{});
      for (const int64_t end = std::min(n + kRows, last); n < end; ++n) row(n, sums.data());
      for (int64_t k = 0; k < width; ++k) total[k] += sums[k];
    }
  }
  for (int b = 1; b < blocks; ++b)
    for (int64_t k = 0; k < width; ++k) totals[k] += totals[b * width + k];
  return totals;
}

void check_features(const Tensor& x, const Tensor& channels) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a tensor of shape (N, C), got rank ", x.dim(), ".");
  check(x, "x", x.scalar_type(), x.numel());
  check(channels, "channels", ScalarType::Long, channels.numel());
  STD_TORCH_CHECK(channels.numel() == 0 || channels.numel() == x.size(1), "channels: expected none or all.");
}

// Calls f(kind, field, coordinate, channel) for all channels; `counts`: fields of each kind.
template <typename F>
void for_channels(const Tensor& x, const Tensor& channels, const Sizes& counts, const Sizes& sizes, F f) {
  const int64_t n = x.size(1), *order = channels.numel() ? data<int64_t>(channels) : nullptr;
  int64_t at = 0;
  for (size_t kind = 0; kind < sizes.size(); ++kind)
    for (int64_t field = 0; field < counts[kind]; ++field)
      for (int64_t i = 0; i < sizes[kind]; ++i, ++at) {
        const int64_t channel = !order ? at : at < n ? order[at] : n;
        STD_TORCH_CHECK(channel >= 0 && channel < n, "sizes, channels: expected fields of ", n, " channels in all.");
        f(kind, field, i, channel);
      }
  STD_TORCH_CHECK(at == n, "sizes: expected fields of ", n, " channels in all, got ", at, ".");
}

// x, at least 2 points; averages: per kind a projection [d, d] or nothing
// -> per kind the projected mean [F, d], or nothing, and the unbiased variance [F, 1], averaged over the coordinates
std::tuple<Tensors, Tensors> field_statistics(const Tensor& x, const Tensor& channels, const Sizes& counts,
                                              const Sizes& sizes, const Tensors& averages) {
  check_features(x, channels);
  Tensors means, variances;
  dispatch_real(x, "x", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    const R* in = data<R>(x);
    const int64_t rows = x.size(0), width = x.size(1);
    std::vector<double> mean = sum_rows<R>(x, width, [&](int64_t n, R* sum) {
      for (int64_t c = 0; c < width; ++c) sum[c] += in[n * width + c];
    });
    for (double& m : mean) m /= static_cast<double>(rows);
    const std::vector<R> centre(mean.begin(), mean.begin() + width);
    const std::vector<double> squares = sum_rows<R>(x, width, [&](int64_t n, R* sum) {
      for (int64_t c = 0; c < width; ++c) {
        const R d = in[n * width + c] - centre[c];
        sum[c] += d * d;
      }
    });
    for (size_t kind = 0; kind < sizes.size(); ++kind) {
      const int64_t d = sizes[kind];
      const bool projected = averages[kind].numel() > 0;
      if (projected) check(averages[kind], "averages", x.scalar_type(), d * d);
      means.push_back(new_empty(x, {projected ? counts[kind] : 0, d}));
      variances.push_back(new_empty(x, {counts[kind], 1}));
      std::fill_n(mutable_data<R>(means.back()), means.back().numel(), R{});
      std::fill_n(mutable_data<R>(variances.back()), counts[kind], R{});
    }
    for_channels(x, channels, counts, sizes, [&](size_t kind, int64_t field, int64_t i, int64_t channel) {
      const int64_t d = sizes[kind];
      mutable_data<R>(variances[kind])[field] += static_cast<R>(squares[channel] / static_cast<double>(d * (rows - 1)));
      if (means[kind].numel() == 0) return;
      R* out = mutable_data<R>(means[kind]) + field * d;
      for (int64_t k = 0; k < d; ++k) out[k] += data<R>(averages[kind])[k * d + i] * centre[channel];
    });
  });
  return {means, variances};
}

// What the norm does to each channel: (x - mean) scale + shift.
template <typename R>
struct Affine {
  std::vector<R> mean, scale, shift;

  Affine(const Tensor& x, const Tensor& channels, const Sizes& counts, const Sizes& sizes, const Tensors& means,
         const Tensors& variances, const Tensors& weights, const Tensors& biases, const Tensors& bases, double eps)
      : mean(x.size(1)), scale(x.size(1)), shift(x.size(1)) {
    for (size_t q = 0; q < sizes.size(); ++q) {
      const auto fits = [&](const Tensor& t, const char* name, int64_t n) {
        check(t, name, x.scalar_type(), t.numel() ? n : 0);
      };
      check(variances[q], "variances", x.scalar_type(), counts[q]);
      fits(means[q], "means", counts[q] * sizes[q]), fits(weights[q], "weights", counts[q]);
      const int64_t trivial = bases[q].numel() / sizes[q];
      fits(biases[q], "biases", counts[q] * trivial), fits(bases[q], "bases", sizes[q] * trivial);
    }
    for_channels(x, channels, counts, sizes, [&](size_t q, int64_t field, int64_t i, int64_t c) {
      const int64_t trivial = bases[q].numel() / sizes[q];
      scale[c] = 1 / std::sqrt(data<R>(variances[q])[field] + static_cast<R>(eps));
      if (weights[q].numel()) scale[c] *= data<R>(weights[q])[field];
      if (means[q].numel()) mean[c] = data<R>(means[q])[field * sizes[q] + i];
      for (int64_t k = 0; k < trivial && biases[q].numel(); ++k)
        shift[c] += data<R>(biases[q])[field * trivial + k] * data<R>(bases[q])[i * trivial + k];
    });
  }
};

Tensor field_norm(const Tensor& x, const Tensor& channels, const Sizes& counts, const Sizes& sizes,
                  const Tensors& means, const Tensors& variances, const Tensors& weights, const Tensors& biases,
                  const Tensors& bases, double eps) {
  check_features(x, channels);
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor out = new_empty(x, {rows, width});
  dispatch_real(x, "x", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    const Affine<R> map(x, channels, counts, sizes, means, variances, weights, biases, bases, eps);
    const R *in = data<R>(x), *mean = map.mean.data(), *scale = map.scale.data(), *shift = map.shift.data();
    R* y = mutable_data<R>(out);
    const int blocks = blocks_of(x, 0), threads = threads_for(blocks);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int b = 0; b < blocks; ++b)
      for (int64_t n = first_of_block(rows, b, blocks), last = first_of_block(rows, b + 1, blocks); n < last; ++n)
        for (int64_t c = 0; c < width; ++c) y[n * width + c] = (in[n * width + c] - mean[c]) * scale[c] + shift[c];
  });
  return out;
}

// grad, of the output of field_norm -> gradients of x, weights and biases, empty where these are
std::tuple<Tensor, Tensors, Tensors> field_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& channels,
                                                         const Sizes& counts, const Sizes& sizes, const Tensors& means,
                                                         const Tensors& variances, const Tensors& weights,
                                                         const Tensors& biases, const Tensors& bases, double eps) {
  check_features(x, channels);
  check(grad, "grad", x.scalar_type(), x.numel());
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor d_x = new_empty(x, {rows, width});
  Tensors d_weights, d_biases;
  dispatch_real(x, "x", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    const Affine<R> map(x, channels, counts, sizes, means, variances, weights, biases, bases, eps);
    const R *in = data<R>(x), *g = data<R>(grad), *mean = map.mean.data(), *scale = map.scale.data();
    R* d = mutable_data<R>(d_x);
    const std::vector<double> sums = sum_rows<R>(x, 2 * width, [&](int64_t n, R* sum) {
      for (int64_t c = 0; c < width; ++c) {
        const int64_t k = n * width + c;
        d[k] = g[k] * scale[c];
        sum[c] += g[k] * (in[k] - mean[c]);
        sum[width + c] += g[k];
      }
    });
    for (size_t q = 0; q < sizes.size(); ++q) {
      d_weights.push_back(new_empty(x, weights[q].sizes(), dtype_of(x)));
      d_biases.push_back(new_empty(x, biases[q].sizes(), dtype_of(x)));
      for (Tensor* t : {&d_weights.back(), &d_biases.back()}) std::fill_n(mutable_data<R>(*t), t->numel(), R{});
    }
    for_channels(x, channels, counts, sizes, [&](size_t q, int64_t field, int64_t i, int64_t c) {
      const R root = std::sqrt(data<R>(variances[q])[field] + static_cast<R>(eps));
      if (weights[q].numel()) mutable_data<R>(d_weights[q])[field] += static_cast<R>(sums[c]) / root;
      const int64_t trivial = bases[q].numel() / sizes[q];
      for (int64_t k = 0; k < trivial && biases[q].numel(); ++k)
        mutable_data<R>(d_biases[q])[field * trivial + k] +=
            static_cast<R>(sums[width + c]) * data<R>(bases[q])[i * trivial + k];
    });
  });
  return {d_x, d_weights, d_biases};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def(
      "field_statistics(Tensor x, Tensor channels, int[] counts, int[] sizes, Tensor[] averages) -> "
      "(Tensor[], Tensor[])");
  m.def(
      "field_norm(Tensor x, Tensor channels, int[] counts, int[] sizes, Tensor[] means, Tensor[] variances, "
      "Tensor[] weights, Tensor[] biases, Tensor[] bases, float eps) -> Tensor");
  m.def(
      "field_norm_backward(Tensor grad, Tensor x, Tensor channels, int[] counts, int[] sizes, Tensor[] means, "
      "Tensor[] variances, Tensor[] weights, Tensor[] biases, Tensor[] bases, float eps) -> "
      "(Tensor, Tensor[], Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  m.impl("field_statistics", TORCH_BOX(&field_statistics));
  m.impl("field_norm", TORCH_BOX(&field_norm));
  m.impl("field_norm_backward", TORCH_BOX(&field_norm_backward));
}
