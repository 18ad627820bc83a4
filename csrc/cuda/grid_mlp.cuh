// The kernel MLP of 16 edges by a warp, its hidden channels functions on the sphere of 16 coefficients, on tensor cores
// (mma.cuh): coefficients of one channel are A's columns, edges its rows.
//
// Activations are y = A⁻ φ(A z) over pairs of opposite samples, E + O and E − O (LayerView of plan.h). Coefficients
// stand in slots: the plan's order, but for the constant one, which changes places with the first. Even ones are in the
// first 8 slots, odd ones in the others. All matrices lie in the block's shared memory as B fragments, split for
// 3xTF32.
//
// Lane 4 g + t holds of edges g and g + 8 the slots 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t: what a product gives it is what
// the next one takes, if columns t and t + 4 of A stand for slots 2 t and 2 t + 1. Between layers the state, [16 edges,
// channels, slots], is in the warp's shared memory: for the linear layer lane 4 g + t holds channels t and t + 4.
#pragma once

#include "exact_mlp.cuh"
#include "mma.cuh"

namespace implicit_steer::IST_ISA {

struct GridMlp;
template <typename S>
struct GridWarp;

// What a grid kernel is compiled for: φ, W hidden channels, V fields.
template <typename F, int kWidth, int kFields>
struct Grid {
  using Function = F;
  using Slots = ExactSlots<false>;
  using Mlp = GridMlp;
  static constexpr int c = GridCoefficients::c, width = kWidth, fields = kFields;
  static constexpr bool large = false;
  static_assert(kWidth == 8 && kFields == 8);
};

// The state of a warp's 16 edges; strides without bank conflicts.
struct GridState {
  static constexpr int edges = 16, channel = 20, edge = 8 * channel + 16, size = edges * edge + 8;
  // Place of an edge's numbers.
  static __device__ __forceinline__ int of_edge(int e) { return e * edge + (e >> 1 & 1) * 8; }
};

struct GridMlp {
  static constexpr int fragment = 4 * 32;  // numbers: of every lane two elements of B, big parts, then small ones
  static constexpr int of_samples = 0, of_inverse = 6, of_output = 12, of_position = 16, n_fragments = 18;
  static constexpr int kTogether = 2;  // channels

  // [n_fragments, fragment]: for each half of the pairs E, then O in either half of the slots, of A; the same of A⁻; E
  // and O of what couplings read in place of A⁻; of A, what positions are multiplied with
  float* fragments;
  float* hidden;           // [n_layers - 1] the layers that follow: a fragment of every slot, bias [W]
  float *first, *scalars;  // of the first layer: [W, 4] weights of x, y, z; [1 + n_attr, W] bias, weights of attributes
  float *scale, *shift;    // [W] of the last batch norm, or 1 and 0
  int n_scalars, n_layers;

  template <typename S>
  static constexpr int layer_size = S::c * fragment + S::width;
  template <typename S>
  static int size(const PlanView<float>& p) {
    return n_fragments * fragment + (p.n_layers - 1) * layer_size<S> + (4 + 1 + p.n_attr + 2) * S::width;
  }

  template <typename S>
  __device__ __forceinline__ void place(float* memory, const PlanView<float>& p) {
    n_scalars = 1 + p.n_attr, n_layers = p.n_layers;
    fragments = memory, hidden = fragments + n_fragments * fragment;
    first = hidden + (n_layers - 1) * layer_size<S>, scalars = first + 4 * S::width;
    scale = scalars + n_scalars * S::width, shift = scale + S::width;
  }

  // ---- copies into shared memory, by all threads of the block, with a barrier

  template <typename S>
  __device__ __forceinline__ void copy(const PlanView<float>& p, const ExactView& view, const float* packed) {
    const GridCoefficients& grid = *global_memory(view.grid);
    const LayerView<float>& layer = p.layers[0];
    const float of_constant = global_memory(layer.pair_samples)[grid.constant] * kLog2e;
    for (int k = threadIdx.x; k < 32 * n_fragments; k += blockDim.x) copy_fragment(p, layer, grid, k / 32, k % 32);
    for (int k = threadIdx.x; k < 4 * S::width; k += blockDim.x) {
      const int at = k % 4 < 3 ? view.first[k % 4 * S::width + k / 4] : -1;
      first[k] = at < 0 ? 0 : packed[at];
    }
    for (int k = threadIdx.x; k < n_scalars * S::width; k += blockDim.x) {
      const int at = k < S::width ? layer.bias + k * S::c + grid.constant : view.first[2 * S::width + k];
      scalars[k] = at < 0 ? 0 : packed[at] * of_constant;
    }
    for (int w = threadIdx.x; w < S::width; w += blockDim.x) {
      scale[w] = ExactMlp::norm_scale(p, packed, n_layers - 1, w);
      shift[w] = ExactMlp::norm_shift<S>(p, packed, n_layers - 1, w);
    }
    for (int n = 1; n < n_layers; ++n) copy_layer<S>(p, packed, n, grid.constant);
    __syncthreads();
  }

  // Slot and coefficient change places with the constant one.
  static __device__ __forceinline__ int swapped(int k, int constant) {
    return k == 0 ? constant : k == constant ? 0 : k;
  }

  static __device__ __forceinline__ void put(float* to, float first_element, float second_element) {
    Split<2> split;
    split.set(0, first_element), split.set(1, second_element);
    neighbours<4>(to) = {__uint_as_float(split.big[0]), __uint_as_float(split.big[1]), __uint_as_float(split.small[0]),
                         __uint_as_float(split.small[1])};
  }

  // A lane's part of fragment n of those of samples.
  __device__ __forceinline__ void copy_fragment(const PlanView<float>& p, const LayerView<float>& layer,
                                                const GridCoefficients& grid, int n, int lane) {
    const int group = lane / 4, row = lane % 4 * 2;  // of elements B[row][group] and B[row + 1][group]
    const float *const samples = global_memory(layer.pair_samples), *const inverse = global_memory(layer.pair_inverse);
    // part 0: of even coefficients, 1 and 2: of odd ones in the slots below 8 and from there on
    const auto number = [&](const float* matrix, int pair, int part, int slot) {
      slot += part == 2 ? 8 : 0;
      return pair < layer.n_pairs && (slot >= p.n_even) == (part > 0)
                 ? matrix[pair * p.c + swapped(slot, grid.constant)]
                 : 0;
    };
    const auto output = [&](int pair, int form) {
      float sum = 0;
      for (int k = 0; k < p.c && pair < layer.n_pairs; ++k) sum += grid.forms[form][k] * inverse[pair * p.c + k];
      return sum * kLn2;
    };
    float elements[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (n < of_inverse) {
        elements[i] = number(samples, n / 3 * 8 + group, n % 3, row + i) * kLog2e;
      } else if (n < of_output) {
        elements[i] = number(inverse, (n - of_inverse) / 3 * 8 + row + i, n % 3, group) * kLn2;
      } else if (n < of_position) {
        const bool odd = n % 2;
        const int pair = (n - of_output) / 2 * 8 + row + i, form = group + (odd ? grid.n_even_forms : 0);
        elements[i] = group < (odd ? grid.n_forms - grid.n_even_forms : grid.n_even_forms) ? output(pair, form) : 0;
      } else {  // rows t and t + 4 are the same: A has a number's big part in one column, its small part in the other
        const int pair = (n - of_position) * 8 + group;
        elements[i] = pair < layer.n_pairs && lane % 4 < 3 ? samples[pair * p.c + grid.position[lane % 4]] * kLog2e : 0;
      }
    }
    put(fragments + n * fragment + 4 * lane, elements[0], elements[1]);
  }

  // Layer n >= 1 at the scale and shift of the batch norm before it, as ExactMlp has it. Column n of B stands for
  // channel n / 2 + 4 (n % 2): a lane gets the channels that it gives.
  template <typename S>
  __device__ __forceinline__ void copy_layer(const PlanView<float>& p, const float* packed, int n, int constant) {
    constexpr int square = S::width * S::width;
    const LayerView<float>& layer = p.layers[n];
    const int32_t* const groups = global_memory(layer.groups);
    const float* const values = packed + layer.weight;
    float* const to = hidden + (n - 1) * layer_size<S>;
    for (int k = threadIdx.x; k < 32 * S::c; k += blockDim.x) {
      const int lane = k % 32, out = lane / 8 + lane / 4 % 2 * 4, in = lane % 4;
      const float* const row = values + k / 32 * square + out * S::width;
      const int slot = swapped(ExactMlp::coefficient_of<S>(groups, k / 32), constant);
      put(to + slot * fragment + 4 * lane, row[in] * ExactMlp::norm_scale(p, packed, n - 1, in),
          row[in + 4] * ExactMlp::norm_scale(p, packed, n - 1, in + 4));
    }
    for (int r = threadIdx.x; r < S::width; r += blockDim.x) {
      float sum = packed[layer.bias + r * S::c + constant];
      for (int k = 0; k < S::c; ++k)
        for (int i = 0; i < S::width && ExactMlp::coefficient_of<S>(groups, k) == constant; ++i)
          sum += values[k * square + r * S::width + i] * ExactMlp::norm_shift<S>(p, packed, n - 1, i);
      to[S::c * fragment + r] = sum;
    }
  }

  // ---- by a warp

  // What a lane has of its two edges: coordinate t of their positions, 0 for t = 3; their attributes.
  struct Inputs {
    float x[2];
    const float* attributes[2];
    float factor[2];  // of what couplings read
  };

  // What couplings read of all channels, in place of the state: in the first 8 slots h, Q and a zero, then d (x, y, z).
  template <typename S>
  __device__ __forceinline__ void evaluate(const Inputs& inputs, float* state) const {
    if (n_layers == 1) return activations<S, true, true>(inputs, state);
    activations<S, true, false>(inputs, state);
    const float* layer = hidden;
#pragma unroll 1
    for (int n = 1; n < n_layers; ++n, layer += layer_size<S>) {
      __syncwarp();
      linear<S>(opaque(layer), state);
      __syncwarp();
      if (n < n_layers - 1)
        activations<S, false, false>(inputs, state);
      else
        activations<S, false, true>(inputs, state);
    }
  }

  static __device__ __forceinline__ Split<2> load(const float* fragments, int n) {
    const auto four = neighbours<4>(fragments + n * fragment + 4 * (threadIdx.x % 32));
    return {{__float_as_uint(four.at[0]), __float_as_uint(four.at[1])},
            {__float_as_uint(four.at[2]), __float_as_uint(four.at[3])}};
  }

  // z = W y + b in the place of y, slot by slot; four of them are one load.
  template <typename S>
  static __device__ __forceinline__ void linear(const float* layer, float* state) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    const float* const bias = layer + S::c * fragment;
#pragma unroll 1
    for (int slot = 0; slot < S::c; slot += 4) {
      Neighbours<float, 4>* places[4];  // edges g and g + 8 of channel t, then of t + 4
      Neighbours<float, 4> y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = pair + i / 2 * 4;
        places[i] = &neighbours<4>(state + GridState::of_edge(group + i % 2 * 8) + channel * GridState::channel + slot);
        y[i] = *places[i];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Split<4> a;
#pragma unroll
        for (int i = 0; i < 4; ++i) a.set(i, y[i].at[k]);
        float z[4] = {0, 0, 0, 0};
        if (k == 0 && slot == 0) z[0] = z[2] = bias[pair], z[1] = z[3] = bias[pair + 4];
        mma_3xtf32(z, a, load(layer, slot + k));
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i].at[k] = z[i / 2 + i % 2 * 2];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) *places[i] = y[i];
    }
  }

  // y = A⁻ φ(A z) in the place of z, or what couplings read of y; of the first layer z is made here.
  template <typename S, bool kFirst, bool kLast>
  __device__ __forceinline__ void activations(const Inputs& inputs, float* state) const {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    float* const rows[2] = {state + GridState::of_edge(group) + 2 * pair,
                            state + GridState::of_edge(group + 8) + 2 * pair};
#pragma unroll 1
    for (int w = 0; w < S::width; w += kTogether) {
      float* places[kTogether][2];  // of the two edges
      Split<4> z[kTogether][2];     // slots below 8 and from there on; of the first layer the position, in z[w][0].big
      float even[kTogether][2];     // of the first layer: E of the two edges
      float y[kTogether][2][4] = {};
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          places[n][i] = rows[i] + (w + n) * GridState::channel;
          if constexpr (kFirst) {
            Split<1> x;
            x.set(0, first[4 * (w + n) + pair] * inputs.x[i]);
            z[n][0].big[i] = x.big[0], z[n][0].big[2 + i] = x.small[0];
            even[n][i] = scalars[w + n];
            for (int k = 1; k < n_scalars; ++k)
              even[n][i] += scalars[k * S::width + w + n] * inputs.attributes[i][k - 1];
          } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const auto two = neighbours<2>(places[n][i] + 8 * half);
              z[n][half].set(i, two.at[0]), z[n][half].set(2 + i, two.at[1]);
            }
          }
        }
      const float* at = opaque(fragments);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {  // 8 pairs of samples each
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          float plus[4] = {0, 0, 0, 0}, minus[4] = {0, 0, 0, 0};  // E and O, then the samples, then sum and difference
          if constexpr (kFirst) {
            const Split<2> b = load(at, of_position + half);
            mma_m16n8k8(minus, z[n][0].big, b.small), mma_m16n8k8(minus, z[n][0].big, b.big);
#pragma unroll
            for (int i = 0; i < 4; ++i) plus[i] = even[n][i / 2];
          } else {
            mma_3xtf32(plus, z[n][0], load(at, of_samples + 3 * half));
            mma_3xtf32(minus, z[n][0], load(at, of_samples + 3 * half + 1));
            mma_3xtf32(minus, z[n][1], load(at, of_samples + 3 * half + 2));
          }
          Split<4> sum, difference;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float upper = Scaled<typename S::Function>::value(plus[i] + minus[i]);
            const float lower = Scaled<typename S::Function>::value(plus[i] - minus[i]);
            const int to = i / 2 + i % 2 * 2;  // from a result's place to that of an A
            sum.set(to, upper + lower), difference.set(to, upper - lower);
          }
          if constexpr (kLast) {
            mma_3xtf32(y[n][0], sum, load(at, of_output + 2 * half));
            mma_3xtf32(y[n][1], difference, load(at, of_output + 2 * half + 1));
          } else {
            mma_3xtf32(y[n][0], sum, load(at, of_inverse + 3 * half));
            mma_3xtf32(y[n][0], difference, load(at, of_inverse + 3 * half + 1));
            mma_3xtf32(y[n][1], difference, load(at, of_inverse + 3 * half + 2));
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Neighbours<float, 2> two = {y[n][half][2 * i], y[n][half][2 * i + 1]};
            if constexpr (kLast) two.at[0] *= inputs.factor[i], two.at[1] *= inputs.factor[i];
            neighbours<2>(places[n][i] + 8 * half) = two;
          }
    }
  }
};

}  // namespace implicit_steer::IST_ISA
