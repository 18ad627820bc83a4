// The products of features and harmonics that the exact kernels (exact_forward.cuh) sum over edges, for scalars and
// vectors: closed formulas in place of a plan's lists of nonzeros.
//
// An input field v is one scalar and one vector, f = (scalar, x, y, z). A slot is one component of one product of f
// with the harmonics of degree l of the edge's direction; slots of a degree follow each other, as they meet the same
// coefficients c_l. A path is a product as a whole: it takes one θ [u, v, w], and its slots are the components of its
// output. Normalisation is left out: it is in what multiplies θ (exact_plan.h).
#pragma once

#include "../plan.h"
#include "compat.cuh"
#include "lane.h"

namespace implicit_steer::IST_ISA {

// Paths by degree: input -> output. Without kCross the last two change places and kCross's is left out.
enum ExactPath : int {
  kScalarScalar = 0,  // l = 0: s
  kVectorVector = 1,  // l = 0: x
  kVectorScalar = 2,  // l = 1: u · x
  kScalarVector = 3,  // l = 1: s u
  kTraceless = 4,     // l = 2: u (u · x) - x / 3
  kCross = 5          // l = 1: u × x, in SO(3) and where pseudovectors are
};

// Slots with the path u × x or without it.
template <bool kWithCross>
struct ExactSlots {
  static constexpr int degrees = 3, count = kWithCross ? 14 : 11, paths = kWithCross ? 6 : 5;
  static IST_HOST_DEVICE constexpr int first(int l) { return l == 0 ? 0 : l == 1 ? 4 : l == 2 ? count - 3 : count; }
  static IST_HOST_DEVICE constexpr int path(int slot) {
    return slot == 0           ? kScalarScalar
           : slot < 4          ? kVectorVector
           : slot == 4         ? kVectorScalar
           : slot < 8          ? kScalarVector
           : slot >= count - 3 ? kTraceless
                               : kCross;
  }
  // Of the outputs (scalar, x, y, z)
  static IST_HOST_DEVICE constexpr int component(int slot) {
    return slot == 0 || slot == 4 ? 0 : slot < 4 ? slot : slot < 8 ? slot - 4 : (slot - 8) % 3 + 1;
  }

  // All slots of f at direction u.
  static IST_INLINE void evaluate(const float (&f)[4], const float (&u)[3], float (&slot)[count]) {
    const float dot = f[1] * u[0] + f[2] * u[1] + f[3] * u[2];
    IST_UNROLLED for (int k = 0; k < 4; ++k) slot[k] = f[k];
    slot[4] = dot;
    IST_UNROLLED for (int k = 0; k < 3; ++k) {
      slot[5 + k] = f[0] * u[k];
      if (kWithCross) slot[8 + k] = u[(k + 1) % 3] * f[1 + (k + 2) % 3] - u[(k + 2) % 3] * f[1 + (k + 1) % 3];
      slot[count - 3 + k] = u[k] * dot - f[1 + k] * (1 / 3.0f);
    }
  }

  // The way back from slots of f0 at direction u0, whose product is `dot`: sums of what the slots' gradients add to
  // that of f, to that of u, which fields share, and to that of the product, which goes to both at the end.
  struct Reverse {
    float f[4] = {}, along = 0;
    IST_INLINE void add(int slot, float d, const float (&f0)[4], const float (&u0)[3], float dot, float (&u)[3]) {
      const int k = component(slot) - 1, next = (k + 1) % 3, last = (k + 2) % 3;
      if (slot < 4) {
        f[slot] += d;
      } else if (slot == 4) {
        along += d;
      } else if (slot < 8) {
        f[0] += d * u0[k], u[k] += d * f0[0];
      } else if (slot >= count - 3) {
        along += d * u0[k], f[1 + k] -= d * (1 / 3.0f), u[k] += d * dot;
      } else {
        f[1 + last] += d * u0[next], u[next] += d * f0[1 + last];
        f[1 + next] -= d * u0[last], u[last] -= d * f0[1 + next];
      }
    }
    IST_INLINE void finish(const float (&f0)[4], const float (&u0)[3], float (&u)[3]) {
      IST_UNROLLED for (int k = 0; k < 3; ++k) f[1 + k] += along * u0[k], u[k] += along * f0[1 + k];
    }
  };
};

}  // namespace implicit_steer::IST_ISA
