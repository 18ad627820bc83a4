// Dual numbers value + ε tangent, ε² = 0, of single numbers, lanes or channels. Loops written for lanes run on them
// unchanged; their results then carry a derivative along one direction of all inputs. That of a gradient is the product
// of a Hessian and a vector: every second derivative that is needed, without a formula of its own.
#pragma once

#if defined(IST_SCALAR)
#include "cuda/lane.h"
#else
#include "erf.h"
#endif

namespace implicit_steer::IST_ISA {

template <typename T>
struct Dual {
  T value, tangent;
};

template <typename T>
struct Parts {
  using Plain = T;
  static constexpr bool dual = false;
};
template <typename T>
struct Parts<Dual<T>> {
  using Plain = T;
  static constexpr bool dual = true;
};
template <typename T>
constexpr bool is_dual = Parts<T>::dual;
template <typename T>
IST_INLINE auto first_number(T x) {
  if constexpr (sizeof(T) > sizeof(double))
    return x[0] + x[0];
  else
    return x;
}
// float or double, of a number, lanes or channels, dual or not.
template <typename T>
using Real = decltype(first_number(typename Parts<T>::Plain{}));

template <typename R>
struct Lane<Dual<R>> {
  using V = Dual<typename Lane<R>::V>;
  using Q = Dual<typename Lane<R>::Q>;
  static constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
};

// Memory of lanes is that of plain vectors, `kPlanes` of them each; what a loop gives out is in the last one.
template <typename R>
constexpr int kPlanes = is_dual<R> ? 2 : 1;
template <typename R>
IST_INLINE typename Lane<Real<R>>::V* plane(typename Lane<R>::V* lanes, int which) {
  return reinterpret_cast<typename Lane<Real<R>>::V*>(lanes) + which;
}
template <typename R>
IST_INLINE const typename Lane<Real<R>>::V* plane(const typename Lane<R>::V* lanes, int which) {
  return reinterpret_cast<const typename Lane<Real<R>>::V*>(lanes) + which;
}
// Without a tangent, as comparisons take it.
template <typename V>
IST_INLINE auto value_of(V x) {
  if constexpr (is_dual<V>)
    return x.value;
  else
    return x;
}
template <typename R>
IST_INLINE Real<R> result(R x) {
  if constexpr (is_dual<R>)
    return x.tangent;
  else
    return x;
}

// A constant as it enters operations with a T: numbers as T's own kind, so that integers can stand beside vectors.
template <typename T, typename B>
IST_INLINE auto constant(B b) {
  static_assert(!is_dual<B>);
  if constexpr (sizeof(B) > sizeof(double))
    return b;
  else
    return static_cast<Real<T>>(b);
}
// Keeps an overload to operands B that are no dual numbers.
template <bool>
struct Allow {};
template <>
struct Allow<true> {
  using Type = int;
};
#define IST_PLAIN(B) typename Allow<!is_dual<B>>::Type = 0

template <typename A>
IST_INLINE Dual<A> operator-(Dual<A> x) {
  return {-x.value, -x.tangent};
}
template <typename A, typename B>
IST_INLINE auto operator+(Dual<A> x, Dual<B> y) {
  return Dual<decltype(x.value + y.value)>{x.value + y.value, x.tangent + y.tangent};
}
template <typename A, typename B>
IST_INLINE auto operator-(Dual<A> x, Dual<B> y) {
  return Dual<decltype(x.value - y.value)>{x.value - y.value, x.tangent - y.tangent};
}
template <typename A, typename B>
IST_INLINE auto operator*(Dual<A> x, Dual<B> y) {
  return Dual<decltype(x.value * y.value)>{x.value * y.value, x.value * y.tangent + x.tangent * y.value};
}
template <typename A, typename B>
IST_INLINE auto operator/(Dual<A> x, Dual<B> y) {
  const auto ratio = x.value / y.value;
  return Dual<decltype(x.value / y.value)>{ratio, (x.tangent - ratio * y.tangent) / y.value};
}
template <typename A, typename B, IST_PLAIN(B)>
IST_INLINE Dual<A> operator+(Dual<A> x, B y) {
  return {x.value + constant<A>(y), x.tangent};
}
template <typename A, typename B, IST_PLAIN(B)>
IST_INLINE Dual<A> operator+(B x, Dual<A> y) {
  return {constant<A>(x) + y.value, y.tangent};
}
template <typename A, typename B, IST_PLAIN(B)>
IST_INLINE Dual<A> operator-(Dual<A> x, B y) {
  return {x.value - constant<A>(y), x.tangent};
}
template <typename A, typename B, IST_PLAIN(B)>
IST_INLINE Dual<A> operator-(B x, Dual<A> y) {
  return {constant<A>(x) - y.value, -y.tangent};
}
template <typename A, typename B, IST_PLAIN(B)>
IST_INLINE auto operator*(Dual<A> x, B y) {
  const auto factor = constant<A>(y);
  return Dual<decltype(x.value * factor)>{x.value * factor, x.tangent * factor};
}
template <typename A, typename B, IST_PLAIN(B)>
IST_INLINE auto operator*(B x, Dual<A> y) {
  return y * x;
}
template <typename A, typename B, IST_PLAIN(B)>
IST_INLINE Dual<A> operator/(Dual<A> x, B y) {
  return {x.value / constant<A>(y), x.tangent / constant<A>(y)};
}
template <typename A, typename B, IST_PLAIN(B)>
IST_INLINE Dual<A> operator/(B x, Dual<A> y) {
  const A ratio = constant<A>(x) / y.value;
  return {ratio, -ratio * y.tangent / y.value};
}
template <typename A, typename B>
IST_INLINE Dual<A>& operator+=(Dual<A>& x, B y) {
  return x = x + y;
}
template <typename A, typename B>
IST_INLINE Dual<A>& operator-=(Dual<A>& x, B y) {
  return x = x - y;
}
template <typename A, typename B>
IST_INLINE Dual<A>& operator*=(Dual<A>& x, B y) {
  return x = x * y;
}

// Comparisons are those of the values.
template <typename A, typename B>
IST_INLINE auto operator<(Dual<A> x, B y) {
  if constexpr (is_dual<B>)
    return x.value < y.value;
  else
    return x.value < constant<A>(y);
}
template <typename A, typename B>
IST_INLINE auto operator>(Dual<A> x, B y) {
  if constexpr (is_dual<B>)
    return x.value > y.value;
  else
    return x.value > constant<A>(y);
}
template <typename A, typename B>
IST_INLINE auto operator!=(Dual<A> x, B y) {
  if constexpr (is_dual<B>)
    return x.value != y.value;
  else
    return x.value != constant<A>(y);
}

template <typename M, typename A>
IST_INLINE Dual<A> select(M mask, Dual<A> x, Dual<A> y) {
  return {mask ? x.value : y.value, mask ? x.tangent : y.tangent};
}
template <typename A>
IST_INLINE Dual<A> lane_max(Dual<A> bound, Dual<A> x) {
  return select(bound > x, bound, x);
}
template <typename A>
IST_INLINE Dual<A> lane_min(Dual<A> bound, Dual<A> x) {
  return select(bound < x, bound, x);
}
template <typename A>
IST_INLINE Dual<A> lane_sqrt(Dual<A> x) {
  const A root = lane_sqrt(x.value);
  return {root, x.tangent / (root + root)};
}
template <typename A>
IST_INLINE Dual<A> lane_exp(Dual<A> x) {
  const A e = lane_exp(x.value);
  return {e, e * x.tangent};
}
template <typename A>
IST_INLINE Dual<A> lane_elu(Dual<A> x) {
  const A y = lane_elu(x.value);
  return {y, select(x.value > 0, A{} + 1, y + 1) * x.tangent};
}
template <typename A>
IST_INLINE Dual<A> lane_erf(Dual<A> x) {
  constexpr Real<A> factor = Real<A>(1.1283791670955125739);  // 2 / √π
  return {lane_erf(x.value), factor * lane_exp(-x.value * x.value) * x.tangent};
}
template <typename A>
IST_INLINE auto lane_sum(Dual<A> x) {
  return Dual<Real<A>>{lane_sum(x.value), lane_sum(x.tangent)};
}
template <int S, typename A, int... K>
IST_INLINE void exchange(Dual<A>& a, Dual<A>& b, std::integer_sequence<int, K...> lanes) {
  exchange<S>(a.value, b.value, lanes), exchange<S>(a.tangent, b.tangent, lanes);
}

// Lane l of lanes in memory.
template <typename V>
IST_INLINE auto number(const V& x, int l) {
  if constexpr (is_dual<V>)
    return Dual<Real<V>>{number(x.value, l), number(x.tangent, l)};
  else
    return reinterpret_cast<const Real<V>*>(&x)[l];
}
// x as a constant: without its tangent.
template <typename V>
IST_INLINE V constant_of(V x) {
  if constexpr (is_dual<V>) x.tangent -= x.tangent;
  return x;
}
// The number x of no tangent.
template <typename R>
IST_INLINE R constant_number(Real<R> x) {
  if constexpr (is_dual<R>)
    return {x, 0};
  else
    return x;
}

#undef IST_PLAIN

}  // namespace implicit_steer::IST_ISA
