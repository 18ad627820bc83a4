// The torch operator from hidden features at a table's knots to the coefficients of its splines (ops/table.py), a
// linear map, and its transpose; through torch's stable ABI.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "arguments.h"

namespace {

using namespace implicit_steer;

// Of T rows of attributes with K knots each, W channels of d coordinates and c coefficients.
template <typename R>
struct KnotMap {
  struct Nonzero {
    int64_t m, k;
    R value;
  };

  int64_t knots, channels, d, c, width, threads;
  std::vector<Nonzero> coefficients;  // of the map (d, c)
  const R *scale, *left, *series;     // (K, c); (n_left, n_left); its terms
  int64_t n_left, n_series;

  KnotMap(const Tensor& map, const Tensor& scales, const Tensor& ends, const Tensor& terms, int64_t n_channels)
      : knots(scales.size(0)),
        channels(n_channels),
        d(map.size(0)),
        c(map.size(1)),
        width(channels * c),
        threads(torch::stable::get_num_threads()),
        n_left(ends.size(0)),
        n_series(terms.numel()) {
    check(map, "coefficients", real_type<R>, d * c), check(scales, "scale", real_type<R>, knots * c);
    check(ends, "left", real_type<R>, n_left * n_left), check(terms, "series", real_type<R>, n_series);
    STD_TORCH_CHECK(knots >= n_left && n_splines() > 0, "scale: expected a row for each of more knots.");
    scale = data<R>(scales), left = data<R>(ends), series = data<R>(terms);
    for (int64_t m = 0; m < d; ++m)
      for (int64_t k = 0; k < c; ++k)
        if (const R value = data<R>(map)[m * c + k]; value != 0) coefficients.push_back({m, k, value});
  }

  int64_t n_splines() const { return knots + n_left + 1 - n_series; }

  // to += from · factor, of n knots or splines side by side
  void add(R* to, const R* from, R factor, int64_t n) const {
    for (int64_t x = 0; x < n * width; ++x) to[x] += from[x] * factor;
  }

  // h [K, hidden] -> b [n_splines, W, c]; values: [n_left + K, W, c], at the knots and to the left of them
  void forward(const R* h, int64_t hidden, R* values, R* b) const {
    std::fill_n(values, (n_left + knots) * width, R{});
    R* own = values + n_left * width;
    for (int64_t n = 0; n < knots; ++n)
      for (const Nonzero& z : coefficients)
        for (int64_t w = 0; w < channels; ++w)
          own[n * width + w * c + z.k] += h[n * hidden + w * d + z.m] * (z.value * scale[n * c + z.k]);
    for (int64_t i = 0; i < n_left; ++i)
      for (int64_t n = 0; n < n_left; ++n) add(values + i * width, own + n * width, left[i * n_left + n], 1);
    std::fill_n(b, n_splines() * width, R{});
    for (int64_t q = 0; q < n_series; ++q) add(b, values + q * width, series[q], n_splines());
  }

  // d_b [n_splines, W, c] -> d_h [K, hidden]; values as in forward(), their gradients
  void transpose(const R* d_b, int64_t hidden, R* values, R* d_h) const {
    std::fill_n(values, (n_left + knots) * width, R{});
    for (int64_t q = 0; q < n_series; ++q) add(values + q * width, d_b, series[q], n_splines());
    R* own = values + n_left * width;
    for (int64_t i = 0; i < n_left; ++i)
      for (int64_t n = 0; n < n_left; ++n) add(own + n * width, values + i * width, left[i * n_left + n], 1);
    std::fill_n(d_h, knots * hidden, R{});
    for (int64_t n = 0; n < knots; ++n)
      for (const Nonzero& z : coefficients)
        for (int64_t w = 0; w < channels; ++w)
          d_h[n * hidden + w * d + z.m] += own[n * width + w * c + z.k] * (z.value * scale[n * c + z.k]);
  }

  // f(t, values) for every row of attributes
  template <typename F>
  void for_types(int64_t types, F f) const {
#pragma omp parallel for num_threads(threads) if (threads > 1 && types > 1)
    for (int64_t t = 0; t < types; ++t) {
      std::vector<R> values((n_left + knots) * width);
      f(t, values.data());
    }
  }
};

// hidden [T K, at least W d] -> the splines' coefficients [T n_splines W c]
Tensor table_splines(const Tensor& hidden, const Tensor& coefficients, const Tensor& scale, const Tensor& left,
                     const Tensor& series, int64_t channels) {
  Tensor splines;
  dispatch_real(hidden, "hidden", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    const KnotMap<R> map(coefficients, scale, left, series, channels);
    const int64_t size = hidden.size(1), types = hidden.size(0) / map.knots, n = map.n_splines() * map.width;
    STD_TORCH_CHECK(size >= channels * map.d, "hidden: expected ", channels * map.d, " columns, got ", size, ".");
    check(hidden, "hidden", real_type<R>, types * map.knots * size);
    splines = new_empty(hidden, {types * n});
    R* out = mutable_data<R>(splines);
    map.for_types(types, [&](int64_t t, R* values) {
      map.forward(data<R>(hidden) + t * map.knots * size, size, values, out + t * n);
    });
  });
  return splines;
}

// The gradient of hidden [T K, size] from that of the splines' coefficients.
Tensor table_splines_backward(const Tensor& grad, const Tensor& coefficients, const Tensor& scale, const Tensor& left,
                              const Tensor& series, int64_t channels, int64_t size) {
  Tensor found;
  dispatch_real(grad, "grad", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    const KnotMap<R> map(coefficients, scale, left, series, channels);
    const int64_t n = map.n_splines() * map.width, types = n ? grad.numel() / n : 0;
    STD_TORCH_CHECK(size >= channels * map.d, "size: expected at least ", channels * map.d, ", got ", size, ".");
    check(grad, "grad", real_type<R>, types * n);
    found = new_empty(grad, {types * map.knots, size});
    R* out = mutable_data<R>(found);
    map.for_types(types, [&](int64_t t, R* values) {
      map.transpose(data<R>(grad) + t * n, size, values, out + t * map.knots * size);
    });
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def(
      "table_splines(Tensor hidden, Tensor coefficients, Tensor scale, Tensor left, Tensor series, int channels) -> "
      "Tensor");
  m.def(
      "table_splines_backward(Tensor grad, Tensor coefficients, Tensor scale, Tensor left, Tensor series, "
      "int channels, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  m.impl("table_splines", TORCH_BOX(&table_splines));
  m.impl("table_splines_backward", TORCH_BOX(&table_splines_backward));
}
