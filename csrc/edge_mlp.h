// L edges: the hidden layers of the kernel MLP and their reverse sweep. Linear layers over static nonzeros; Fourier
// activations y = A⁻ φ(A z), near the origin on coefficients divided by the radius (ops/kernel_mlp.py says why).
#pragma once

#include "edge_frame.h"

namespace implicit_steer::IST_ISA {

// ---- linear layers: groups of rows that share their columns, values [row][column] in the packed weights

// z[row] = b[row] + Σ_col W[j, col] y[col] for N rows
template <int N, typename R, typename V>
IST_INLINE void linear_rows(const R* w, const R* bias, int n_columns, const int32_t* columns, const int32_t* rows,
                            const V* y, V* z) {
  V acc[N];
  for (int j = 0; j < N; ++j) acc[j] = splat<V>(bias[rows[j]]);
  for (int i = 0; i < n_columns; ++i) {
    const V in = y[columns[i]];
    for (int j = 0; j < N; ++j) acc[j] += in * w[j * n_columns + i];
  }
  for (int j = 0; j < N; ++j) z[rows[j]] = acc[j];
}

template <typename R>
IST_LANES void linear_forward(const LayerView<Real<R>>& layer, const R* weights, const typename Lane<R>::V* y,
                              typename Lane<R>::V* z) {
  const R *w = weights + layer.weight, *bias = weights + layer.bias;
  const int32_t* g = layer.groups;
  for (int n = 0; n < layer.n_groups; ++n) {
    const int n_rows = g[0], n_columns = g[1];
    const int32_t *rows = g + 2, *columns = rows + n_rows;
    int r = 0;
    for (; r + 8 <= n_rows; r += 8) linear_rows<8>(w + r * n_columns, bias, n_columns, columns, rows + r, y, z);
    for (; r + 4 <= n_rows; r += 4) linear_rows<4>(w + r * n_columns, bias, n_columns, columns, rows + r, y, z);
    for (; r < n_rows; ++r) linear_rows<1>(w + r * n_columns, bias, n_columns, columns, rows + r, y, z);
    w += n_rows * n_columns;
    g = columns + n_columns;
  }
}

// d_y[col] += Σ_row W[row, i] d_z[row] for N columns
template <int N, typename R, typename V>
IST_INLINE void linear_columns(const R* w, int n_rows, int n_columns, const int32_t* rows, const int32_t* columns,
                               const V* d_z, V* d_y) {
  V acc[N];
  for (int i = 0; i < N; ++i) acc[i] = d_y[columns[i]];
  for (int r = 0; r < n_rows; ++r, w += n_columns) {
    const V d = d_z[rows[r]];
    for (int i = 0; i < N; ++i) acc[i] += d * w[i];
  }
  for (int i = 0; i < N; ++i) d_y[columns[i]] = acc[i];
}

// d_y += Wᵀ d_z (unless null); d_w[value] += d_z ⊗ y and d_b += d_z, lane by lane (unless null).
template <typename R>
IST_LANES void linear_backward(const LayerView<Real<R>>& layer, const R* weights, const typename Lane<R>::V* y,
                               const typename Lane<R>::V* d_z, typename Lane<R>::V* d_y, typename Lane<R>::V* d_w,
                               typename Lane<R>::V* d_b) {
  using V = typename Lane<R>::V;
  if (d_b)
    for (int o = 0; o < layer.out_size; ++o) d_b[o] += d_z[o];
  const R* w = weights + layer.weight;
  const int32_t* g = layer.groups;
  for (int n = 0; n < layer.n_groups; ++n) {
    const int n_rows = g[0], n_columns = g[1];
    const int32_t *rows = g + 2, *columns = rows + n_rows;
    int i = 0;
    for (; i + 4 <= n_columns && d_y; i += 4) linear_columns<4>(w + i, n_rows, n_columns, rows, columns + i, d_z, d_y);
    for (; i < n_columns && d_y; ++i) linear_columns<1>(w + i, n_rows, n_columns, rows, columns + i, d_z, d_y);
    for (i = 0; i < n_columns && d_w; ++i) {
      const V in = y[columns[i]];
      for (int r = 0; r < n_rows; ++r) d_w[r * n_columns + i] += d_z[rows[r]] * in;
    }
    w += n_rows * n_columns;
    if (d_w) d_w += n_rows * n_columns;
    g = columns + n_columns;
  }
}

// ---- activations of one channel, N pairs or N single samples at a time; `even`: where its odd coefficients start;
// slopes [2 N] or [N]: φ′, kept for the reverse sweep

// x[j] = Σ_{k0 <= k < k1} z[k] a[j, k]
template <int N, typename R, typename V>
IST_INLINE void products(const R* a, int stride, int k0, int k1, const V* z, V* x) {
  for (int j = 0; j < N; ++j) x[j] = V{};
  for (int k = k0; k < k1; ++k) {
    const V in = z[k];
    for (int j = 0; j < N; ++j) x[j] += in * a[j * stride + k];
  }
}

// y[k] = Σ_j x[j] a[j, k] for k0 <= k < k1, added to what is there unless `first`
template <int N, typename R, typename V>
IST_INLINE void add_products(bool first, const R* a, int stride, int k0, int k1, const V* x, V* y) {
  for (int k = k0; k < k1; ++k) {
    V acc = first ? V{} : y[k];
    for (int j = 0; j < N; ++j) acc += x[j] * a[j * stride + k];
    y[k] = acc;
  }
}

// E, O -> E + O, E - O
template <int N, typename V>
IST_INLINE void butterfly(V* even, V* odd) {
  for (int j = 0; j < N; ++j) {
    const V sum = even[j] + odd[j];
    odd[j] = even[j] - odd[j], even[j] = sum;
  }
}

template <typename F, int N, typename V>
IST_INLINE void apply(V* x, V* slopes) {
  if (slopes)
    IST_UNROLLED for (int j = 0; j < N; ++j) x[j] = F::both(x[j], slopes[j]);
  else
    IST_UNROLLED for (int j = 0; j < N; ++j) x[j] = F::value(x[j]);
}

// φ of the samples, x [2 N], and φ′ into slopes (unless null)
template <typename F, int N, typename V>
IST_INLINE void pair_values(const LayerView<Real<V>>& layer, int row, int c, int even, const V* z, V* x, V* slopes) {
  const Real<V>* a = layer.pair_samples + row * c;
  products<N>(a, c, 0, layer.in_even, z, x);  // even parts
  products<N>(a, c, even, even + layer.in_odd, z, x + N);
  butterfly<N>(x, x + N);
  apply<F, 2 * N>(x, slopes);
}

template <typename F, int N, typename V>
IST_INLINE void pairs_forward(const LayerView<Real<V>>& layer, int row, int c, int even, const V* z, V* y, V* slopes) {
  const Real<V>* inverse = layer.pair_inverse + row * c;
  V x[2 * N];  // the samples, then their sums and differences
  pair_values<F, N>(layer, row, c, even, z, x, slopes);
  butterfly<N>(x, x + N);
  add_products<N>(row == 0, inverse, c, 0, layer.out_even, x, y);
  add_products<N>(row == 0, inverse, c, even, even + layer.out_odd, x + N, y);
}

template <int N, typename V>
IST_INLINE void pairs_backward(const LayerView<Real<V>>& layer, int row, int c, int even, const V* slopes, const V* d_y,
                               V* d_z) {
  const Real<V>*a = layer.pair_samples + row * c, *inverse = layer.pair_inverse + row * c;
  V g[2 * N];
  products<N>(inverse, c, 0, layer.out_even, d_y, g);
  products<N>(inverse, c, even, even + layer.out_odd, d_y, g + N);
  butterfly<N>(g, g + N);
  for (int j = 0; j < 2 * N; ++j) g[j] *= slopes[j];
  butterfly<N>(g, g + N);
  add_products<N>(row == 0, a, c, 0, layer.in_even, g, d_z);
  add_products<N>(row == 0, a, c, even, even + layer.in_odd, g + N, d_z);
}

template <typename F, int N, typename V>
IST_INLINE void singles_forward(const LayerView<Real<V>>& layer, int row, int c, const V* z, V* y, V* slopes) {
  V x[N];
  products<N>(layer.pair_samples + row * c, c, 0, c, z, x);
  apply<F, N>(x, slopes);
  add_products<N>(row == 0, layer.pair_inverse + row * c, c, 0, c, x, y);
}

template <int N, typename V>
IST_INLINE void singles_backward(const LayerView<Real<V>>& layer, int row, int c, const V* slopes, const V* d_y,
                                 V* d_z) {
  V g[N];
  products<N>(layer.pair_inverse + row * c, c, 0, c, d_y, g);
  for (int j = 0; j < N; ++j) g[j] *= slopes[j];
  add_products<N>(row == 0, layer.pair_samples + row * c, c, 0, c, g, d_z);
}

// Calls f with blocks of at most kRowBlock<V> rows: f(constant of the block's size, first row).
template <int N>
struct Count {
  static constexpr int value = N;
};
template <typename V, typename F>
IST_INLINE void row_blocks(int begin, int end, F f) {
  constexpr int kBlock = kRowBlock<V>;
  int s = begin;
  for (; s + kBlock <= end; s += kBlock) f(Count<kBlock>{}, s);
  if constexpr (kOneLane) {  // less code, and no pipeline to be filled by the few rows left
    for (; s < end; ++s) f(Count<1>{}, s);
    return;
  }
  switch (end - s) {
    case 4:
      return f(Count<4>{}, s);
    case 3:
      return f(Count<3>{}, s);
    case 2:
      return f(Count<2>{}, s);
    case 1:
      return f(Count<1>{}, s);
  }
}

// ---- the difference quotient q(b, k) = (φ(b + k) − φ(b)) / k and its derivatives (see plan/activations.py)

template <typename V>
struct Quotient {
  V q, q_b, q_k;
};

// ELU on one side of its kink: 1 where b >= 0, else e^b (e^k - 1) / k by the series of the latter, |k| <= 0.5.
template <typename V>
IST_INLINE Quotient<V> elu_mean(V b, V k) {
  using R = Real<V>;
  constexpr R series[] = {R(1.0 / 3628800), R(1.0 / 362880), R(1.0 / 40320), R(1.0 / 5040), R(1.0 / 720),
                          R(1.0 / 120),     R(1.0 / 24),     R(1.0 / 6),     R(0.5),        R(1)};
  V value = V{} + series[0], slope{};
  for (int j = 1; j < 10; ++j) {
    slope = slope * k + value;
    value = value * k + series[j];
  }
  const V e = lane_exp(lane_min(V{}, b));
  value *= e, slope *= e;
  return {select(b < 0, value, V{} + 1), select(b < 0, value, V{}), select(b < 0, slope, V{})};
}

// The mean of φ′ over [b, b + k] by 4-point Gauss–Legendre quadrature on [0, 1]: two pairs of points, each at one
// distance from the middle, 1/2 sqrt(3/7 ± 2/7 sqrt(6/5)), and with one weight, (18 ∓ sqrt(30)) / 72.
template <typename F, bool kDerivatives, typename V>
IST_INLINE Quotient<V> quadrature_mean(V b, V k) {
  using R = Real<V>;
  Quotient<V> mean{};
  IST_ROLLED for (int j = 0; j < 4; ++j) {
    const R distance = j < 2 ? R(0.43056815579702629) : R(0.16999052179242813);
    const R weight = j < 2 ? R(0.17392742256872692) : R(0.32607257743127307);
    const R t = R(0.5) + (j % 2 == 0 ? -distance : distance);
    mean.q += weight * F::prime(b + k * t);
    if (!kDerivatives) continue;
    const V second = F::second(b + k * t);
    mean.q_b += weight * second;
    mean.q_k += weight * t * second;
  }
  return mean;
}

template <typename F, bool kDerivatives, typename V>
IST_INLINE Quotient<V> quotient(V b, V k) {
  auto direct = lane_abs(k) > Limits<Real<V>>::quotient;
  if (F::kinked()) direct = direct | (((b < 0) != (b + k < 0)) & (k != 0));
  const V far = select(direct, k, V{} + 1), near = select(direct, V{}, k);
  const V difference = (F::value(b + far) - F::value(b)) / far;
  Quotient<V> mean;
  if constexpr (F::is_elu)
    mean = elu_mean(b, near);
  else
    mean = quadrature_mean<F, kDerivatives>(b, near);
  Quotient<V> result;
  result.q = select(direct, difference, mean.q);
  if (kDerivatives) {
    const V end = F::prime(b + far);
    result.q_b = select(direct, (end - F::prime(b)) / far, mean.q_b);
    result.q_k = select(direct, (end - difference) / far, mean.q_k);
  }
  return result;
}

// One channel near the origin: z and y of orders >= 1 (from coefficient `zero` on) divided by the radius r.
template <typename F, typename V>
IST_LANES void near_forward(const LayerView<Real<V>>& layer, int c, int zero, V r, const V* z, V* y) {
  IST_ROLLED for (int k = 0; k < c; ++k) y[k] = V{};
  IST_ROLLED for (int s = 0; s < layer.n_samples; ++s) {
    const Real<V>*a = layer.samples + s * c, *inv = layer.inverse_t + s * c;
    V u0{}, w{};
    IST_ROLLED for (int k = 0; k < zero; ++k) u0 += z[k] * a[k];
    IST_ROLLED for (int k = zero; k < c; ++k) w += z[k] * a[k];
    const V d = w * quotient<F, false>(u0, r * w).q;
    const V value = F::value(u0) + r * d;
    IST_ROLLED for (int k = 0; k < c; ++k) y[k] += (k < zero ? value : d) * inv[k];
  }
}

template <typename F, typename V>
IST_LANES void near_backward(const LayerView<Real<V>>& layer, int c, int zero, V r, const V* z, const V* d_y, V* d_z,
                             V& d_r) {
  IST_ROLLED for (int k = 0; k < c; ++k) d_z[k] = V{};
  IST_ROLLED for (int s = 0; s < layer.n_samples; ++s) {
    const Real<V>*a = layer.samples + s * c, *inv = layer.inverse_t + s * c;
    V u0{}, w{}, g0{}, g1{};
    IST_ROLLED for (int k = 0; k < zero; ++k) u0 += z[k] * a[k];
    IST_ROLLED for (int k = zero; k < c; ++k) w += z[k] * a[k];
    IST_ROLLED for (int k = 0; k < zero; ++k) g0 += d_y[k] * inv[k];
    IST_ROLLED for (int k = zero; k < c; ++k) g1 += d_y[k] * inv[k];
    const Quotient<V> q = quotient<F, true>(u0, r * w);
    const V d_d = r * g0 + g1;
    d_r += w * q.q * g0 + d_d * w * w * q.q_k;
    const V d_u0 = F::prime(u0) * g0 + d_d * w * q.q_b, d_w = d_d * (q.q + r * w * q.q_k);
    IST_ROLLED for (int k = 0; k < c; ++k) d_z[k] += (k < zero ? d_u0 : d_w) * a[k];
  }
}

// ---- activations of all channels

// Zero in the coefficients that no row of samples writes: those past the first `even` and `odd` of each kind.
template <typename V>
IST_INLINE void clear_unused(const PlanView<Real<V>>& p, int even, int odd, V* y) {
  for (int k = even; k < p.n_even; ++k) y[k] = V{};
  for (int k = p.n_even + odd; k < p.c; ++k) y[k] = V{};
}

template <typename F, typename R>
IST_INLINE void channel_forward(const PlanView<Real<R>>& p, const LayerView<Real<R>>& layer, const Edges<R>& e,
                                const typename Lane<R>::V* z, typename Lane<R>::V* y, typename Lane<R>::V* slopes) {
  const int c = p.c, rows = layer.n_samples - layer.n_pairs;
  if (e.near_origin) return near_forward<F>(layer, c, p.order_zero, e.radius, z, y);
  clear_unused(p, layer.out_even, layer.out_odd, y);
  using V = typename Lane<R>::V;
  row_blocks<V>(0, layer.n_pairs, [&](auto n, int row) {
    pairs_forward<F, decltype(n)::value>(layer, row, c, p.n_even, z, y, slopes ? slopes + 2 * row : nullptr);
  });
  row_blocks<V>(layer.n_pairs, rows, [&](auto n, int row) {
    singles_forward<F, decltype(n)::value>(layer, row, c, z, y, slopes ? slopes + layer.n_pairs + row : nullptr);
  });
}

template <typename F, typename R>
IST_LANES void activation_forward(const PlanView<Real<R>>& p, const LayerView<Real<R>>& layer, const Edges<R>& e,
                                  const typename Lane<R>::V* z, typename Lane<R>::V* y, typename Lane<R>::V* slopes) {
  for (int w = 0; w < layer.out_size; w += p.c, z += p.c, y += p.c) {
    channel_forward<F>(p, layer, e, z, y, slopes);
    if (slopes) slopes += layer.n_samples;
  }
}

// d_z from d_y and the slopes, whatever φ is
template <typename R>
IST_LANES void activation_backward(const PlanView<Real<R>>& p, const LayerView<Real<R>>& layer,
                                   const typename Lane<R>::V* d_y, const typename Lane<R>::V* slopes,
                                   typename Lane<R>::V* d_z) {
  using V = typename Lane<R>::V;
  const int c = p.c, rows = layer.n_samples - layer.n_pairs;
  for (int w = 0; w < layer.out_size; w += c, d_y += c, d_z += c, slopes += layer.n_samples) {
    clear_unused(p, layer.in_even, layer.in_odd, d_z);
    row_blocks<V>(0, layer.n_pairs, [&](auto n, int row) {
      pairs_backward<decltype(n)::value>(layer, row, c, p.n_even, slopes + 2 * row, d_y, d_z);
    });
    row_blocks<V>(layer.n_pairs, rows, [&](auto n, int row) {
      singles_backward<decltype(n)::value>(layer, row, c, slopes + layer.n_pairs + row, d_y, d_z);
    });
  }
}

// ---- batch norms: scale [W] times y, plus shift [W, n_trivial] on the trivial coefficients

template <typename R, typename V>
IST_INLINE void norm_channel(const PlanView<Real<R>>& p, R scale, const R* shift, const V* y, V* normed) {
  for (int k = 0; k < p.c; ++k) normed[k] = y[k] * scale;
  for (int k = 0; k < p.n_trivial; ++k) normed[p.trivial[k]] += shift[k];
}

template <typename R>
IST_LANES void norm_forward(const PlanView<Real<R>>& p, const R* affine, int channels, const typename Lane<R>::V* y,
                            typename Lane<R>::V* normed) {
  const R* shift = affine + channels;
  for (int w = 0; w < channels; ++w, y += p.c, normed += p.c, shift += p.n_trivial)
    norm_channel(p, affine[w], shift, y, normed);
}

// d_y in place, from the gradient of the output; d_affine += its gradient, lane by lane (unless null).
template <typename R>
IST_LANES void norm_backward(const PlanView<Real<R>>& p, const R* affine, int channels, const typename Lane<R>::V* y,
                             typename Lane<R>::V* d_y, typename Lane<R>::V* d_affine) {
  for (int w = 0; w < channels; ++w, y += p.c, d_y += p.c) {
    if (d_affine)
      for (int k = 0; k < p.n_trivial; ++k) d_affine[channels + w * p.n_trivial + k] += d_y[p.trivial[k]];
    for (int k = 0; k < p.c; ++k) {
      if (d_affine) d_affine[w] += d_y[k] * y[k];
      d_y[k] *= affine[w];
    }
  }
}

template <typename R, typename G>
IST_INLINE void with_function(int function, G g) {
  switch (function) {
    case kElu:
      return g(Elu{});
    case kRelu:
      return g(Relu{});
    case kSilu:
      return g(Silu{});
    case kGelu:
      return g(Gelu{});
    default:
      return g(Tanh{});
  }
}

// ---- the whole MLP

template <typename R>
struct Mlp {
  using V = typename Lane<R>::V;
  const PlanView<Real<R>>* p;
  const R* weights;
  V *z, *y, *normed;        // per layer: [out] pre-activations, activations, after the batch norm (or y again)
  V *d_z, *d_y;             // one layer each, the widest
  V *d_w, *d_b, *d_affine;  // per layer, summed over all tiles of a block
  V* slopes;                // per layer [channels, n_samples]; null in the forward direction
  int64_t size_z, size_w, size_slopes;

  void place(Arena& arena, const PlanView<Real<R>>& plan, const R* packed, bool backward) {
    p = &plan, weights = packed, size_z = size_w = size_slopes = 0, slopes = nullptr;
    int64_t widest = 1;
    for (int n = 0; n < p->n_layers; ++n) {
      const int64_t out = p->layers[n].out_size;
      size_z += out, size_w += p->layers[n].n_values;
      size_slopes += out / p->c * p->layers[n].n_samples;
      widest = out > widest ? out : widest;
    }
    arena.take(z, size_z), arena.take(y, size_z);
    normed = y;
    if (p->has_norms) arena.take(normed, size_z);
    if (!backward) return;
    arena.take(d_z, widest), arena.take(d_y, widest), arena.take(d_w, size_w), arena.take(d_b, size_z);
    arena.take(slopes, size_slopes);
    if (p->has_norms) arena.take(d_affine, int64_t{p->n_layers} * affine_size());
  }

  // Numbers of one batch norm.
  int affine_size() const { return norm_channels(*p) * (1 + p->n_trivial); }

  // Layers 0 .. last: the last one's activations, before its batch norm if it has one.
  const V* forward(const Edges<R>& e, int last) {
    const V* in = e.inputs;
    V *z_n = z, *y_n = y, *normed_n = normed, *slopes_n = slopes;
    for (int n = 0;; ++n) {
      const LayerView<Real<R>>& layer = p->layers[n];
      linear_forward(layer, weights, in, z_n);
      with_function<R>(p->function, [&](auto f) { activation_forward<decltype(f)>(*p, layer, e, z_n, y_n, slopes_n); });
      if (n == last) return y_n;
      if (p->has_norms) norm_forward(*p, weights + layer.affine, layer.out_size / p->c, y_n, normed_n);
      in = normed_n;
      z_n += layer.out_size, y_n += layer.out_size, normed_n += layer.out_size;
      if (slopes) slopes_n += layer.out_size / p->c * layer.n_samples;
    }
  }

  // What the couplings read: all layers and batch norms.
  const V* hidden(const Edges<R>& e) {
    if (!p->n_layers) return e.inputs;
    const V* y_last = forward(e, p->n_layers - 1);
    const LayerView<Real<R>>& layer = p->layers[p->n_layers - 1];
    V* out = normed + size_z - layer.out_size;
    if (p->has_norms) norm_forward(*p, weights + layer.affine, layer.out_size / p->c, y_last, out);
    return out;
  }

  // d_z from d_y of a layer's channels near the origin; the radius' gradient is added to e.d_radius.
  template <typename F>
  void activation_near_backward(const LayerView<Real<R>>& layer, Edges<R>& e, const V* z_n) const {
    for (int k = 0; k < layer.out_size; k += p->c)
      near_backward<F>(layer, p->c, p->order_zero, e.radius, z_n + k, d_y + k, d_z + k, e.d_radius);
  }

  // From the gradient of hidden() (in this->d_y): d_w, d_b, d_affine, and with `need_inputs` e.d_inputs and e.d_radius.
  void backward(Edges<R>& e, bool need_weights, bool need_inputs) {
    V *z_n = z + size_z, *y_n = y + size_z, *normed_n = normed + size_z;
    V *d_w_n = d_w + size_w, *d_b_n = d_b + size_z, *slopes_n = slopes + size_slopes;
    for (int n = p->n_layers - 1; n >= 0; --n) {
      const LayerView<Real<R>>& layer = p->layers[n];
      z_n -= layer.out_size, y_n -= layer.out_size, normed_n -= layer.out_size, d_w_n -= layer.n_values,
          d_b_n -= layer.out_size;
      slopes_n -= layer.out_size / p->c * layer.n_samples;
      if (p->has_norms)
        norm_backward(*p, weights + layer.affine, layer.out_size / p->c, y_n, d_y,
                      need_weights ? d_affine + n * affine_size() : nullptr);
      if (e.near_origin)
        with_function<R>(p->function, [&](auto f) { activation_near_backward<decltype(f)>(layer, e, z_n); });
      else
        activation_backward<R>(*p, layer, d_y, slopes_n, d_z);
      const V* in = n > 0 ? normed_n - p->layers[n - 1].out_size : e.inputs;
      V* d_in = n > 0 ? d_y : need_inputs ? e.d_inputs : nullptr;
      if (d_in)
        for (int k = 0; k < layer.in_size; ++k) d_in[k] = V{};
      linear_backward(layer, weights, in, d_z, d_in, need_weights ? d_w_n : nullptr, need_weights ? d_b_n : nullptr);
    }
  }
};

}  // namespace implicit_steer::IST_ISA
