// The gradients of the weights in an exact backward pass. Every warp sums them in global memory of its own, lanes side
// by side, in the form that the kernel computes with: θ, constant, W and b are those that batch norms are folded into.
// At the end its block adds up its warps' sums in their order, undoes the folding, and writes a row of the packed
// weights' gradients, which sum_gradients (vectors.cuh) adds up. So every sum has a fixed order.
#pragma once

#include "exact_warp.cuh"

namespace implicit_steer::IST_ISA {

template <typename S>
struct ExactGradients {
  using Slots = typename S::Slots;
  using Tiles = ExactTiles<S>;
  static constexpr int square = S::width * S::width, of_rows = 4 * S::width;
  // Where each sum begins: [path, v / 8, w / 8, u / 2, lane, (u, w)], [v / 8, u / 8, lane, (u, constant)], [lane],
  // [1 + n_inputs, row / 8, lane]; then layer by layer [c / 2, row / 8, column / 8, lane, (coefficient, column)],
  // [row / 8, lane]; in place of the last three of a table its rows. Lane 4 g + t has v = g and w (or u) = 2 t and 2 t
  // + 1, of eight; of the MLP's weights it has row g and columns 2 t and 2 t + 1, of a row's bias and of the shell a
  // share.
  static constexpr int constant = Slots::paths * Tiles::passes * S::fields / 2 * 128,
                       shell = constant + Tiles::blocks * Tiles::blocks * 128, first = shell + 32;
  static constexpr int of_layer = S::c * square + of_rows;
  static constexpr int aside = 128 * (Tiles::count + Tiles::blocks);  // behind the sums: T of a node that goes on

  const PlanView<float>& p;
  float* const memory;    // of this warp
  const int trivial = 0;  // the coefficient that is the same in all samples, which biases are of

  static IST_HOST_DEVICE int size_of(const PlanView<float>& p) {
    return first + (S::Mlp::is_table ? table_size(p) : (1 + p.n_inputs) * of_rows + (p.n_layers - 1) * of_layer);
  }
  static IST_HOST_DEVICE int table_size(const PlanView<float>& p) {
    return p.n_types * static_cast<int>(splines_per_type(p)) * p.n_read * S::width;
  }
  __device__ __forceinline__ ExactGradients(float* of_warps, int number, const PlanView<float>& p,
                                            const FieldView& view)
      : p(p), memory(of_warps + int64_t{number} * (size_of(p) + aside)), trivial(S::Mlp::trivial(view)) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ void clear() const {
    for (int k = 4 * lane(); k < size_of(p); k += 128) neighbours<4>(memory + k) = {};
  }
  __device__ __forceinline__ float* aside_of_lane() const { return memory + size_of(p) + 4 * lane(); }
  // The four sums of this lane at a place of [lane, 4], and one of [lane].
  __device__ __forceinline__ Neighbours<float, 4>& four(int begin) const {
    return neighbours<4>(memory + begin + 4 * lane());
  }
  __device__ __forceinline__ float& one(int begin) const { return memory[begin + lane()]; }
  // Of a block of fields v and one of channels, and fields u of outputs.
  static IST_HOST_DEVICE constexpr int of_theta(int path, int block, int channel, int two_fields) {
    return ((path * Tiles::passes + block * Tiles::channels + channel) * (S::fields / 2) + two_fields) * 128;
  }
  static IST_HOST_DEVICE constexpr int of_constant(int block, int out_block) {
    return constant + (block * Tiles::blocks + out_block) * 128;
  }
  // Of blocks of rows and of columns.
  __device__ __forceinline__ int of_weights(int layer, int two_coefficients, int rows, int columns) const {
    const int number = (two_coefficients * Tiles::channels + rows) * Tiles::channels + columns;
    return of_bias(layer) - S::c * square + number * 128;
  }
  __device__ __forceinline__ int of_bias(int layer) const {
    return first + (1 + p.n_inputs) * of_rows + layer * of_layer - of_rows;
  }

  // ---- a block's row of gradients, by all its threads, with barriers

  // `memory`: of the block's first warp, of `warps` with sums; write() has the barrier behind it.
  __device__ __forceinline__ void add_warps(int warps) const {
    const int size = size_of(p);
    __syncthreads();
    for (int k = threadIdx.x; k < size; k += blockDim.x) {
      float sum = memory[k];
      for (int w = 1; w < warps; ++w) sum += memory[int64_t{w} * (size + aside) + k];
      memory[k] = sum;
    }
  }

  // Single sums: of θ [path, u, v, w]; of the constant hidden feature [which, u, v]; of b [row] of layer n, or of row
  // `input` of the first layer's weights; of W [coefficient k, row, column].
  __device__ __forceinline__ float theta_sum(int path, int u, int v, int w) const {
    const int row = Tiles::rows_are_channels ? w : v % 8, column = Tiles::rows_are_channels ? v : w % 8;
    return memory[of_theta(path, v / 8, w / 8, u / 2) + 4 * (4 * row + column / 2) + u % 2 * 2 + column % 2];
  }
  __device__ __forceinline__ float constant_sum(int which, int u, int v) const {
    return memory[of_constant(v / 8, u / 8) + 4 * (4 * (v % 8) + u % 8 / 2) + u % 2 * 2 + which];
  }
  __device__ __forceinline__ float lanes_sum(int begin, int row) const {
    const float* const shares = memory + begin + 4 * row;
    return shares[0] + shares[1] + shares[2] + shares[3];
  }
  __device__ __forceinline__ float weight_sum(int layer, int coefficient, int row, int column) const {
    const int k = ExactMlp::slot_of(coefficient, trivial), of_blocks = of_weights(layer, k / 2, row / 8, column / 8);
    return memory[of_blocks + 4 * (4 * (row % 8) + column % 8 / 2) + k % 2 * 2 + column % 2];
  }

  // row: [n_grad]
  __device__ __forceinline__ void write(const FieldView& view, const float* packed, const typename S::Mlp& mlp,
                                        float* row) const {
    for (int k = threadIdx.x; k < p.n_grad; k += blockDim.x) row[k] = 0;
    __syncthreads();
    write_theta(view, mlp, row);
    if constexpr (S::Mlp::is_table) {
      for (int k = threadIdx.x; k < table_size(p); k += blockDim.x) row[p.table_at + k] = memory[first + k];
    } else {
      write_mlp(view, packed, row);
    }
    if (threadIdx.x == 0) {
      float sum = 0;
      for (int k = 0; k < 32; ++k) sum += memory[shell + k];
      const float width = packed[p.shell_at];
      row[p.shell_at] = sum / (width * width * width);
    }
  }

 private:
  __device__ __forceinline__ void write_mlp(const FieldView& view, const float* packed, float* row) const {
    for (int k = threadIdx.x; k < (1 + p.n_inputs) * S::width; k += blockDim.x) {
      const int w = k % S::width;
      const int at = k < S::width ? p.layers[0].bias + w * S::c + trivial : view.first[k - S::width];
      if (at >= 0) row[at] = lanes_sum(first + k / S::width * of_rows, w);
    }
    for (int n = 1; n < p.n_layers; ++n) write_layer(packed, n, row);
    if (p.has_norms) write_norms(view, packed, row);
  }

  __device__ __forceinline__ void write_theta(const FieldView& view, const typename S::Mlp& mlp, float* row) const {
    constexpr int fields = S::fields * S::fields;
#pragma unroll 1  // several at a time would need the number of turns, in a register since copy_theta()
    for (int k = threadIdx.x; k < Slots::paths * fields * S::width; k += blockDim.x) {
      const int w = k % S::width, of_path = k / S::width, path = of_path / fields, u = of_path / S::fields % S::fields,
                v = of_path % S::fields;
      const FieldWeight weight = global_memory(view.theta)[of_path];
      if (weight.at < 0) continue;
      float sum = theta_sum(path, u, v, w) * mlp.scale[w];
      if (path < 2) sum += constant_sum(path, u, v) * mlp.shift[w];
      row[weight.at + w] = weight.ratio * sum;
    }
    for (int k = threadIdx.x; k < 2 * fields; k += blockDim.x) {
      const FieldWeight weight = global_memory(view.constant)[k];
      if (weight.at >= 0)
        row[weight.at] = weight.ratio * constant_sum(k / fields, k / S::fields % S::fields, k % S::fields);
    }
  }

  // W = W' / scale and b = b' - W shift of ExactMlp::copy_layer
  __device__ __forceinline__ void write_layer(const float* packed, int n, float* row) const {
    const LayerView<float>& layer = p.layers[n];
    const int32_t* const groups = global_memory(layer.groups);
    for (int k = threadIdx.x; k < S::c * square; k += blockDim.x) {
      const int coefficient = ExactMlp::coefficient_of<S>(groups, k / square), r = k / S::width % S::width,
                i = k % S::width;
      float sum = weight_sum(n, coefficient, r, i) * ExactMlp::norm_scale(p, packed, n - 1, i);
      if (coefficient == trivial) sum += lanes_sum(of_bias(n), r) * ExactMlp::norm_shift<S>(p, packed, n - 1, i);
      row[layer.weight + k] = sum;
    }
    for (int r = threadIdx.x; r < S::width; r += blockDim.x)
      row[layer.bias + r * S::c + trivial] = lanes_sum(of_bias(n), r);
  }

  // The gradients of all scales and shifts: what multiplies them in the folded weights, times these weights' gradients.
  __device__ __forceinline__ void write_norms(const FieldView& view, const float* packed, float* row) const {
    for (int at = threadIdx.x; at < (p.n_layers - 1) * 2 * S::width; at += blockDim.x) {
      const int n = at / (2 * S::width), w = at % S::width;
      const bool is_shift = at / S::width % 2;
      if (!is_shift || p.n_trivial) row[p.layers[n].affine + at % (2 * S::width)] = of_norm(packed, n + 1, w, is_shift);
    }
    for (int at = threadIdx.x / 32; at < 2 * S::width; at += block_threads() / 32) {
      const bool is_shift = at >= S::width;
      if (is_shift && !p.n_trivial) continue;
      const float sum = of_last_norm(view, packed, at % S::width, is_shift);
      if (lane() == 0) row[p.layers[p.n_layers - 1].affine + at] = sum;
    }
  }
  // By layer n, behind the norm, at channel i.
  __device__ __forceinline__ float of_norm(const float* packed, int n, int i, bool is_shift) const {
    const int32_t* const groups = global_memory(p.layers[n].groups);
    float sum = 0;
    for (int k = 0; k < S::c * S::width; ++k) {
      const int coefficient = ExactMlp::coefficient_of<S>(groups, k / S::width), r = k % S::width;
      const float weight = packed[p.layers[n].weight + k * S::width + i];
      if (!is_shift)
        sum += weight * weight_sum(n, coefficient, r, i);
      else if (coefficient == trivial)
        sum += weight * lanes_sum(of_bias(n), r);
    }
    return sum;
  }
  // By θ, at channel w, by all lanes of a warp.
  __device__ __forceinline__ float of_last_norm(const FieldView& view, const float* packed, int w,
                                                bool is_shift) const {
    constexpr int fields = S::fields * S::fields;
    const int n = (is_shift ? 2 : Slots::paths) * fields;
    float sum = 0;
    for (int k = lane(); k < n; k += 32) {
      const FieldWeight weight = global_memory(view.theta)[k];
      if (weight.at < 0) continue;
      const int path = k / fields, u = k / S::fields % S::fields, v = k % S::fields;
      sum += weight.ratio * packed[weight.at + w] * (is_shift ? constant_sum(path, u, v) : theta_sum(path, u, v, w));
    }
    return sum_lanes(sum, 1, 32);
  }
};

}  // namespace implicit_steer::IST_ISA
