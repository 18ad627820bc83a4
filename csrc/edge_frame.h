// L edges: their frame, the MLP's inputs in it, the way back of the hidden features, the radial factor; and the reverse
// sweep of each. The mathematics and its names are those of ops/kernel_mlp.py.
#pragma once

#include "activations.h"
#include "plan.h"

namespace implicit_steer::IST_ISA {

// Hands out pieces of one block of memory, 64-byte aligned; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename T>
  void take(T*& pointer, int64_t n) {
    pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);
    used += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
};

template <typename R>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float near = 0.1f, softening = 1e-10f, zero = 1e-24f, quotient = 0.5f;
};
template <>
struct Limits<double> {
  static constexpr double near = 0.01, softening = 1e-18, zero = 1e-100, quotient = 0.05;
};

template <typename R>
struct Edges {
  using V = typename Lane<R>::V;
  V* delta;                  // [dim]
  V *attr, *rotated;         // [A] as given; times the frame's matrix
  V* inputs;                 // [n_inputs]
  V squared;                 // |x|²
  bool near_origin = false;  // regular frames: hidden coefficients of orders >= 1 are carried divided by the radius
  V scale;                   // of tables: u / r
  V radius, inverse;         // softened, or safe_norm in planar frames that are not regular; 1 / radius (0 at 0)
  V* unit;                   // zonal: x / radius; planar: cos φ, sin φ
  V* plane;                  // planar: x in the plane
  V factor;                  // γ s(|x|)
  V* power;                  // planar: cos kφ, sin kφ [2, max_power + 1]
  V* monomial;               // [n_monomials]
  // The way back from the frame, [d]: coordinate m of a hidden field is first[m] times the coefficient that makes it;
  // in planar frames plus second[m] times that coefficient's partner. Zonal: first is the solid harmonic; planar: first
  // is cos kφ and second is sign · sin kφ.
  V *first, *second;
  // gradients
  V *d_inputs, *d_first, *d_second, *d_monomial, *d_rotated;
  V* d_unit;  // [3] zonal
  V d_radius, d_factor;
  V *d_delta, *d_attr;  // [dim], [A]
  V d_shell;            // σ³ times the gradient of σ, summed over all tiles of a block

  template <typename A>
  IST_LANES void place(A& arena, const PlanView<Real<R>>& p, bool backward) {
    arena.take(delta, 3), arena.take(unit, 3), arena.take(plane, 2);
    arena.take(attr, p.n_attr), arena.take(rotated, p.n_attr), arena.take(inputs, p.n_inputs);
    arena.take(power, 2 * (p.max_power + 1)), arena.take(monomial, p.n_monomials);
    arena.take(first, p.d), arena.take(second, p.d);
    if (!backward) return;
    arena.take(d_inputs, p.n_inputs), arena.take(d_first, p.d), arena.take(d_second, p.d);
    arena.take(d_monomial, p.n_monomials), arena.take(d_rotated, p.n_attr), arena.take(d_attr, p.n_attr);
    arena.take(d_delta, 3), arena.take(d_unit, 3);
  }
};

// |x|, exactly 0 (as its inverse) where |x|² would underflow.
template <typename R, typename V>
IST_INLINE void safe_norm(V squared, V& norm, V& inverse) {
  const auto nonzero = squared > Limits<Real<R>>::zero;
  norm = lane_sqrt(select(nonzero, squared, V{} + 1));
  inverse = select(nonzero, 1 / norm, V{});
  norm = select(nonzero, norm, select(squared != squared, squared, V{}));  // NaN stays
}

// γ times the Gaussian shell times the cutoff 1 − 10 t³ + 15 t⁴ − 6 t⁵.
template <typename R>
IST_LANES void radial_forward(const PlanView<Real<R>>& p, R shell, Edges<R>& e) {
  using V = typename Lane<R>::V;
  e.factor = p.gamma * lane_exp(e.squared * (Real<R>(-0.5) / (shell * shell)));
  if (!p.has_cutoff) return;
  V norm, inverse;
  safe_norm<R>(e.squared, norm, inverse);
  const V t = lane_min(V{} + 1, norm * (1 / p.cutoff));
  e.factor *= 1 - t * t * t * (10 - t * (15 - 6 * t));
}

template <typename R>
IST_LANES void radial_backward(const PlanView<Real<R>>& p, R shell, Edges<R>& e) {
  using V = typename Lane<R>::V;
  const R exponent = Real<R>(-0.5) / (shell * shell);
  V slope = e.d_factor * e.factor * (2 * exponent);  // ∂L/∂(|x|²/2) of the shell
  e.d_shell += e.d_factor * e.factor * e.squared;
  if (p.has_cutoff) {
    V norm, inverse;
    safe_norm<R>(e.squared, norm, inverse);
    const V t = lane_min(V{} + 1, norm * (1 / p.cutoff));
    const V gauss = p.gamma * lane_exp(e.squared * exponent);
    slope += e.d_factor * gauss * (-30 * t * t * (1 - t) * (1 - t)) * (1 / p.cutoff) * inverse;
  }
  IST_ROLLED for (int k = 0; k < p.dim; ++k) e.d_delta[k] += slope * e.delta[k];
}

// ---- attributes

// rotated = attributeᵀ attr
template <typename R>
IST_LANES void attributes_forward(const PlanView<Real<R>>& p, Edges<R>& e) {
  for (int j = 0; j < p.n_attr; ++j) {
    if (p.attribute_identity) {
      e.rotated[j] = e.attr[j];
      continue;
    }
    e.rotated[j] = typename Lane<R>::V{};
    for (int i = 0; i < p.n_attr; ++i) e.rotated[j] += e.attr[i] * p.attribute[i * p.n_attr + j];
  }
}

template <typename R>
IST_LANES void attributes_backward(const PlanView<Real<R>>& p, Edges<R>& e) {
  for (int i = 0; i < p.n_attr; ++i) {
    if (p.attribute_identity) {
      e.d_attr[i] = e.d_rotated[i];
      continue;
    }
    e.d_attr[i] = typename Lane<R>::V{};
    IST_ROLLED for (int j = 0; j < p.n_attr; ++j) e.d_attr[i] += e.d_rotated[j] * p.attribute[i * p.n_attr + j];
  }
}

// ---- tables: v = x u(r) / r stands in place of the direction, which makes the harmonics solid ones; |v| = u in place
// of the radius. u = r / length where the table is bounded, else t (1 + t²)^(-1/4) with t = r / length.

template <typename R>
IST_LANES void compress(const PlanView<Real<R>>& p, const typename Lane<R>::V* x, int dim, Edges<R>& e) {
  using V = typename Lane<R>::V;
  e.scale = V{} + p.per_length;
  if (!p.bounded) e.scale = e.scale / lane_sqrt(lane_sqrt(1 + e.squared * (p.per_length * p.per_length)));
  for (int k = 0; k < dim; ++k) e.unit[k] = x[k] * e.scale;
  e.radius = lane_sqrt(e.squared * e.scale * e.scale + Limits<Real<R>>::softening), e.inverse = 1 / e.radius;
}

// d_x += the gradient by way of v (d_v, which it overwrites) and of u (e.d_radius).
template <typename R>
IST_LANES void compress_backward(const PlanView<Real<R>>& p, const Edges<R>& e, const typename Lane<R>::V* x, int dim,
                                 typename Lane<R>::V* d_v, typename Lane<R>::V* d_x) {
  using V = typename Lane<R>::V;
  V along{};
  for (int k = 0; k < dim; ++k) d_v[k] += e.d_radius * e.unit[k] * e.inverse, along += x[k] * d_v[k];
  if (!p.bounded) along *= -Real<R>(0.5) / (e.squared + p.length * p.length);
  for (int k = 0; k < dim; ++k) d_x[k] += e.scale * (p.bounded ? d_v[k] : d_v[k] + along * x[k]);
}

// ---- zonal: solid harmonics

// Everything but the harmonics and the monomials that they are sums of.
template <typename R>
IST_LANES void zonal_inputs(const PlanView<Real<R>>& p, Edges<R>& e) {
  using V = typename Lane<R>::V;
  if (p.n_knots) {
    compress(p, e.delta, 3, e);
  } else {
    e.radius = lane_sqrt(e.squared + Limits<Real<R>>::softening), e.inverse = 1 / e.radius;
    for (int k = 0; k < 3; ++k) e.unit[k] = e.delta[k] * e.inverse;
  }
  e.monomial[0] = V{} + 1;
  e.inputs[0] = e.near_origin ? V{} + 1 : e.radius;
  for (int j = 0; j < p.n_attr; ++j) e.inputs[1 + j] = e.rotated[j];
}

// Monomial j > 0, from an earlier one.
template <typename R>
IST_LANES void set_monomial(const PlanView<Real<R>>& p, Edges<R>& e, int j) {
  e.monomial[j] = e.monomial[p.monomial[2 * j]] * e.unit[p.monomial[2 * j + 1]];
}

// Whether harmonic m is carried times the radius, which makes it linear in x.
template <typename R>
IST_LANES bool is_linear(const PlanView<Real<R>>& p, const Edges<R>& e, int m) {
  return e.near_origin && p.degree[m] == 1;
}

// Term j of the harmonics: a coefficient times its monomial.
template <typename R>
IST_LANES typename Lane<R>::V harmonic_term(const PlanView<Real<R>>& p, const Edges<R>& e, int j, bool linear) {
  const int n = p.harmonic[2 * j + 1];
  return (linear ? e.delta[p.monomial[2 * n + 1]] : e.monomial[n]) * p.harmonic_value[j];
}

// Harmonic m, the sum of its terms.
template <typename R>
IST_LANES void set_harmonic(const PlanView<Real<R>>& p, Edges<R>& e, int m, typename Lane<R>::V sum) {
  e.first[m] = e.near_origin && p.degree[m] > 1 ? sum * e.radius : sum;
}

template <typename R>
IST_LANES void zonal_forward(const PlanView<Real<R>>& p, Edges<R>& e, bool all) {
  const int n_monomials = all ? p.n_monomials : p.used_monomials;
  const int n_harmonics = all ? p.n_harmonics : p.used_harmonics;
  zonal_inputs(p, e);
  for (int j = 1; j < n_monomials; ++j) set_monomial(p, e, j);
  for (int j = 0; j < n_harmonics;) {
    const int m = p.harmonic[2 * j];
    const bool linear = is_linear(p, e, m);
    typename Lane<R>::V sum{};
    for (; j < n_harmonics && p.harmonic[2 * j] == m; ++j) sum += harmonic_term(p, e, j, linear);
    set_harmonic(p, e, m, sum);
  }
}

template <typename R>
IST_LANES void zonal_backward(const PlanView<Real<R>>& p, Edges<R>& e) {
  using V = typename Lane<R>::V;
  IST_ROLLED for (int j = 0; j < p.n_attr; ++j) e.d_rotated[j] = e.d_inputs[1 + j];
  IST_ROLLED for (int j = 0; j < p.used_monomials; ++j) e.d_monomial[j] = V{};
  if (!e.near_origin) e.d_radius += e.d_inputs[0];
  IST_ROLLED for (int m = 0; m < p.d && e.near_origin; ++m) if (p.degree[m] > 1) {
    e.d_radius += e.d_first[m] * e.first[m] * e.inverse;
    e.d_first[m] *= e.radius;
  }
  IST_ROLLED for (int j = 0; j < p.used_harmonics; ++j) {
    const int m = p.harmonic[2 * j], n = p.harmonic[2 * j + 1];
    const V g = e.d_first[m] * p.harmonic_value[j];
    if (e.near_origin && p.degree[m] == 1)
      e.d_delta[p.monomial[2 * n + 1]] += g;
    else
      e.d_monomial[n] += g;
  }
  V* const d_unit = e.d_unit;  // in memory, as it is indexed by data
  IST_ROLLED for (int k = 0; k < 3; ++k) d_unit[k] = V{};
  IST_ROLLED for (int j = p.used_monomials - 1; j > 0; --j) {
    const int earlier = p.monomial[2 * j], k = p.monomial[2 * j + 1];
    d_unit[k] += e.d_monomial[j] * e.monomial[earlier];
    e.d_monomial[earlier] += e.d_monomial[j] * e.unit[k];
  }
  if (p.n_knots) return compress_backward(p, e, e.delta, 3, d_unit, e.d_delta);
  IST_ROLLED for (int k = 0; k < 3; ++k) e.d_radius -= d_unit[k] * e.unit[k] * e.inverse;
  IST_ROLLED for (int k = 0; k < 3; ++k) e.d_delta[k] += d_unit[k] * e.inverse + e.d_radius * e.unit[k];
}

// ---- planar: rotation by the azimuth

// cos kφ, sin kφ for k = 0 .. max_power from unit = (cos φ, sin φ), in power[0 ..] and power[width ..].
template <typename R>
IST_LANES void multiples(const PlanView<Real<R>>& p, Edges<R>& e) {
  using V = typename Lane<R>::V;
  V *cosines = e.power, *sines = e.power + p.max_power + 1;
  cosines[0] = V{} + 1, sines[0] = V{};
  for (int k = 1; k <= p.max_power; ++k) {
    cosines[k] = cosines[k - 1] * e.unit[0] - sines[k - 1] * e.unit[1];
    sines[k] = sines[k - 1] * e.unit[0] + cosines[k - 1] * e.unit[1];
  }
}

// On the axis the azimuth is that of the first nonzero attribute of order 1 (a constant), or 0.
template <typename R>
IST_LANES void attribute_direction(const PlanView<Real<R>>& p, Edges<R>& e) {
  using V = typename Lane<R>::V;
  V direction[2] = {V{} + 1, V{}};
  for (int m = p.n_attr - 1; m >= 0; --m) {
    if (p.attribute_order[m] != 1 || !(p.attribute_sign[m] < 0)) continue;
    const V a = e.rotated[m], b = e.rotated[p.attribute_partner[m]];
    V norm, inverse;
    safe_norm<R>(a * a + b * b, norm, inverse);
    direction[0] = select(norm > 0, constant_of(a * inverse), direction[0]);
    direction[1] = select(norm > 0, constant_of(b * inverse), direction[1]);
  }
  e.unit[0] = select(e.radius > 0, e.unit[0], direction[0]);
  e.unit[1] = select(e.radius > 0, e.unit[1], direction[1]);
}

// The direction in the plane, (cos φ, sin φ).
template <typename R>
IST_LANES void planar_direction(const PlanView<Real<R>>& p, Edges<R>& e) {
  const typename Lane<R>::V squared = e.plane[0] * e.plane[0] + e.plane[1] * e.plane[1];
  if (p.regular) {
    e.radius = lane_sqrt(squared + Limits<Real<R>>::softening), e.inverse = 1 / e.radius;
  } else {
    safe_norm<R>(squared, e.radius, e.inverse);
  }
  for (int k = 0; k < 2; ++k) e.unit[k] = e.plane[k] * e.inverse;
  if (!p.regular) attribute_direction(p, e);
}

template <typename R>
IST_LANES void planar_forward(const PlanView<Real<R>>& p, Edges<R>& e) {
  using V = typename Lane<R>::V;
  for (int k = 0; k < 2; ++k) {
    e.plane[k] = V{};
    for (int i = 0; i < p.dim; ++i) e.plane[k] += e.delta[i] * p.plane[2 * i + k];
  }
  if (p.n_knots)
    compress(p, e.plane, 2, e);
  else
    planar_direction(p, e);
  multiples(p, e);
  const V *cosines = e.power, *sines = e.power + p.max_power + 1;
  V* next = e.inputs;
  if (p.regular) {
    *next++ = e.near_origin ? V{} + 1 : e.radius;
  } else {  // (radius, 0); on the axis x itself in the constant frame
    *next++ = e.unit[0] * e.plane[0] + e.unit[1] * e.plane[1];
    *next++ = e.unit[0] * e.plane[1] - e.unit[1] * e.plane[0];
  }
  for (int k = 0; k < p.dim - 2; ++k, ++next) {
    *next = V{};
    for (int i = 0; i < p.dim; ++i) *next += e.delta[i] * p.axis[i * (p.dim - 2) + k];
  }
  V* turned = next;
  for (int m = 0; m < p.n_attr; ++m) {
    const int k = p.attribute_order[m];
    turned[m] = cosines[k] * e.rotated[m] - sines[k] * p.attribute_sign[m] * e.rotated[p.attribute_partner[m]];
  }
  for (int m = 0; m < p.c; ++m) {
    const int k = p.order[m];
    const V scale = e.near_origin && k > 0 ? e.radius : V{} + 1;
    e.first[m] = e.near_origin && k == 1 ? e.plane[0] : scale * cosines[k];
    e.second[m] = (e.near_origin && k == 1 ? e.plane[1] : scale * sines[k]) * p.sign[m];
  }
}

template <typename R>
IST_LANES void planar_backward(const PlanView<Real<R>>& p, Edges<R>& e) {
  using V = typename Lane<R>::V;
  const V *cosines = e.power, *sines = e.power + p.max_power + 1;
  V d_plane[2] = {}, d_unit[2] = {};
  // cos kφ + i sin kφ = (c + i s)^k, of derivative k (c + i s)^(k − 1)
  const auto reverse = [&](int k, V d_cos, V d_sin) {
    if (k == 0) return;
    d_unit[0] += Real<R>(k) * (d_cos * cosines[k - 1] + d_sin * sines[k - 1]);
    d_unit[1] += Real<R>(k) * (d_sin * cosines[k - 1] - d_cos * sines[k - 1]);
  };
  IST_ROLLED for (int m = 0; m < p.c; ++m) {
    const int k = p.order[m];
    V d_cos = e.d_first[m], d_sin = e.d_second[m] * p.sign[m];
    if (e.near_origin && k == 1) {
      d_plane[0] += d_cos, d_plane[1] += d_sin;
      continue;
    }
    if (e.near_origin && k > 0) {
      e.d_radius += d_cos * cosines[k] + d_sin * sines[k];
      d_cos *= e.radius, d_sin *= e.radius;
    }
    reverse(k, d_cos, d_sin);
  }
  const V *d_axis = e.d_inputs + (p.regular ? 1 : 2), *d_turned = d_axis + p.dim - 2;
  IST_ROLLED for (int m = 0; m < p.n_attr; ++m) e.d_rotated[m] = V{};
  IST_ROLLED for (int m = 0; m < p.n_attr; ++m) {
    const int k = p.attribute_order[m], other = p.attribute_partner[m];
    const Real<R> sign = p.attribute_sign[m];
    e.d_rotated[m] += cosines[k] * d_turned[m];
    e.d_rotated[other] -= sines[k] * sign * d_turned[m];
    reverse(k, d_turned[m] * e.rotated[m], d_turned[m] * e.rotated[other] * -sign);
  }
  IST_ROLLED for (int k = 0; k < p.dim - 2; ++k) IST_ROLLED for (int i = 0; i < p.dim; ++i) e.d_delta[i] +=
      d_axis[k] * p.axis[i * (p.dim - 2) + k];
  if (p.regular && !e.near_origin) e.d_radius += e.d_inputs[0];
  if (!p.regular) {  // the second input's derivative: 0 off the axis, where the frame turns with x
    const V d_across = select(e.radius > 0, V{}, e.d_inputs[1]);
    d_plane[0] += e.unit[0] * e.d_inputs[0] - e.unit[1] * d_across;
    d_plane[1] += e.unit[1] * e.d_inputs[0] + e.unit[0] * d_across;
  }
  if (p.n_knots) {
    compress_backward(p, e, e.plane, 2, d_unit, d_plane);
  } else {  // e.inverse is 0 where the direction is not that of x
    e.d_radius -= (d_unit[0] * e.unit[0] + d_unit[1] * e.unit[1]) * e.inverse;
    IST_UNROLLED for (int k = 0; k < 2; ++k) d_plane[k] += d_unit[k] * e.inverse + e.d_radius * e.plane[k] * e.inverse;
  }
  IST_ROLLED for (int i = 0; i < p.dim; ++i) e.d_delta[i] +=
      d_plane[0] * p.plane[2 * i] + d_plane[1] * p.plane[2 * i + 1];
}

// ---- all frames

// From delta and attr; with `all`, every harmonic, not only those that the couplings read.
template <typename R>
IST_LANES void frame_forward(const PlanView<Real<R>>& p, R shell, Edges<R>& e, bool all) {
  e.squared = typename Lane<R>::V{};
  for (int k = 0; k < p.dim; ++k) e.squared += e.delta[k] * e.delta[k];
  radial_forward(p, shell, e);
  attributes_forward(p, e);
  if (p.kind == kZonal) return zonal_forward(p, e, all);
  if (p.kind == kPlanar) return planar_forward(p, e);
  for (int k = 0; k < p.dim; ++k) e.inputs[k] = e.delta[k];
  for (int j = 0; j < p.n_attr; ++j) e.inputs[p.dim + j] = e.rotated[j];
}

// d_delta and d_attr from d_inputs, d_first, d_second, d_radius and d_factor.
template <typename R>
IST_LANES void frame_backward(const PlanView<Real<R>>& p, R shell, Edges<R>& e) {
  IST_ROLLED for (int k = 0; k < p.dim; ++k) e.d_delta[k] = typename Lane<R>::V{};
  radial_backward(p, shell, e);
  if (p.kind == kZonal) {
    zonal_backward(p, e);
  } else if (p.kind == kPlanar) {
    planar_backward(p, e);
  } else {
    IST_ROLLED for (int k = 0; k < p.dim; ++k) e.d_delta[k] += e.d_inputs[k];
    IST_ROLLED for (int j = 0; j < p.n_attr; ++j) e.d_rotated[j] = e.d_inputs[p.dim + j];
  }
  attributes_backward(p, e);
}

// Planar: hidden coordinate m of a channel with coefficients y [c] at an edge with `first` and `second`.
template <typename R, typename V>
IST_INLINE V turned(const PlanView<R>& p, const V* first, const V* second, const V* y, int m) {
  return first[m] * y[m] + second[m] * y[p.partner[m]];
}

// h[w, m] of all channels
template <typename R>
IST_LANES void expand_forward(const PlanView<Real<R>>& p, const Edges<R>& e, const typename Lane<R>::V* y,
                              typename Lane<R>::V* h) {
  for (int w = 0; w < p.channels; ++w)
    for (int m = 0; m < p.c; ++m) h[w * p.c + m] = turned(p, e.first, e.second, y + w * p.c, m);
}

template <typename R>
IST_LANES void expand_backward(const PlanView<Real<R>>& p, Edges<R>& e, const typename Lane<R>::V* y,
                               const typename Lane<R>::V* d_h, typename Lane<R>::V* d_y) {
  using V = typename Lane<R>::V;
  IST_ROLLED for (int m = 0; m < p.c; ++m) e.d_first[m] = e.d_second[m] = V{};
  for (int k = 0; k < p.channels * p.c; ++k) d_y[k] = V{};
  IST_ROLLED for (int w = 0; w < p.channels; ++w) IST_ROLLED for (int m = 0; m < p.c; ++m) {
    const int here = w * p.c + m, other = w * p.c + p.partner[m];
    e.d_first[m] += d_h[here] * y[here];
    e.d_second[m] += d_h[here] * y[other];
    d_y[here] += d_h[here] * e.first[m];
    d_y[other] += d_h[here] * e.second[m];
  }
}

}  // namespace implicit_steer::IST_ISA
