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
  using Number = float;
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
  static constexpr bool is_table = false;
  static constexpr int fragment = 4 * 32;  // numbers: of every lane two elements of B, big parts, then small ones
  static constexpr int of_samples = 0, of_inverse = 6, of_output = 12, of_position = 16, n_fragments = 18;
  static constexpr int transposed = n_fragments;  // where those of the way back begin, grid_mlp_backward.cuh
  static constexpr int kTogether = 2;             // channels

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
  __device__ __forceinline__ void copy(const PlanView<float>& p, const FieldView& view, const float* packed) {
    const GridCoefficients& grid = *global_memory(view.grid);
    const LayerView<float>& layer = p.layers[0];
    const float of_constant = constant_sample(p, grid);
    copy_fragments(p, grid, 0, fragments);
    for (int k = threadIdx.x; k < 4 * S::width; k += blockDim.x) {
      const int at = k % 4 < 3 ? view.first[k % 4 * S::width + k / 4] : -1;
      first[k] = at < 0 ? 0 : packed[at];
    }
    for (int k = threadIdx.x; k < n_scalars * S::width; k += blockDim.x) {
      const int at = k < S::width ? layer.bias + k * S::c + grid.constant : view.first[2 * S::width + k];
      scalars[k] = at < 0 ? 0 : packed[at] * of_constant;
    }
    for (int w = threadIdx.x; w < S::width; w += blockDim.x) {
      scale[w] = norm_scale(p, packed, n_layers - 1, w);
      shift[w] = norm_shift<S>(p, packed, n_layers - 1, w);
    }
    for (int n = 1; n < n_layers; ++n) copy_layer<S>(p, packed, n, grid.constant);
    __syncthreads();
  }

  static __device__ __forceinline__ float constant_sample(const PlanView<float>& p, const GridCoefficients& grid) {
    return global_memory(p.layers[0].pair_samples)[grid.constant] * kLog2e;
  }

  // n_fragments from number `begin` on.
  static __device__ __forceinline__ void copy_fragments(const PlanView<float>& p, const GridCoefficients& grid,
                                                        int begin, float* to) {
    for (int k = threadIdx.x; k < 32 * n_fragments; k += blockDim.x)
      copy_fragment(p, grid, begin + k / 32, k % 32, to + 4 * k);
  }

  static __device__ __forceinline__ int trivial(const FieldView& view) { return global_memory(view.grid)->constant; }

  static __device__ __forceinline__ void put(float* to, float first_element, float second_element) {
    Split<2> split;
    split.set(0, first_element), split.set(1, second_element);
    neighbours<4>(to) = {__uint_as_float(split.big[0]), __uint_as_float(split.big[1]), __uint_as_float(split.small[0]),
                         __uint_as_float(split.small[1])};
  }

  // A lane's part of fragment n of those of samples; from `transposed` on of the transposed matrices.
  static __device__ __forceinline__ void copy_fragment(const PlanView<float>& p, const GridCoefficients& grid, int n,
                                                       int lane, float* to) {
    const LayerView<float>& layer = p.layers[0];
    const int group = lane / 4, row = lane % 4 * 2;  // of elements B[row][group] and B[row + 1][group]
    const float *const samples = global_memory(layer.pair_samples), *const inverse = global_memory(layer.pair_inverse);
    const bool back = n >= transposed;
    if (back) n -= transposed;
    const bool rows_are_pairs = back != (n >= of_inverse && n < of_position);
    float elements[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int other = rows_are_pairs ? group : row + i;
      const int pair = (rows_are_pairs ? row + i : group) + 8 * half_of(n);
      if (pair >= layer.n_pairs) {
        elements[i] = 0;
      } else if (n < of_output) {
        // part 0: of even coefficients, 1 and 2: of odd ones in the slots below 8 and from there on
        const int part = n % 3, slot = other + (part == 2 ? 8 : 0), at = pair * p.c + slot_of(slot, grid.constant);
        const float value = n < of_inverse ? samples[at] * kLog2e : inverse[at] * kLn2;
        elements[i] = (slot >= p.n_even) == (part > 0) ? value : 0;
      } else if (n < of_position) {
        elements[i] = output(grid, inverse + pair * p.c, p.c, n % 2, other);
      } else {
        // On the way forward rows t and t + 4 are coordinate t: A has a number's big part in one column, its small part
        // in the other. On the way back every other column is a coordinate.
        const int coordinate = back ? group / 2 : lane % 4;
        const bool none = coordinate == 3 || (back && group % 2);
        elements[i] = none ? 0 : samples[pair * p.c + grid.position[coordinate]] * kLog2e;
      }
    }
    put(to, elements[0], elements[1]);
  }
  static __device__ __forceinline__ int half_of(int n) {
    return n < of_output ? n / 3 % 2 : n < of_position ? (n - of_output) / 2 : n - of_position;
  }
  // What even or odd numbers that couplings read take of a pair with this row of A⁻.
  static __device__ __forceinline__ float output(const GridCoefficients& grid, const float* inverse, int c, bool odd,
                                                 int number) {
    const int form = number + (odd ? grid.n_even_forms : 0);
    if (form >= (odd ? grid.n_forms : grid.n_even_forms)) return 0;
    float sum = 0;
#pragma unroll 1
    for (int k = 0; k < c; ++k) sum += grid.forms[form][k] * inverse[k];
    return sum * kLn2;
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
      const int slot = slot_of(coefficient_of<S>(groups, k / 32), constant);
      put(to + slot * fragment + 4 * lane, row[in] * norm_scale(p, packed, n - 1, in),
          row[in + 4] * norm_scale(p, packed, n - 1, in + 4));
    }
    for (int r = threadIdx.x; r < S::width; r += blockDim.x) {
      float sum = packed[layer.bias + r * S::c + constant];
      for (int k = 0; k < S::c; ++k)
        for (int i = 0; i < S::width && coefficient_of<S>(groups, k) == constant; ++i)
          sum += values[k * square + r * S::width + i] * norm_shift<S>(p, packed, n - 1, i);
      to[S::c * fragment + r] = sum;
    }
  }

  // ---- by a warp

  // What a lane has of its two edges: coordinate t of their positions, 0 for t = 3; the rows of all edges' attributes.
  struct Inputs {
    float x[2];
    int edge[2];
    const float* attributes;
    float factor[2];  // of what couplings read
  };

  // What a lane has of one of its edges, i, and channel w: slots 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t.
  struct Part {
    int w, i;
    Neighbours<float, 4> slots;
  };

  // What couplings read of all channels, in place of the state: in the first 8 slots h, Q and a zero, then d (x, y, z).
  // keep(layer, what, part): see LayerValue.
  template <typename S, typename Keep>
  __device__ __forceinline__ void evaluate(const Inputs& inputs, Keep keep, float* state) const {
    if (n_layers == 1) return activations<S, true, true>(0, inputs, keep, state);
    activations<S, true, false>(0, inputs, keep, state);
    const float* layer = hidden;
#pragma unroll 1
    for (int n = 1; n < n_layers; ++n, layer += layer_size<S>) {
      __syncwarp();
      linear<S, false>(opaque(layer), state);
      __syncwarp();
      if (n < n_layers - 1)
        activations<S, false, false>(n, inputs, keep, state);
      else
        activations<S, false, true>(n, inputs, keep, state);
    }
  }

  // A lane's elements of B. Each load has a line of its own, by which its executions are counted (bench/executed.py).
  struct alignas(16) Fragment : Split<2> {};
  static __device__ __forceinline__ const Fragment& load(const float* fragments, int n) {
    return reinterpret_cast<const Fragment*>(fragments + n * fragment)[threadIdx.x % 32];
  }

  // Wᵀ of a slot from the fragment of W.
  static __device__ __forceinline__ Fragment load_transposed(const float* fragments, int n) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    const uint32_t* const lanes = reinterpret_cast<const uint32_t*>(fragments) + n * fragment;
    const uint32_t* const at = lanes + 32 * pair + group / 2 * 4 + group % 2;
    return {{{at[0], at[16]}, {at[2], at[18]}}};
  }

  // z = W y + b in the place of y, or Wᵀ y, slot by slot; four of them are one load.
  template <typename S, bool kTransposed>
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
        for (int i = 0; i < 4; ++i) a.place(i, y[i].at[k]);
        float z[4] = {0, 0, 0, 0};
        if (!kTransposed && k == 0 && slot == 0) z[0] = z[2] = bias[pair], z[1] = z[3] = bias[pair + 4];
        const Fragment b = kTransposed ? load_transposed(layer, slot + k) : load(layer, slot + k);
        mma_3xtf32(z, a, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i].at[k] = z[i / 2 + i % 2 * 2];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) *places[i] = y[i];
    }
  }

  // z of a few channels and a lane's two edges: slots below 8 and from there on; of the first layer the position, in
  // slots[0].big, and E of the two edges.
  template <bool kFirst>
  struct Sums {
    Split<4> slots[2][kTogether];
    float even[kTogether][2];

    __device__ __forceinline__ void set(int n, int i, const Neighbours<float, 4>& z) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        slots[half][n].place(i, z.at[2 * half]), slots[half][n].place(2 + i, z.at[2 * half + 1]);
    }
    // Of 8 pairs of samples A z: sums E + O, then differences.
    __device__ __forceinline__ void samples(const float* fragments, int half, float (&sum)[kTogether][4],
                                            float (&difference)[kTogether][4]) const {
      float plus[kTogether][4] = {}, minus[kTogether][4] = {};  // E and O
      if constexpr (kFirst) {
        const Fragment b = load(fragments, of_position + half);
#pragma unroll
        for (int n = 0; n < kTogether; ++n) mma_m16n8k8(minus[n], slots[0][n].big, b.small);
#pragma unroll
        for (int n = 0; n < kTogether; ++n) mma_m16n8k8(minus[n], slots[0][n].big, b.big);
      } else {
        const Fragment of_even = load(fragments, of_samples + 3 * half);
        const Fragment of_odd = load(fragments, of_samples + 3 * half + 1);
        const Fragment of_upper = load(fragments, of_samples + 3 * half + 2);
        mma_3xtf32(plus, slots[0], of_even);
        mma_3xtf32(minus, slots[0], of_odd), mma_3xtf32(minus, slots[1], of_upper);
      }
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float e = kFirst ? even[n][i / 2] : plus[n][i];
          sum[n][i] = e + minus[n][i], difference[n][i] = e - minus[n][i];
        }
    }
  };

  template <typename S>
  __device__ __forceinline__ void first_layer(const Inputs& inputs, int w, int n, int i, Sums<true>& z) const {
    Split<1> x;
    x.place(0, first[4 * (w + n) + threadIdx.x % 4] * inputs.x[i]);
    z.slots[0][n].big[i] = x.big[0], z.slots[0][n].big[2 + i] = x.small[0];
    z.even[n][i] = scalars[w + n];
    const float* const attributes = inputs.attributes + int64_t{inputs.edge[i]} * (n_scalars - 1);
#pragma unroll 1
    for (int k = 1; k < n_scalars; ++k) z.even[n][i] += scalars[k * S::width + w + n] * attributes[k - 1];
  }

  // Where a lane's slots of its two edges and the first channel are.
  static __device__ __forceinline__ float* row(float* state, int i) {
    return state + GridState::of_edge(threadIdx.x % 32 / 4 + 8 * i) + 2 * (threadIdx.x % 4);
  }

  // From numbers of 8 pairs of samples, in a result's places, to their sums and differences in those of an A.
  struct Pairs {
    Split<4> sum[kTogether], difference[kTogether];
    __device__ __forceinline__ void set(int n, int i, float upper, float lower) {
      const int to = i / 2 + i % 2 * 2;
      sum[n].place(to, upper + lower), difference[n].place(to, upper - lower);
    }
  };

  // y = A⁻ φ(A z) in the place of z, or what couplings read of y; of the first layer z is made here.
  template <typename S, bool kFirst, bool kLast, typename Keep>
  __device__ __forceinline__ void activations(int layer, const Inputs& inputs, Keep keep, float* state) const {
    float* const rows[2] = {row(state, 0), row(state, 1)};
#pragma unroll 1
    for (int w = 0; w < S::width; w += kTogether) {
      float* places[kTogether][2];  // of the two edges
      Sums<kFirst> z;
      float y[2][kTogether][4] = {};
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          places[n][i] = rows[i] + (w + n) * GridState::channel;
          if constexpr (kFirst) {
            first_layer<S>(inputs, w, n, i, z);
          } else {
            const auto lower = neighbours<2>(places[n][i]), upper = neighbours<2>(places[n][i] + 8);
            const Part part{w + n, i, {lower.at[0], lower.at[1], upper.at[0], upper.at[1]}};
            z.set(n, i, part.slots), keep(layer, kLayerSums, part);
          }
        }
      const float* at = opaque(fragments);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {  // 8 pairs of samples each
        float upper[kTogether][4], lower[kTogether][4];
        z.samples(at, half, upper, lower);
        Pairs of;
#pragma unroll
        for (int n = 0; n < kTogether; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            of.set(n, i, Scaled<typename S::Function>::value(upper[n][i]),
                   Scaled<typename S::Function>::value(lower[n][i]));
        if constexpr (kLast) {
          const Fragment even = load(at, of_output + 2 * half);
          const Fragment odd = load(at, of_output + 2 * half + 1);
          mma_3xtf32(y[0], of.sum, even), mma_3xtf32(y[1], of.difference, odd);
        } else {
          const Fragment even = load(at, of_inverse + 3 * half);
          const Fragment odd = load(at, of_inverse + 3 * half + 1);
          const Fragment upper_odd = load(at, of_inverse + 3 * half + 2);
          mma_3xtf32(y[0], of.sum, even);
          mma_3xtf32(y[0], of.difference, odd), mma_3xtf32(y[1], of.difference, upper_odd);
        }
      }
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Part part{w + n, i, {y[0][n][2 * i], y[0][n][2 * i + 1], y[1][n][2 * i], y[1][n][2 * i + 1]}};
          if constexpr (kLast) {
#pragma unroll
            for (int k = 0; k < 4; ++k) part.slots.at[k] *= inputs.factor[i];
          } else {
            keep(layer + 1, kLayerInputs, part);
          }
          neighbours<2>(places[n][i]) = {part.slots.at[0], part.slots.at[1]};
          neighbours<2>(places[n][i] + 8) = {part.slots.at[2], part.slots.at[3]};
        }
    }
  }
};

}  // namespace implicit_steer::IST_ISA
