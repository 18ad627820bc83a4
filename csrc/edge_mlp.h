// L edges: the hidden layers of the kernel MLP and their reverse sweep. Linear layers over static nonzeros; Fourier
// activations y = A⁻ φ(A z), in regular frames on coefficients divided by the radius (backends/hidden.py says why).
#pragma once

#include "edge_frame.h"

namespace implicit_steer::IST_ISA {

// ---- linear layers: groups of rows that share their columns, values [row][column] in the packed weights

// acc[j] += Σ_col W[j, col] y[col] for N rows
template <int N, typename R, typename V>
IST_INLINE void linear_rows(const R* w, int n_columns, const int32_t* columns, const int32_t* rows, const V* y, V* z) {
  V acc[N];
  for (int j = 0; j < N; ++j) acc[j] = z[rows[j]];
  for (int i = 0; i < n_columns; ++i) {
    const V in = y[columns[i]];
    for (int j = 0; j < N; ++j) acc[j] += in * w[j * n_columns + i];
  }
  for (int j = 0; j < N; ++j) z[rows[j]] = acc[j];
}

template <typename R>
void linear_forward(const LayerView<R>& layer, const R* weights, const typename Lane<R>::V* y, typename Lane<R>::V* z) {
  using V = typename Lane<R>::V;
  for (int o = 0; o < layer.out; ++o) z[o] = splat<V>(weights[layer.bias + o]);
  const R* w = weights + layer.weight;
  const int32_t* g = layer.groups;
  for (int n = 0; n < layer.n_groups; ++n) {
    const int n_rows = g[0], n_columns = g[1];
    const int32_t *rows = g + 2, *columns = rows + n_rows;
    int r = 0;
    for (; r + 8 <= n_rows; r += 8) linear_rows<8>(w + r * n_columns, n_columns, columns, rows + r, y, z);
    for (; r + 4 <= n_rows; r += 4) linear_rows<4>(w + r * n_columns, n_columns, columns, rows + r, y, z);
    for (; r < n_rows; ++r) linear_rows<1>(w + r * n_columns, n_columns, columns, rows + r, y, z);
    w += n_rows * n_columns;
    g = columns + n_columns;
  }
}

// d_y += Wᵀ d_z (unless null); d_w[value] += d_z ⊗ y and d_b += d_z, lane by lane (unless null).
template <typename R>
void linear_backward(const LayerView<R>& layer, const R* weights, const typename Lane<R>::V* y,
                     const typename Lane<R>::V* d_z, typename Lane<R>::V* d_y, typename Lane<R>::V* d_w,
                     typename Lane<R>::V* d_b) {
  using V = typename Lane<R>::V;
  if (d_b)
    for (int o = 0; o < layer.out; ++o) d_b[o] += d_z[o];
  const R* w = weights + layer.weight;
  const int32_t* g = layer.groups;
  for (int n = 0; n < layer.n_groups; ++n) {
    const int n_rows = g[0], n_columns = g[1];
    const int32_t *rows = g + 2, *columns = rows + n_rows;
    for (int i = 0; i < n_columns; ++i) {
      if (d_y) {
        V acc = d_y[columns[i]];
        for (int r = 0; r < n_rows; ++r) acc += d_z[rows[r]] * w[r * n_columns + i];
        d_y[columns[i]] = acc;
      }
      if (d_w) {
        const V in = y[columns[i]];
        for (int r = 0; r < n_rows; ++r) d_w[r * n_columns + i] += d_z[rows[r]] * in;
      }
    }
    w += n_rows * n_columns;
    if (d_w) d_w += n_rows * n_columns;
    g = columns + n_columns;
  }
}

// ---- activations of one channel, N samples at a time; a, inv: [N, c]; slopes [N]: φ′, kept for the reverse sweep

template <typename F, int N, typename R, typename V>
IST_INLINE void samples_forward(const R* a, const R* inv, int c, int active, int used, const V* z, V* y, V* slopes) {
  V x[N];
  for (int j = 0; j < N; ++j) x[j] = z[0] * a[j * c];
  for (int k = 1; k < active; ++k) {
    const V in = z[k];
    for (int j = 0; j < N; ++j) x[j] += in * a[j * c + k];
  }
  if (slopes)
    for (int j = 0; j < N; ++j) x[j] = F::both(x[j], slopes[j]);
  else
    for (int j = 0; j < N; ++j) x[j] = F::value(x[j]);
  for (int k = 0; k < used; ++k) {
    V acc = y[k];
    for (int j = 0; j < N; ++j) acc += x[j] * inv[j * c + k];
    y[k] = acc;
  }
}

template <int N, typename R, typename V>
IST_INLINE void samples_backward(const R* a, const R* inv, int c, int active, int used, const V* slopes, const V* d_y,
                                 V* d_z) {
  V g[N];
  for (int j = 0; j < N; ++j) g[j] = d_y[0] * inv[j * c];
  for (int k = 1; k < used; ++k) {
    const V in = d_y[k];
    for (int j = 0; j < N; ++j) g[j] += in * inv[j * c + k];
  }
  for (int j = 0; j < N; ++j) g[j] *= slopes[j];
  for (int k = 0; k < active; ++k) {
    V acc = d_z[k];
    for (int j = 0; j < N; ++j) acc += g[j] * a[j * c + k];
    d_z[k] = acc;
  }
}

// Calls f with blocks of at most 5 samples: f(constant of the block's size, first sample).
template <int N>
struct Count {
  static constexpr int value = N;
};
template <typename F>
IST_INLINE void sample_blocks(int n_samples, F f) {
  int s = 0;
  for (; s + 5 <= n_samples; s += 5) f(Count<5>{}, s);
  switch (n_samples - s) {
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

// ---- the difference quotient q(b, k) = (φ(b + k) − φ(b)) / k and its derivatives (see functions.py)

template <typename V>
struct Quotient {
  V q, q_b, q_k;
};

// ELU on one side of its kink: 1 where b >= 0, else e^b (e^k - 1) / k by the series of the latter, |k| <= 0.5.
template <typename R, typename V>
IST_INLINE Quotient<V> elu_mean(V b, V k) {
  constexpr R series[] = {R(1.0 / 3628800), R(1.0 / 362880), R(1.0 / 40320), R(1.0 / 5040), R(1.0 / 720),
                          R(1.0 / 120),     R(1.0 / 24),     R(1.0 / 6),     R(0.5),        R(1)};
  V value = splat<V>(series[0]), slope{};
  for (int j = 1; j < 10; ++j) {
    slope = slope * k + value;
    value = value * k + series[j];
  }
  const V e = lane_exp(lane_min(V{}, b));
  value *= e, slope *= e;
  return {b < 0 ? value : V{} + 1, b < 0 ? value : V{}, b < 0 ? slope : V{}};
}

// The mean of φ′ over [b, b + k] by 4-point Gauss quadrature.
template <typename F, typename R, typename V, bool kDerivatives>
IST_INLINE Quotient<V> quadrature_mean(V b, V k) {
  constexpr R t[4] = {R(0.06943184420297371), R(0.33000947820757187), R(0.66999052179242813), R(0.93056815579702629)};
  constexpr R w[4] = {R(0.17392742256872692), R(0.32607257743127307), R(0.32607257743127307), R(0.17392742256872692)};
  Quotient<V> mean{};
  for (int j = 0; j < 4; ++j) {
    mean.q += w[j] * F::prime(b + k * t[j]);
    if (!kDerivatives) continue;
    const V second = F::second(b + k * t[j]);
    mean.q_b += w[j] * second;
    mean.q_k += w[j] * t[j] * second;
  }
  return mean;
}

template <typename F, typename R, typename V, bool kDerivatives>
IST_INLINE Quotient<V> quotient(V b, V k) {
  auto direct = lane_abs(k) > Limits<R>::quotient;
  if (F::kinked) direct = direct | (((b < 0) != (b + k < 0)) & (k != 0));
  const V far = direct ? k : V{} + 1, near = direct ? V{} : k;
  const V difference = (F::value(b + far) - F::value(b)) / far;
  Quotient<V> mean;
  if constexpr (F::is_elu)
    mean = elu_mean<R>(b, near);
  else
    mean = quadrature_mean<F, R, V, kDerivatives>(b, near);
  Quotient<V> result;
  result.q = direct ? difference : mean.q;
  if (kDerivatives) {
    const V end = F::prime(b + far);
    result.q_b = direct ? (end - F::prime(b)) / far : mean.q_b;
    result.q_k = direct ? (end - difference) / far : mean.q_k;
  }
  return result;
}

// One channel near the origin: z and y of orders >= 1 (from coefficient `zero` on) divided by the radius r.
template <typename F, typename R, typename V>
void near_forward(const LayerView<R>& layer, int c, int zero, int used, V r, const V* z, V* y) {
  for (int k = 0; k < used; ++k) y[k] = V{};
  for (int s = 0; s < layer.n_samples; ++s) {
    const R *a = layer.samples + s * c, *inv = layer.inverse_t + s * c;
    V u0{}, w{};
    for (int k = 0; k < zero; ++k) u0 += z[k] * a[k];
    for (int k = zero; k < layer.active; ++k) w += z[k] * a[k];
    const V d = w * quotient<F, R, V, false>(u0, r * w).q;
    const V value = F::value(u0) + r * d;
    for (int k = 0; k < used; ++k) y[k] += (k < zero ? value : d) * inv[k];
  }
}

template <typename F, typename R, typename V>
void near_backward(const LayerView<R>& layer, int c, int zero, int used, V r, const V* z, const V* d_y, V* d_z,
                   V& d_r) {
  for (int k = 0; k < layer.active; ++k) d_z[k] = V{};
  for (int s = 0; s < layer.n_samples; ++s) {
    const R *a = layer.samples + s * c, *inv = layer.inverse_t + s * c;
    V u0{}, w{}, g0{}, g1{};
    for (int k = 0; k < zero; ++k) u0 += z[k] * a[k];
    for (int k = zero; k < layer.active; ++k) w += z[k] * a[k];
    for (int k = 0; k < used; ++k) (k < zero ? g0 : g1) += d_y[k] * inv[k];
    const Quotient<V> q = quotient<F, R, V, true>(u0, r * w);
    const V d_d = r * g0 + g1;
    d_r += w * q.q * g0 + d_d * w * w * q.q_k;
    const V d_u0 = F::prime(u0) * g0 + d_d * w * q.q_b, d_w = d_d * (q.q + r * w * q.q_k);
    for (int k = 0; k < layer.active; ++k) d_z[k] += (k < zero ? d_u0 : d_w) * a[k];
  }
}

// ---- activations of all channels

template <typename R>
struct Activation {
  using V = typename Lane<R>::V;
  const LayerView<R>& layer;
  int channels, c, zero, used;  // zero: coefficients of order 0, or c where nothing is divided by the radius
  V radius, inverse;            // in regular frames
  bool near;                    // some lane's radius is small
  V* scratch;                   // [c]
  V* slopes;                    // [channels, n_samples] φ′, or null
};

template <typename F, typename R>
void activation_forward(const Activation<R>& t, const typename Lane<R>::V* z, typename Lane<R>::V* y) {
  using V = typename Lane<R>::V;
  const LayerView<R>& layer = t.layer;
  for (int w = 0; w < t.channels; ++w, z += t.c, y += t.c) {
    for (int k = t.used; k < t.c; ++k) y[k] = V{};
    if (t.near) {
      near_forward<F>(layer, t.c, t.zero, t.used, t.radius, z, y);
      continue;
    }
    V* in = t.scratch;
    for (int k = 0; k < layer.active; ++k) in[k] = k < t.zero ? z[k] : z[k] * t.radius;
    for (int k = 0; k < t.used; ++k) y[k] = V{};
    sample_blocks(layer.n_samples, [&](auto n, int s) {
      samples_forward<F, decltype(n)::value>(layer.samples + s * t.c, layer.inverse_t + s * t.c, t.c, layer.active,
                                             t.used, in, y, t.slopes ? t.slopes + w * layer.n_samples + s : nullptr);
    });
    for (int k = t.zero; k < t.used; ++k) y[k] *= t.inverse;
  }
}

// d_z from d_y; d_r += the radius' gradient in regular frames.
template <typename F, typename R>
void activation_backward(const Activation<R>& t, const typename Lane<R>::V* z, const typename Lane<R>::V* y,
                         const typename Lane<R>::V* d_y, typename Lane<R>::V* d_z, typename Lane<R>::V& d_r) {
  using V = typename Lane<R>::V;
  const LayerView<R>& layer = t.layer;
  for (int w = 0; w < t.channels; ++w, z += t.c, y += t.c, d_y += t.c, d_z += t.c) {
    for (int k = layer.active; k < t.c; ++k) d_z[k] = V{};
    if (t.near) {
      near_backward<F>(layer, t.c, t.zero, t.used, t.radius, z, d_y, d_z, d_r);
      continue;
    }
    V* d_out = t.scratch;
    for (int k = 0; k < layer.active; ++k) d_z[k] = V{};
    for (int k = 0; k < t.used; ++k) d_out[k] = k < t.zero ? d_y[k] : d_y[k] * t.inverse;
    sample_blocks(layer.n_samples, [&](auto n, int s) {
      samples_backward<decltype(n)::value>(layer.samples + s * t.c, layer.inverse_t + s * t.c, t.c, layer.active,
                                           t.used, t.slopes + w * layer.n_samples + s, d_out, d_z);
    });
    for (int k = t.zero; k < t.used; ++k) d_r -= d_out[k] * y[k];
    for (int k = t.zero; k < layer.active; ++k) {
      d_r += d_z[k] * z[k];
      d_z[k] *= t.radius;
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
  const PlanView<R>* p;
  const R* weights;
  V *z, *y;      // per layer: [out] pre-activations and activations, one layer after the other
  V *d_z, *d_y;  // one layer each, the widest
  V *d_w, *d_b;  // per layer, summed over all tiles of a thread
  V* scratch;
  V* slopes;  // per layer [channels, n_samples]; null in the forward direction
  int64_t size_z, size_w, size_slopes;

  void place(Arena& arena, const PlanView<R>& plan, const R* packed, bool backward) {
    p = &plan, weights = packed, size_z = size_w = size_slopes = 0, slopes = nullptr;
    int64_t widest = 1;
    for (int n = 0; n < p->n_layers; ++n) {
      const int64_t out = p->layers[n].out;
      size_z += out, size_w += p->layers[n].n_values;
      size_slopes += out / p->c * p->layers[n].n_samples;
      widest = out > widest ? out : widest;
    }
    arena.take(z, size_z), arena.take(y, size_z), arena.take(scratch, p->c);
    if (!backward) return;
    arena.take(d_z, widest), arena.take(d_y, widest), arena.take(d_w, size_w), arena.take(d_b, size_z);
    arena.take(slopes, size_slopes);
  }

  Activation<R> activation(int n, const Edges<R>& e, bool all, V* layer_slopes) const {
    const LayerView<R>& layer = p->layers[n];
    bool near = false;
    if (p->regular)
      for (int l = 0; l < Lane<R>::L; ++l) near |= !(e.radius[l] >= Limits<R>::near);
    return {layer,
            layer.out / p->c,
            p->c,
            p->regular ? p->order_zero : p->c,
            all ? p->c : layer.used,
            e.radius,
            e.inverse,
            near,
            scratch,
            layer_slopes};
  }

  // Activations of layers 0 .. last; with `all`, every coefficient of each. Returns those of the last one.
  const V* forward(const Edges<R>& e, int last, bool all) {
    const V* in = e.inputs;
    V *z_n = z, *y_n = y, *slopes_n = slopes;
    for (int n = 0; n <= last; ++n) {
      const LayerView<R>& layer = p->layers[n];
      linear_forward(layer, weights, in, z_n);
      const Activation<R> act = activation(n, e, all, slopes_n);
      with_function<R>(p->function, [&](auto f) { activation_forward<decltype(f)>(act, z_n, y_n); });
      in = y_n;
      z_n += layer.out, y_n += layer.out;
      if (slopes) slopes_n += act.channels * layer.n_samples;
    }
    return in;
  }

  // From d_y of the last layer (in this->d_y): d_w, d_b, and with `inputs` e.d_inputs and e.d_radius.
  void backward(Edges<R>& e, bool need_weights, bool need_inputs) {
    V *z_n = z + size_z, *y_n = y + size_z, *d_w_n = d_w + size_w, *d_b_n = d_b + size_z;
    V* slopes_n = slopes + size_slopes;
    for (int n = p->n_layers - 1; n >= 0; --n) {
      const LayerView<R>& layer = p->layers[n];
      z_n -= layer.out, y_n -= layer.out, d_w_n -= layer.n_values, d_b_n -= layer.out;
      slopes_n -= layer.out / p->c * layer.n_samples;
      const Activation<R> act = activation(n, e, false, slopes_n);
      with_function<R>(p->function,
                       [&](auto f) { activation_backward<decltype(f)>(act, z_n, y_n, d_y, d_z, e.d_radius); });
      const V* in = n > 0 ? y_n - p->layers[n - 1].out : e.inputs;
      V* d_in = n > 0 ? d_y : need_inputs ? e.d_inputs : nullptr;
      if (d_in)
        for (int k = 0; k < layer.in; ++k) d_in[k] = V{};
      linear_backward(layer, weights, in, d_z, d_in, need_weights ? d_w_n : nullptr, need_weights ? d_b_n : nullptr);
    }
  }
};

}  // namespace implicit_steer::IST_ISA
