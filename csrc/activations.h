// φ of the kernel MLP with its derivatives, and the sigmoid; on lanes and on dual numbers of lanes.
#pragma once

#include "dual.h"

namespace implicit_steer::IST_ISA {

template <typename V>
IST_INLINE V sigmoid(V x) {
  return 1 / (1 + lane_exp(-x));
}

// Not by the rules of its parts, whose tangents are too large for a number where e^-x almost is.
template <typename A>
IST_INLINE Dual<A> sigmoid(Dual<A> x) {
  const A s = sigmoid(x.value);
  return {s, s * (1 - s) * x.tangent};
}

// ---- φ, φ′ and φ″, and φ with φ′ together; `kinked`: φ, φ′ or φ″ jumps at 0

struct Elu {
  static constexpr IST_LANES bool kinked() { return true; }
  static constexpr bool is_elu = true;
  template <typename V>
  static IST_INLINE V value(V x) {
    return lane_elu(x);
  }
  template <typename V>
  static IST_INLINE V prime(V x) {
    return lane_exp(lane_min(V{}, x));
  }
  template <typename V>
  static IST_INLINE V both(V x, V& slope) {
    const V y = lane_elu(x);
    slope = select(x > 0, V{} + 1, y + 1);
    return y;
  }
  template <typename V>
  static IST_INLINE V second(V x) {
    const V e = lane_exp(lane_min(V{}, x));
    return select(x > 0, V{}, e);
  }
};

struct Relu {
  static constexpr IST_LANES bool kinked() { return true; }
  static constexpr bool is_elu = false;
  template <typename V>
  static IST_INLINE V value(V x) {
    return lane_max(V{}, x);
  }
  template <typename V>
  static IST_INLINE V prime(V x) {
    return select(x > 0, V{} + 1, V{});
  }
  template <typename V>
  static IST_INLINE V both(V x, V& slope) {
    slope = prime(x);
    return value(x);
  }
  template <typename V>
  static IST_INLINE V second(V) {
    return V{};
  }
};

struct Silu {
  static constexpr IST_LANES bool kinked() { return false; }
  static constexpr bool is_elu = false;
  template <typename V>
  static IST_INLINE V value(V x) {
    return x * sigmoid(x);
  }
  template <typename V>
  static IST_INLINE V prime(V x) {
    const V s = sigmoid(x);
    return s * (1 + x * (1 - s));
  }
  template <typename V>
  static IST_INLINE V both(V x, V& slope) {
    const V s = sigmoid(x);
    slope = s * (1 + x * (1 - s));
    return x * s;
  }
  template <typename V>
  static IST_INLINE V second(V x) {
    const V s = sigmoid(x);
    return s * (1 - s) * (2 + x * (1 - 2 * s));
  }
};

struct Gelu {
  static constexpr IST_LANES bool kinked() { return false; }
  static constexpr bool is_elu = false;
  template <typename V>
  static IST_INLINE V normal(V x) {  // standard normal density
    using R = Real<V>;
    return R(0.3989422804014326779) * lane_exp(R(-0.5) * x * x);
  }
  template <typename V>
  static IST_INLINE V cumulative(V x) {
    using R = Real<V>;
    return R(0.5) * (1 + lane_erf(x * R(0.70710678118654752440)));
  }
  template <typename V>
  static IST_INLINE V value(V x) {
    return x * cumulative(x);
  }
  template <typename V>
  static IST_INLINE V prime(V x) {
    return cumulative(x) + x * normal(x);
  }
  template <typename V>
  static IST_INLINE V both(V x, V& slope) {
    const V c = cumulative(x);
    slope = c + x * normal(x);
    return x * c;
  }
  template <typename V>
  static IST_INLINE V second(V x) {
    return normal(x) * (2 - x * x);
  }
};

struct Tanh {
  static constexpr IST_LANES bool kinked() { return false; }
  static constexpr bool is_elu = false;
  template <typename V>
  static IST_INLINE V value(V x) {
    const V e = lane_exp(-2 * lane_abs(x));
    const V t = (1 - e) / (1 + e);
    return select(x < 0, -t, t);
  }
  template <typename V>
  static IST_INLINE V prime(V x) {
    const V t = value(x);
    return 1 - t * t;
  }
  template <typename V>
  static IST_INLINE V both(V x, V& slope) {
    const V t = value(x);
    slope = 1 - t * t;
    return t;
  }
  template <typename V>
  static IST_INLINE V second(V x) {
    const V t = value(x);
    return -2 * t * (1 - t * t);
  }
};

}  // namespace implicit_steer::IST_ISA
