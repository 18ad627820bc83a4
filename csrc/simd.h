// Lanes: GCC/Clang vectors of R = float or double, one edge per lane, and the functions of the kernel MLP on them.
//
// Compiled once per instruction set (IST_ISA names it) into a namespace of its own, so that no inline function of one
// set can replace that of another at link time. For the same reason this code and what includes it uses no std::
// template. Everything passes NaN on.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define IST_LANE_BYTES 64
#define IST_ROW_BYTES 32
#elif defined(__AVX2__)
#define IST_LANE_BYTES 32
#define IST_ROW_BYTES 32
#else
#define IST_LANE_BYTES 16
#define IST_ROW_BYTES 16
#endif
#define IST_INLINE inline __attribute__((always_inline))
#define IST_ROLLED    // loops that GPU kernels have no registers to unroll,
#define IST_UNROLLED  // and such over arrays that have to be in registers there
#define IST_LANES     // functions of lanes that the compiler may leave apart; cuda/lane.h needs more words

namespace implicit_steer::IST_ISA {

constexpr bool kOneLane = false;  // of a type that is a plain number
template <typename V>
constexpr int kRowBlock = 5;  // rows of samples at a time (edge_mlp.h)

// V: L edges. Q: QL neighbouring channels of one edge or node.
template <typename R>
struct Lane;
template <>
struct Lane<float> {
  typedef float V __attribute__((vector_size(IST_LANE_BYTES)));
  typedef int32_t I __attribute__((vector_size(IST_LANE_BYTES)));
  typedef float Q __attribute__((vector_size(IST_ROW_BYTES)));
  static constexpr int L = IST_LANE_BYTES / 4, QL = IST_ROW_BYTES / 4;
};
template <>
struct Lane<double> {
  typedef double V __attribute__((vector_size(IST_LANE_BYTES)));
  typedef int64_t I __attribute__((vector_size(IST_LANE_BYTES)));
  typedef double Q __attribute__((vector_size(IST_ROW_BYTES)));
  static constexpr int L = IST_LANE_BYTES / 8, QL = IST_ROW_BYTES / 8;
};
using VF = Lane<float>::V;
using VD = Lane<double>::V;

// The same pointer, but not to be taken apart: its neighbours are then addressed by constant offsets instead of one
// register each.
template <typename T>
IST_INLINE T* opaque_pointer(T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

// a where the mask is set, else b
template <typename M, typename V>
IST_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

template <typename V, typename R>
IST_INLINE V splat(R value) {
  return value - V{};  // not a sum: -0 stays, and nothing is computed
}

#if IST_LANE_BYTES == 64
IST_INLINE VF lane_sqrt(VF x) { return (VF)_mm512_sqrt_ps((__m512)x); }
IST_INLINE VD lane_sqrt(VD x) { return (VD)_mm512_sqrt_pd((__m512d)x); }
IST_INLINE VF lane_max(VF bound, VF x) { return (VF)_mm512_max_ps((__m512)bound, (__m512)x); }
IST_INLINE VD lane_max(VD bound, VD x) { return (VD)_mm512_max_pd((__m512d)bound, (__m512d)x); }
IST_INLINE VF lane_min(VF bound, VF x) { return (VF)_mm512_min_ps((__m512)bound, (__m512)x); }
IST_INLINE VD lane_min(VD bound, VD x) { return (VD)_mm512_min_pd((__m512d)bound, (__m512d)x); }
IST_INLINE float lane_sum(VF x) { return _mm512_reduce_add_ps((__m512)x); }
IST_INLINE double lane_sum(VD x) { return _mm512_reduce_add_pd((__m512d)x); }
#else
#if IST_LANE_BYTES == 32
IST_INLINE VF lane_sqrt(VF x) { return (VF)_mm256_sqrt_ps((__m256)x); }
IST_INLINE VD lane_sqrt(VD x) { return (VD)_mm256_sqrt_pd((__m256d)x); }
#else
template <typename V>
IST_INLINE V lane_sqrt(V x) {
  for (unsigned l = 0; l < sizeof(V) / sizeof(x[0]); ++l)
    x[l] = sizeof(x[0]) == 4 ? __builtin_sqrtf(x[l]) : __builtin_sqrt(x[l]);
  return x;
}
#endif
// The second operand where either is NaN.
template <typename V>
IST_INLINE V lane_max(V bound, V x) {
  return bound > x ? bound : x;
}
template <typename V>
IST_INLINE V lane_min(V bound, V x) {
  return bound < x ? bound : x;
}
template <typename V>
IST_INLINE auto lane_sum(V x) {
  auto sum = x[0];
  for (unsigned l = 1; l < sizeof(V) / sizeof(x[0]); ++l) sum += x[l];
  return sum;
}
#endif

// Bit l: whether lane l of a comparison's result is set.
template <typename M>
IST_INLINE uint32_t lane_bits(M mask) {
#if IST_LANE_BYTES == 64
  if constexpr (sizeof(mask[0]) == 4)
    return _mm512_movepi32_mask((__m512i)mask);
  else
    return _mm512_movepi64_mask((__m512i)mask);
#else
  uint32_t bits = 0;
  for (unsigned l = 0; l < sizeof(M) / sizeof(mask[0]); ++l) bits |= static_cast<uint32_t>(mask[l] != 0) << l;
  return bits;
#endif
}

// One step of a transposition: blocks of S x S numbers of the rows a and b (S rows further down) change places.
template <int S, typename V, int... K>
IST_INLINE void exchange(V& a, V& b, std::integer_sequence<int, K...>) {
  constexpr int L = sizeof...(K);
  const V upper = __builtin_shufflevector(a, b, (K & S ? L + K - S : K)...);
  b = __builtin_shufflevector(a, b, (K & S ? L + K : K + S)...);
  a = upper;
}
template <typename V>
IST_INLINE V lane_abs(V x) {
  return select(x < 0, -x, x);
}

// e^x = scale + rest, where rest is small at small |x|, so that e^x - 1 keeps its digits there.
struct ExpParts {
  VF scale, rest;
};

// x in -86.6 .. 88.3. x = n ln 2 + r with n a multiple of 1 / kTable; adding a large `magic` leaves n in the lowest
// bits of a mantissa, whence a permutation looks up 2^fraction and a shift makes the exponent; rest = scale (e^r - 1).
// Without kPrecise ln 2 is one float: relative error up to n 2e-9.
#if IST_LANE_BYTES >= 32
#if IST_LANE_BYTES == 64
constexpr int kTableBits = 4;
constexpr float kExpSecond = 0.5000162107f, kExpThird = 0.1666702566f;
#else
constexpr int kTableBits = 3;
constexpr float kExpSecond = 0.5000648179f, kExpThird = 0.166681373f;
#endif
// 2^(k / 16) as bits, less what the shift of k adds
alignas(64) constexpr int32_t kExpTable[16] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                               0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                               0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
IST_INLINE Lane<float>::I look_up(Lane<float>::I index) {
  using I = Lane<float>::I;
#if IST_LANE_BYTES == 64
  I table;
  memcpy(&table, kExpTable, sizeof table);
  return (I)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table);
#else
  const I table = {kExpTable[0], kExpTable[2],  kExpTable[4],  kExpTable[6],
                   kExpTable[8], kExpTable[10], kExpTable[12], kExpTable[14]};
  return (I)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
#endif
}
template <bool kPrecise>
IST_INLINE ExpParts exp_parts(VF x) {
  using I = Lane<float>::I;
  constexpr float magic = 12582912.0f / (1 << kTableBits);  // 1.5 * 2^23 / kTable
  const VF shifted = x * 1.44269504089f + magic;
  const VF n = shifted - magic;
  VF r = x - n * 0.693147182464599609f;
  if (kPrecise) r = r + n * 1.904654299957768e-9f;
  const VF scale = (VF)(look_up((I)shifted) + ((I)shifted << (23 - kTableBits)));
  VF p = r * kExpThird + kExpSecond;
  p = p * r + 1.0f;
  return {scale, (scale * r) * p};
}
#else
template <bool>
IST_INLINE ExpParts exp_parts(VF x) {
  using I = Lane<float>::I;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  const VF shifted = x * 1.44269504089f + magic;
  const VF n = shifted - magic;
  VF r = x - n * 0.693359375f;  // 10 bits of ln 2: the product is exact without FMA, too
  r = r + n * 2.12194440e-4f;
  const VF scale = (VF)(((I)shifted << 23) + 0x3f800000);
  VF p = r * 0.001381459878757596f + 0.008368716575205326f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  return {scale, (scale * r) * p};
}
#endif

// e^x, at most 2 ulp from -86.6 to 88.3 (float) and -707 to 709 (double); arguments outside count as the bound.
IST_INLINE VF lane_exp(VF x) {
  const ExpParts e = exp_parts<true>(lane_min(splat<VF>(88.3f), lane_max(splat<VF>(-86.6f), x)));
  return e.scale + e.rest;
}
// x where x > 0, else e^x - 1. As integers, negative floats are below all others and grow with their magnitude: one
// minimum bounds them from below, and turns all others into that bound, of which e^x - 1 is below them.
IST_INLINE VF lane_elu(VF x) {
  using I = Lane<float>::I;
  const I bound = (I)splat<VF>(-20.0f), bits = (I)x;  // where -1 is reached
  const ExpParts e = exp_parts<false>((VF)(bits < bound ? bits : bound));
  return lane_max((e.scale - 1) + e.rest, x);
}
IST_INLINE VD lane_exp(VD x) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  constexpr double taylor[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  x = lane_min(splat<VD>(709.0), lane_max(splat<VD>(-707.0), x));
  const VD shifted = x * 1.4426950408889634 + magic;
  const VD n = shifted - magic;
  VD r = x - n * 6.93145751953125e-1;  // 21 bits of ln 2
  r = r - n * 1.42860682030941723212e-6;
  VD p = splat<VD>(taylor[0]);
  for (int k = 1; k < 14; ++k) p = p * r + taylor[k];
  using I = Lane<double>::I;
  return (VD)((I)p + ((I)shifted << 52));
}

IST_INLINE VD lane_elu(VD x) { return lane_max(lane_exp(lane_min(VD{}, x)) - 1, x); }

}  // namespace implicit_steer::IST_ISA
