// The error function on lanes, to 2 ulp.
//
// Below 1: erf x = x + x P(x²). From 1 on: erf x = 1 − e^(−x²) Q(u), where u in −1 .. 1 stands for x in 1 .. top and Q
// is near e^(x²) erfc x; from `top` on erf x rounds to 1. P and Q are polynomials fitted so that the largest deviation
// of erf x, absolute, is least: 1.2e-9 and 2.4e-9 for float, 7e-18 and 1e-17 for double.
#pragma once

#include "simd.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct ErfFit;
template <>
struct ErfFit<float> {
  static constexpr float top = 4;
  static constexpr float below[] = {7.889038199e-5f, -8.020816936e-4f, 5.189532608e-3f, -2.685444318e-2f,
                                    1.128360014e-1f, -3.761262713e-1f, 1.283791659e-1f};
  static constexpr float above[] = {2.737870115e-3f,  3.843995818e-3f, 6.187013433e-3f,
                                    -5.021069159e-3f, 1.165672562e-2f, -2.744600622e-2f,
                                    5.605799936e-2f,  -1.11513277e-1f, 2.108076045e-1f};
};
template <>
struct ErfFit<double> {
  static constexpr double top = 6;
  static constexpr double below[] = {-7.80115567558889637e-10, 1.37229568474424993e-8,  -1.6209170995090311e-7,
                                     1.64475169724810555e-6,   -1.49247446003050551e-5, 1.20552953168639603e-4,
                                     -8.54832598956195401e-4,  5.22397760742033332e-3,  -2.68661706432757909e-2,
                                     1.12837916709452502e-1,   -3.76126389031835465e-1, 1.28379167095512567e-1};
  static constexpr double above[] = {1.06609854498263313e-4,  7.040927341552021e-4,    2.12715125223505028e-3,
                                     3.62669594542413515e-3,  3.61730723710597868e-3,  1.55164052113289583e-3,
                                     -6.65592065182624763e-4, -1.61539036722493853e-3, -6.5976693345405762e-4,
                                     -5.56238646593500121e-4, 9.63293181357408853e-4,  -1.44202877308032955e-3,
                                     2.82102558773468239e-3,  -5.03122421090134564e-3, 8.83118624441239475e-3,
                                     -1.5182877492553225e-2,  2.54955695468833162e-2,  -4.17667784082049304e-2,
                                     6.66320833655087058e-2,  -1.03308944579641182e-1, 1.55293655607220642e-1};
};

template <typename V, typename R, int N>
IST_INLINE V polynomial(const R (&coefficients)[N], V x) {
  V p = splat<V>(coefficients[0]);
  for (int k = 1; k < N; ++k) p = p * x + coefficients[k];
  return p;
}

template <typename V, typename R>
IST_INLINE V erf_of(V x, R top) {
  const V size = lane_min(splat<V>(top), lane_abs(x)), square = size * size;
  const V below = x + x * polynomial(ErfFit<R>::below, square);
  const V above = 1 - lane_exp(-square) * polynomial(ErfFit<R>::above, (size * 2 - (top + 1)) * (1 / (top - 1)));
  return select(size < 1, below, select(x < 0, -above, above));
}
IST_INLINE VF lane_erf(VF x) { return erf_of(x, ErfFit<float>::top); }
IST_INLINE VD lane_erf(VD x) { return erf_of(x, ErfFit<double>::top); }

}  // namespace implicit_steer::IST_ISA
