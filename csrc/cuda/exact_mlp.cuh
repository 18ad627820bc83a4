// The kernel MLP of one edge in the registers of one thread, for zonal frames: coefficients c_l of every hidden
// channel.
//
// Of a channel's coefficients z[k] the first ones have even degrees (0, 2, ..), the others odd ones (1, 3, ..). A plan
// that has fewer of them leaves those of the highest degrees 0. The last layer's coefficient of the highest degree,
// which is odd, is not read. Activations are y = A⁻ φ(A z) over pairs of samples, E + O and E − O (LayerView of
// plan.h). A holds log2 e times its numbers, so that e^x is one instruction, 2^(A z), and A⁻ holds ln 2 times its own;
// see Scaled.
//
// Weights lie in the block's shared memory, where all lanes read the same four of them at a time. Batch norms cost
// nothing per edge: the scale and the shift of one are in the weights of what follows.
//
// Numbers are those of S::Number: float, or dual numbers (dual.h) for second derivatives.
#pragma once

#include "../dual.h"
#include "../edge_mlp.h"
#include "call.h"
#include "exact_plan.h"
#include "lanes_of_warp.cuh"
#include "neighbours.cuh"

namespace implicit_steer::IST_ISA {

constexpr float kLog2e = 1.44269504089f, kLn2 = 0.69314718056f;

template <typename N>
struct ExactMlp;

// What an exact kernel is compiled for: φ, W hidden channels, V fields, with the path u × x or without it.
template <typename F, int kWidth, int kFields, bool kWithCross>
struct Exact {
  using Number = float;
  using Function = F;
  using Slots = ExactSlots<kWithCross>;
  using Mlp = ExactMlp<float>;
  static constexpr int c = ExactPlan::kCoefficients, even = ExactPlan::kEven, width = kWidth, fields = kFields;
  static constexpr bool large = kFields > 8 || kWidth > 8;  // θ takes so much shared memory that more warps share it
};
// Place of c_l among a channel's coefficients.
template <typename S>
__host__ __device__ constexpr int place_of_degree(int l) {
  return l % 2 == 0 ? l / 2 : S::even + l / 2;
}
// Place of a plan's coefficient k, and of a coefficient that it does not have, the j-th of these.
template <typename S>
__device__ __forceinline__ int place_of_coefficient(const PlanView<float>& p, int k) {
  return p.c == S::c || k < p.n_even ? k : k - p.n_even + S::c / 2;
}
template <typename S>
__device__ __forceinline__ int place_of_missing(const PlanView<float>& p, int j) {
  const int even = S::c / 2 - p.n_even;
  return j < even ? p.n_even + j : p.c + j;
}
// Odd coefficients of all degrees that are read.
template <typename S>
constexpr int kOddRead = S::Slots::degrees / 2;

// A row of samples, from a multiple of its size on; of four in one load, whose value is what keeps registers few.
template <int c>
struct SampleRow {
  float at[c];
};
template <int c>
__device__ __forceinline__ auto sample_row(const float* row) {
  if constexpr (c == 4) {
    return neighbours<4>(row);
  } else {
    SampleRow<c> loaded;
#pragma unroll
    for (int k = 0; k < c; k += 2) {
      const auto two = neighbours<2>(row + k);
      loaded.at[k] = two.at[0], loaded.at[k + 1] = two.at[1];
    }
    return loaded;
  }
}

// Beside those of compat.cuh
using ::exp2_approximate;
using ::inverse_root_approximate;
__device__ __forceinline__ Dual<float> exp2_approximate(Dual<float> x) {
  const float power = exp2_approximate(x.value);
  return {power, kLn2 * power * x.tangent};
}
__device__ __forceinline__ Dual<float> inverse_root_approximate(Dual<float> x) {
  const float inverse = inverse_root_approximate(x.value);
  return {inverse, -0.5f * inverse * inverse * inverse * x.tangent};
}

// value: log2 e · φ(ln 2 · x); slope, curvature: its derivatives, φ′(ln 2 · x) and ln 2 · φ″(ln 2 · x)
template <typename F>
struct Scaled;
template <>
struct Scaled<Elu> {
  static __device__ __forceinline__ float value(float x) {
    const float below = exp2_approximate(x) * kLog2e - kLog2e;
    return x > 0 ? x : below;
  }
  static __device__ __forceinline__ float slope(float x) { return min_or_nan(exp2_approximate(x), 1); }
  static __device__ __forceinline__ float curvature(float x) { return x > 0 ? 0 : exp2_approximate(x) * kLn2; }
};
template <>
struct Scaled<Silu> {
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(x); }
  static __device__ __forceinline__ float slope(float x) {
    const float s = sigmoid(x);
    return s * (1 + kLn2 * x * (1 - s));
  }
  static __device__ __forceinline__ float curvature(float x) {
    const float s = sigmoid(x);
    return kLn2 * s * (1 - s) * (2 + kLn2 * x * (1 - 2 * s));
  }
  static __device__ __forceinline__ float sigmoid(float x) { return reciprocal_approximate(1 + exp2_approximate(-x)); }
};
template <typename F>
__device__ __forceinline__ float scaled_value(float x) {
  return Scaled<F>::value(x);
}
template <typename F>
__device__ __forceinline__ Dual<float> scaled_value(Dual<float> x) {
  return {Scaled<F>::value(x.value), Scaled<F>::slope(x.value) * x.tangent};
}
template <typename F>
__device__ __forceinline__ float scaled_slope(float x) {
  return Scaled<F>::slope(x);
}
template <typename F>
__device__ __forceinline__ Dual<float> scaled_slope(Dual<float> x) {
  return {Scaled<F>::slope(x.value), Scaled<F>::curvature(x.value) * x.tangent};
}

// Whether a thread's registers hardly suffice: then some numbers are made once more instead of being kept.
template <typename S>
constexpr bool kFewRegisters = is_dual<typename S::Number> || S::Slots::degrees * S::width > 64;
// Channels whose activations are worked on together: so many that a pair's numbers are loaded seldom and few registers
// hold z and y at once.
template <typename S>
constexpr int kActivated = is_dual<typename S::Number> && S::c * S::width > 32 ? 1 : 4;

// The scale and the shift of the batch norm of layer n, 1 and 0 without one.
template <typename N>
__device__ __forceinline__ N norm_scale(const PlanView<float>& p, const N* packed, int n, int w) {
  return p.has_norms ? packed[p.layers[n].affine + w] : constant_number<N>(1);
}
template <typename S, typename N>
__device__ __forceinline__ N norm_shift(const PlanView<float>& p, const N* packed, int n, int w) {
  return p.has_norms && p.n_trivial ? packed[p.layers[n].affine + S::width + w] : N{};
}
// Where sums over edges have coefficient k: first the one that is the same in all samples.
__device__ __forceinline__ int slot_of(int k, int constant) { return k == 0 ? constant : k == constant ? 0 : k; }
// Group k of a layer's rows has one coefficient of all channels.
template <typename S>
__device__ __forceinline__ int coefficient_of(const int32_t* groups, int k) {
  return groups[k * (2 + 2 * S::width) + 2];
}

// What a backward pass wants of a layer n >= 1: its inputs y and z = W y + b.
enum LayerValue : int { kLayerInputs = 0, kLayerSums = 1 };
// Told of both by evaluate(), of all channels at a time, and by evaluate_near(), of one number.
struct NothingKept {
  template <typename Z>
  __device__ __forceinline__ void operator()(int, LayerValue, const Z&) const {}
  template <typename N>
  __device__ __forceinline__ void put(int, int, LayerValue, int, int, N) const {}
};

// Where a block has the MLP in its shared memory; the sizes, in numbers N, are the same for all lanes.
template <typename N>
struct ExactMlp {
  static constexpr bool is_table = false;
  N* first;          // [1 + n_inputs, W] the first layer's bias, then its weights by input
  N* hidden;         // [n_layers - 1] the layers that follow: bias [W], weights [c, W, W] by coefficient and row
  N *scale, *shift;  // [W] of the last batch norm, or 1 and 0
  float* samples;    // [pairs, 2, c] A and A⁻, scaled
  int pairs, n_inputs, n_layers;

  template <typename S>
  static constexpr int layer_size = S::width + S::c * S::width * S::width;
  template <typename S>
  static int size(const PlanView<float>& p) {
    return 2 * p.layers[0].n_pairs * S::c + (1 + p.n_inputs) * S::width + (p.n_layers - 1) * layer_size<S> +
           2 * S::width;
  }

  template <typename S>
  __device__ __forceinline__ void place(N* memory, const PlanView<float>& p) {
    pairs = p.layers[0].n_pairs, n_inputs = p.n_inputs, n_layers = p.n_layers;
    samples = reinterpret_cast<float*>(memory);
    first = reinterpret_cast<N*>(samples + 2 * pairs * S::c), hidden = first + (1 + n_inputs) * S::width;
    scale = hidden + (n_layers - 1) * layer_size<S>, shift = scale + S::width;
  }

  // By all threads of the block, with barriers.
  template <typename S>
  __device__ __forceinline__ void copy(const PlanView<float>& p, const FieldView& view, const N* packed) {
    const LayerView<float>& layer = p.layers[0];
    const float *const a = global_memory(layer.pair_samples), *const b = global_memory(layer.pair_inverse);
    for (int k = threadIdx.x; k < pairs * S::c; k += blockDim.x) {
      const int pair = k / S::c, from = k % S::c, row = pair * p.c + from;
      const bool there = from < p.c;
      float* const to =
          samples + pair * 2 * S::c + (there ? place_of_coefficient<S>(p, from) : place_of_missing<S>(p, from - p.c));
      to[0] = there ? a[row] * kLog2e : 0, to[S::c] = there ? b[row] * kLn2 : 0;
    }
    for (int k = threadIdx.x; k < (1 + n_inputs) * S::width; k += blockDim.x) {
      const int w = k % S::width, at = k < S::width ? layer.bias + w * p.c : view.first[k - S::width];
      first[k] = at < 0 ? N{} : packed[at];
    }
    for (int w = threadIdx.x; w < S::width; w += blockDim.x)
      scale[w] = norm_scale(p, packed, n_layers - 1, w), shift[w] = norm_shift<S>(p, packed, n_layers - 1, w);
    for (int n = 1; n < n_layers; ++n) copy_layer<S>(p, packed, n);
    __syncthreads();
  }

  // c_l of all channels, z[w][place of l], from the inputs: the radius, then the attributes. keep(layer, what, values).
  template <typename S, typename Attribute, typename Keep>
  __device__ __forceinline__ void evaluate(N radius, Attribute attribute, Keep keep, N (&z)[S::width][S::c]) const {
    first_layer<S>(radius, attribute, 0, z);
    if (n_layers == 1) return activation<S, 1, 1, S::even, kOddRead<S>>(z);
    activation<S, 1, 1, S::even, S::c - S::even>(z);
    const N* layer = hidden;
#pragma unroll 1
    for (int n = 1; n < n_layers - 1; ++n, layer += layer_size<S>) {
      keep(n, kLayerInputs, z);
      linear<S>(layer, z);
      keep(n, kLayerSums, z);
      activation<S, S::even, S::c - S::even, S::even, S::c - S::even>(z);
    }
    keep(n_layers - 1, kLayerInputs, z);
    linear<S>(layer, z);
    keep(n_layers - 1, kLayerSums, z);
    activation<S, S::even, S::c - S::even, S::even, kOddRead<S>>(z);
  }

  // z of the first layer, of n channels from `begin` on.
  template <typename S, int n, typename Attribute>
  __device__ __forceinline__ void first_layer(N radius, Attribute attribute, int begin, N (&z)[n][S::c]) const {
    constexpr int together = n < 4 ? n : 4;
    const N* const w = opaque(first) + begin;
#pragma unroll
    for (int i = 0; i < n; i += together) {
      const auto bias = neighbours<together>(w + i), of_radius = neighbours<together>(w + S::width + i);
#pragma unroll
      for (int j = 0; j < together; ++j) z[i + j][0] = bias.at[j], z[i + j][S::even] = of_radius.at[j] * radius;
    }
#pragma unroll 1
    for (int k = 1; k < n_inputs; ++k) {
      const N x = attribute(k - 1);
#pragma unroll
      for (int i = 0; i < n; i += together) {
        const auto of_attribute = neighbours<together>(w + (1 + k) * S::width + i);
#pragma unroll
        for (int j = 0; j < together; ++j) z[i + j][0] += of_attribute.at[j] * x;
      }
    }
  }

  // z = W y + b in the place of y, coefficient by coefficient
  template <typename S>
  __device__ __forceinline__ static void linear(const N* layer, N (&z)[S::width][S::c]) {
#pragma unroll
    for (int k = 0; k < S::c; ++k) {
      N y[S::width];
#pragma unroll
      for (int i = 0; i < S::width; ++i) y[i] = z[i][k];
#pragma unroll
      for (int r = 0; r < S::width; ++r) {
        const N* const row = layer + S::width + (k * S::width + r) * S::width;
        N sum = k == 0 ? layer[r] : N{};
#pragma unroll
        for (int i = 0; i < S::width; i += 4) {
          const auto four = neighbours<4>(row + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum += four.at[j] * y[i + j];
        }
        z[r][k] = sum;
      }
    }
  }

  // y = A⁻ φ(A z) in the place of z, which has only its first even and odd coefficients; of y only such are wanted.
  template <typename S, int kInEven, int kInOdd, int kOutEven, int kOutOdd>
  __device__ __forceinline__ void activation(N (&z)[S::width][S::c]) const {
    constexpr int together = kActivated<S>;
    const auto used = [](int k, int even, int odd) { return k < S::even ? k < even : k - S::even < odd; };
#pragma unroll
    for (int first_channel = 0; first_channel < S::width; first_channel += together) {
      N y[together][S::c] = {};
#pragma unroll 1
      for (int pair = 0; pair < pairs; ++pair) {
        const float* const row = (is_dual<N> ? samples : opaque(samples)) + pair * 2 * S::c;
        const auto a = sample_row<S::c>(row), b = sample_row<S::c>(row + S::c);
#pragma unroll
        for (int w = 0; w < together; ++w) {
          N part[2] = {};  // even, odd
#pragma unroll
          for (int k = 0; k < S::c; ++k)
            if (used(k, kInEven, kInOdd)) part[k >= S::even] += a.at[k] * z[first_channel + w][k];
          const N plus = scaled_value<typename S::Function>(part[0] + part[1]);
          const N minus = scaled_value<typename S::Function>(part[0] - part[1]);
          const N sums[2] = {plus + minus, plus - minus};
#pragma unroll
          for (int k = 0; k < S::c; ++k)
            if (used(k, kOutEven, kOutOdd)) y[w][k] += sums[k >= S::even] * b.at[k];
        }
      }
#pragma unroll
      for (int w = 0; w < together; ++w)
#pragma unroll
        for (int k = 0; k < S::c; ++k) z[first_channel + w][k] = y[w][k];
    }
  }

  // ---- near the origin: one edge by all lanes of a warp

  // As evaluate() with coefficients of l >= 1 divided by the radius on the way (near_forward of edge_mlp.h), then
  // put(l, w, c_l) once for each, keep(layer, what, k, w, value) likewise. A lane has one channel w and every
  // so-manieth pair of samples; y: [W, c] of the warp.
  template <typename S, typename Attribute, typename Keep, typename Put>
  __device__ __forceinline__ void evaluate_near(N radius, Attribute attribute, N* y, Keep keep, Put put) const {
    constexpr int lanes = 32 / S::width;  // of a channel
    const int lane = threadIdx.x % 32, w = lane / lanes, share = lane % lanes;
    N z[S::c] = {first[w]}, out[S::c];
    z[S::even] = first[S::width + w];
    for (int n = 1; n < n_inputs; ++n) z[0] += first[(1 + n) * S::width + w] * attribute(n - 1);
    const N* layer = hidden;
    for (int n = 1;; ++n, layer += layer_size<S>) {
      near_activation<S>(radius, z, share, out);
      if (n == n_layers) break;
      __syncwarp();
#pragma unroll
      for (int k = 0; k < S::c; ++k)
        if (share == 0) y[w * S::c + k] = out[k], keep(n, kLayerInputs, k, w, out[k]);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < S::c; ++k) {
        z[k] = k == 0 ? layer[w] : N{};
        for (int i = 0; i < S::width; ++i)
          z[k] += layer[S::width + (k * S::width + w) * S::width + i] * y[i * S::c + k];
        if (share == 0) keep(n, kLayerSums, k, w, z[k]);
      }
    }
#pragma unroll
    for (int l = 0; l < S::Slots::degrees; ++l)
      if (share == 0) put(l, w, l == 0 ? out[0] : out[place_of_degree<S>(l)] * radius);
  }

  template <typename S>
  __device__ __forceinline__ void near_activation(N radius, const N (&z)[S::c], int share, N (&y)[S::c]) const {
    using F = typename S::Function;
    constexpr int lanes = 32 / S::width;
#pragma unroll
    for (int k = 0; k < S::c; ++k) y[k] = N{};
    for (int pair = share; pair < pairs; pair += lanes) {
      const float *a = samples + pair * 2 * S::c, *b = a + S::c;
      const N at_zero = a[0] * z[0] * kLn2;
      N part[2] = {};
#pragma unroll
      for (int k = 1; k < S::c; ++k) part[k >= S::even] += a[k] * z[k] * kLn2;
      N sums[2] = {}, values{};  // of quotients: even, odd; of φ: even
      IST_ROLLED for (int sign = 1; sign >= -1; sign -= 2) {
        const N w = part[0] + static_cast<float>(sign) * part[1];
        const N d = w * quotient<F, false>(at_zero, radius * w).q;
        sums[0] += d, sums[1] += static_cast<float>(sign) * d, values += F::value(at_zero) + radius * d;
      }
#pragma unroll
      for (int k = 0; k < S::c; ++k) y[k] += (k == 0 ? values : sums[k >= S::even]) * b[k] * kLog2e;
    }
#pragma unroll
    for (int k = 0; k < S::c; ++k) y[k] = sum_lanes(y[k], 1, lanes);
  }

  // ---- batch norms, folded

  // The coefficient that is the same in all samples.
  static __device__ __forceinline__ int trivial(const FieldView&) { return 0; }

  // Layer n >= 1 at the scale and shift of the batch norm before it: W' = W scale, b' = b + W shift.
  template <typename S>
  __device__ __forceinline__ void copy_layer(const PlanView<float>& p, const N* packed, int n) {
    constexpr int square = S::width * S::width;
    const LayerView<float>& layer = p.layers[n];
    const int32_t* const groups = global_memory(layer.groups);
    const N* const values = packed + layer.weight;
    N* const to = hidden + (n - 1) * layer_size<S>;
    const auto coefficient = [&](int k) { return coefficient_of<S>(groups, k); };
    for (int k = threadIdx.x; k < S::c * square; k += blockDim.x) {
      const int group = k / square;
      const bool there = group < p.c;
      const int place = there ? place_of_coefficient<S>(p, coefficient(group)) : place_of_missing<S>(p, group - p.c);
      to[S::width + place * square + k % square] = there ? values[k] * norm_scale(p, packed, n - 1, k % S::width) : N{};
    }
    for (int r = threadIdx.x; r < S::width; r += blockDim.x) {
      N sum = packed[layer.bias + r * p.c];
      for (int k = 0; k < p.c; ++k)
        for (int i = 0; i < S::width && coefficient(k) == 0; ++i)
          sum += values[k * square + r * S::width + i] * norm_shift<S>(p, packed, n - 1, i);
      to[r] = sum;
    }
  }
};

}  // namespace implicit_steer::IST_ISA
