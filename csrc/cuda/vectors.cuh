// Kernels on vectors of numbers: sums in a fixed order, and the packing of parameters (packing.h).
#pragma once

#include "../packing.h"
#include "call.h"
#include "compat.cuh"
#include "library.h"

namespace implicit_steer::IST_ISA {

__device__ __forceinline__ int64_t thread_number() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// ---- sums of rows, in an order that depends on the number of rows alone

constexpr int kColumns = 32, kRows = 16;  // of a block's threads

// out[c, k] = Σ rows[r, k] over the rows r of chunk c, for k < n; 0 for n <= k < n_out.
template <typename R, typename Sum>
struct RowSums {
  const R* rows;
  int64_t n_rows, n, rows_per_chunk;
  Sum* out;
  int64_t n_out;

  IST_HOST_DEVICE int64_t tiles() const { return (n_out + kColumns - 1) / kColumns; }
  int64_t blocks() const { return out ? tiles() * ((n_rows + rows_per_chunk - 1) / rows_per_chunk) : 0; }

  __device__ __forceinline__ void run(int64_t block) const {
    __shared__ Sum sums[kRows][kColumns];
    const int64_t chunk = block / tiles(), k = block % tiles() * kColumns + threadIdx.x;
    const int64_t begin = chunk * rows_per_chunk,
                  end = begin + rows_per_chunk < n_rows ? begin + rows_per_chunk : n_rows;
    Sum sum{};
    for (int64_t r = begin + threadIdx.y; r < end && k < n; r += kRows) sum += rows[r * n + k];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || k >= n_out) return;
    for (int r = 1; r < kRows; ++r) sum += sums[r][threadIdx.x];
    out[chunk * n_out + k] = sum;
  }
};
template <typename R, typename Sum>
__global__ void sum_rows(const __grid_constant__ RowSums<R, Sum> sums) {
  sums.run(blockIdx.x);
}

// grad_x[j, k] = Σ grad_edge[e, k] over the edges e out of j
template <typename R, typename Index>
struct SourceSums {
  const R* grad_edge;
  const Index *order, *colptr;
  int64_t n_src;
  int n;
  R* grad_x;

  int64_t blocks() const { return grad_x ? (n_src * n + kColumns * kRows - 1) / (kColumns * kRows) : 0; }

  __device__ __forceinline__ void run(int64_t block) const {
    const int64_t at = (block * kRows + threadIdx.y) * kColumns + threadIdx.x;
    if (at >= n_src * n) return;
    const int64_t j = at / n, k = at % n, end = colptr[j + 1];
    R sum{};
    for (int64_t i = colptr[j]; i < end; ++i) sum += grad_edge[static_cast<int64_t>(order[i]) * n + k];
    grad_x[at] = sum;
  }
};

// What follows the kernel of a backward pass, in one launch: the sum of the warps' gradients of the weights, that of
// the edges' gradients of the features, and those of the output's gradient over chunks of nodes.
template <typename R, typename Index>
__global__ void sum_gradients(const __grid_constant__ RowSums<R, R> weights,
                              const __grid_constant__ RowSums<R, R> nodes, int64_t weights_blocks, int64_t nodes_blocks,
                              const __grid_constant__ SourceSums<R, Index> features) {
  int64_t block = blockIdx.x;
  if (block < weights_blocks) return weights.run(block);
  if ((block -= weights_blocks) < nodes_blocks) return nodes.run(block);
  features.run(block - nodes_blocks);
}

// What the kernel of a forward pass finds in place when it finishes its nodes itself (field_call.h): the bias of every
// output, expansion · bias, and counters at 0.
template <typename R>
struct NodeStart {
  MeanAndBias<R> after;
  R* bias;
  int64_t width;
  int32_t* arrivals;
  int64_t n_arrivals;

  int64_t size() const { return width + n_arrivals; }
  __device__ __forceinline__ void run(int64_t i) const {
    if (i < n_arrivals) arrivals[i] = 0;
    const int64_t k = i - n_arrivals;
    if (k >= 0 && k < width) bias[k] = after.with_bias(R{}, k);
  }
};

// ---- packing: one thread for each packed weight, for each of the norms' statistics where they are wanted, and for
// each number of `start`

template <typename R>
__global__ void pack_weights(const __grid_constant__ PlanView<R> plan, const __grid_constant__ SparseMatrix<R> matrix,
                             const __grid_constant__ Pieces<const R> parameters,
                             const __grid_constant__ NormStatistics<R> norms, R* packed, R* statistics,
                             const __grid_constant__ NodeStart<R> start) {
  int64_t i = thread_number();
  if (i < matrix.n_rows) {
    packed[i] = packed_weight(plan, matrix, i, parameters, norms);
    return;
  }
  i -= matrix.n_rows;
  const int64_t n_statistics = statistics ? plan.n_layers * statistics_size(plan) : 0;
  if (i < n_statistics)
    statistics[i] = norm_statistic(plan, norms, i);
  else
    start.run(i - n_statistics);
}

// of_bias[m] = Σ expansion[k, m] · sums[c, k] over the chunks c of nodes and the outputs k
template <typename R>
struct BiasGradient {
  const R *expansion, *sums;
  int64_t n_chunks, width, n;
  R* out;

  __device__ __forceinline__ void run(int64_t m) const {
    R total{};
    for (int64_t k = 0; k < width; ++k) {
      const R factor = expansion[k * n + m];
      if (factor == 0) continue;
      R sum{};
      for (int64_t c = 0; c < n_chunks; ++c) sum += sums[c * width + k];
      total += factor * sum;
    }
    out[m] = total;
  }
};

// One thread for each parameter, and for each number of the bias.
template <typename R>
__global__ void unpack_gradients(const __grid_constant__ PlanView<R> plan,
                                 const __grid_constant__ SparseMatrix<R> transposed, const R* statistics, const R* grad,
                                 const __grid_constant__ Pieces<R> out, const __grid_constant__ BiasGradient<R> bias) {
  const int64_t j = thread_number();
  if (j < transposed.n_rows)
    out[j] = transposed.multiply_row(j, grad) + norm_gradient(plan, j, statistics, grad);
  else if (j - transposed.n_rows < bias.n)
    bias.run(j - transposed.n_rows);
}

// Weights and their tangents side by side, [n_weights, 2]. `tangent` holds every weight of θ in its first place only.
template <typename R>
__global__ void pair_weights(const __grid_constant__ PlanView<R> plan, const R* weights, const R* tangent, R* pairs) {
  const int64_t k = thread_number();
  if (k >= plan.n_weights) return;
  pairs[2 * k] = weights[k];
  pairs[2 * k + 1] = k < plan.n_grad ? tangent[k] : 0;
  if (k < plan.n_grad) return;
  const CouplingView* q = plan.couplings;
  for (int n = 1; n < plan.n_couplings && plan.couplings[n].theta_forward <= k; ++n) q = plan.couplings + n;
  const int64_t at = k - q->theta_forward, of_b = q->depthwise ? q->n_hidden * q->out_stride : q->forward_size();
  const int64_t b = at / of_b;
  const int place = static_cast<int>(at % of_b);
  const int panel = q->depthwise ? static_cast<int>(of_b) : kPanel * q->n_in * q->n_hidden;
  const int first = place / panel * kPanel, width = q->depthwise ? q->out_stride : q->panel_width(first);
  const int row = place % panel / width, u = first + place % panel % width;  // row: [v][w]; [w]
  const int v = q->depthwise ? u : row / q->n_hidden, w = row % q->n_hidden;
  if (u >= q->n_out) return;
  const int64_t of_u = b * q->theta_rows + (q->depthwise ? 0 : u);
  pairs[2 * k + 1] = tangent[q->theta + of_u * q->theta_size + v * q->hidden_stride + w];
}

}  // namespace implicit_steer::IST_ISA
