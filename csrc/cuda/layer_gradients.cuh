// The gradients of the MLP's weights in an exact backward pass. Every warp sums them in global memory of its own, lanes
// side by side, in the form that the kernel computes with: W and b are those that batch norms are folded into. At the
// end its block adds up its warps' sums in their order, undoes the folding, and writes a row of the packed weights'
// gradients, which sum_gradients (vectors.cuh) adds up. So every sum has a fixed order.
#pragma once

#include "exact_mlp.cuh"

namespace implicit_steer::IST_ISA {

// kBegin: numbers of a warp in front of these. Where each sum begins: [lane] of the shell, [1 + n_inputs, row / 8,
// lane]; then layer by layer [c / 2, row / 8, column / 8, lane, (coefficient, column)], [row / 8, lane]; in place of
// the last three of a table its rows. Of the MLP's weights lane 4 g + t has row g and columns 2 t and 2 t + 1, of a
// row's bias and of the shell a share.
template <typename S, int kBegin>
struct LayerGradients {
  using N = typename S::Number;
  static constexpr int square = S::width * S::width, of_rows = 4 * S::width, channels = S::width / 8;
  static constexpr int shell = kBegin, first = shell + 32;
  static constexpr int of_layer = S::c * square + of_rows;

  // Of a warp's numbers.
  static IST_HOST_DEVICE int size_of(const PlanView<float>& p) {
    return first + (S::Mlp::is_table ? table_size(p) : (1 + p.n_inputs) * of_rows + (p.n_layers - 1) * of_layer);
  }
  static IST_HOST_DEVICE int table_size(const PlanView<float>& p) {
    return p.n_types * static_cast<int>(splines_per_type(p)) * p.n_read * S::width;
  }
  const PlanView<float>& p;
  N* const memory;        // of this warp
  const int trivial = 0;  // the coefficient that is the same in all samples, which biases are of

  // `of_warps`: of all warps, `stride` numbers each.
  __device__ __forceinline__ LayerGradients(N* of_warps, int number, int stride, const PlanView<float>& p,
                                            const FieldView& view)
      : p(p), memory(of_warps + int64_t{number} * stride), trivial(S::Mlp::trivial(view)) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ void clear() const {
    for (int k = 4 * lane(); k < size_of(p); k += 128) neighbours<4>(memory + k) = {};
  }
  // The four sums of this lane at a place of [lane, 4], and one of [lane].
  __device__ __forceinline__ Neighbours<N, 4>& four(int begin) const {
    return neighbours<4>(memory + begin + 4 * lane());
  }
  __device__ __forceinline__ N& one(int begin) const { return memory[begin + lane()]; }
  // Of blocks of rows and of columns.
  __device__ __forceinline__ int of_weights(int layer, int two_coefficients, int rows, int columns) const {
    const int number = (two_coefficients * channels + rows) * channels + columns;
    return of_bias(layer) - S::c * square + number * 128;
  }
  __device__ __forceinline__ int of_bias(int layer) const {
    return first + (1 + p.n_inputs) * of_rows + layer * of_layer - of_rows;
  }

  // ---- a block's row of gradients, by all its threads, with barriers

  // `memory`: of the block's first warp, of `warps` with sums; write() has the barrier behind it.
  __device__ __forceinline__ void add_warps(int warps, int stride) const {
    const int size = size_of(p);
    __syncthreads();
    for (int k = 4 * threadIdx.x; k < size; k += 4 * blockDim.x) {
      auto sum = neighbours<4>(memory + k);
#pragma unroll 1
      for (int w = 1; w < warps; ++w) sum = sum_of(sum, neighbours<4>(memory + w * stride + k));
      neighbours<4>(memory + k) = sum;
    }
  }

  // Single sums: of b [row] of layer n, or of row `input` of the first layer's weights; of W [the plan's coefficient,
  // row, column].
  __device__ __forceinline__ N lanes_sum(int begin, int row) const {
    const N* const shares = memory + begin + 4 * row;
    return shares[0] + shares[1] + shares[2] + shares[3];
  }
  __device__ __forceinline__ N weight_sum(int layer, int coefficient, int row, int column) const {
    const int k = slot_of(place_of_coefficient<S>(p, coefficient), trivial),
              of_blocks = of_weights(layer, k / 2, row / 8, column / 8);
    return memory[of_blocks + 4 * (4 * (row % 8) + column % 8 / 2) + k % 2 * 2 + column % 2];
  }

  __device__ __forceinline__ void clear_row(float* row) const {
    for (int k = threadIdx.x; k < p.n_grad; k += blockDim.x) row[k] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void write_shell(const N* packed, float* row) const {
    if (threadIdx.x == 0) {
      N sum{};
      for (int k = 0; k < 32; ++k) sum += memory[shell + k];
      const N width = packed[p.shell_at];
      row[p.shell_at] = result(sum / (width * width * width));
    }
  }
  // The numbers of the MLP, but for those of the last batch norm, or of the table, of a row of gradients, [n_grad].
  __device__ __forceinline__ void write_layers(const FieldView& view, const N* packed, float* row) const {
    if constexpr (S::Mlp::is_table) {
      for (int k = threadIdx.x; k < table_size(p); k += blockDim.x) row[p.table_at + k] = result(memory[first + k]);
    } else {
      write_mlp(view, packed, row);
    }
  }

 private:
  __device__ __forceinline__ void write_mlp(const FieldView& view, const N* packed, float* row) const {
    for (int k = threadIdx.x; k < (1 + p.n_inputs) * S::width; k += blockDim.x) {
      const int w = k % S::width;
      const int at = k < S::width ? p.layers[0].bias + w * p.c + trivial : view.first[k - S::width];
      if (at >= 0) row[at] = result(lanes_sum(first + k / S::width * of_rows, w));
    }
    for (int n = 1; n < p.n_layers; ++n) write_layer(packed, n, row);
    if (p.has_norms) write_hidden_norms(packed, row);
  }

  // W = W' / scale and b = b' - W shift of ExactMlp::copy_layer
  __device__ __forceinline__ void write_layer(const N* packed, int n, float* row) const {
    const LayerView<float>& layer = p.layers[n];
    const int32_t* const groups = global_memory(layer.groups);
    for (int k = threadIdx.x; k < p.c * square; k += blockDim.x) {
      const int coefficient = coefficient_of<S>(groups, k / square), r = k / S::width % S::width, i = k % S::width;
      N sum = weight_sum(n, coefficient, r, i) * norm_scale(p, packed, n - 1, i);
      if (coefficient == trivial) sum += lanes_sum(of_bias(n), r) * norm_shift<S>(p, packed, n - 1, i);
      row[layer.weight + k] = result(sum);
    }
    for (int r = threadIdx.x; r < S::width; r += blockDim.x)
      row[layer.bias + r * p.c + trivial] = result(lanes_sum(of_bias(n), r));
  }

  // The gradients of scales and shifts: what multiplies them in the folded weights, times these weights' gradients.
  __device__ __forceinline__ void write_hidden_norms(const N* packed, float* row) const {
    for (int at = threadIdx.x; at < (p.n_layers - 1) * 2 * S::width; at += blockDim.x) {
      const int n = at / (2 * S::width), w = at % S::width;
      const bool is_shift = at / S::width % 2;
      if (!is_shift || p.n_trivial)
        row[p.layers[n].affine + at % (2 * S::width)] = result(of_norm(packed, n + 1, w, is_shift));
    }
  }
  // By layer n, behind the norm, at channel i.
  __device__ __forceinline__ N of_norm(const N* packed, int n, int i, bool is_shift) const {
    const int32_t* const groups = global_memory(p.layers[n].groups);
    N sum{};
    for (int k = 0; k < p.c * S::width; ++k) {
      const int coefficient = coefficient_of<S>(groups, k / S::width), r = k % S::width;
      const N weight = packed[p.layers[n].weight + k * S::width + i];
      if (!is_shift)
        sum += weight * weight_sum(n, coefficient, r, i);
      else if (coefficient == trivial)
        sum += weight * lanes_sum(of_bias(n), r);
    }
    return sum;
  }
};

}  // namespace implicit_steer::IST_ISA
