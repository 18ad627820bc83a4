// Kernels on vectors of numbers: sums in a fixed order, and the packing of parameters (packing.h).
#pragma once

#include "../packing.h"
#include "call.h"
#include "compat.cuh"

namespace implicit_steer::IST_ISA {

__device__ __forceinline__ int64_t thread_number() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

constexpr int kColumns = 32, kRows = 16;

// out[k] = Σ rows[r, k] for k < n, in an order that depends on n_rows alone; 0 for n <= k < n_out. Blocks of kColumns x
// kRows threads.
template <typename R, typename Sum>
__global__ void sum_rows(const R* rows, int64_t n_rows, int64_t n, Sum* out, int64_t n_out) {
  __shared__ Sum sums[kRows][kColumns];
  const int64_t k = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  Sum sum{};
  for (int64_t r = threadIdx.y; r < n_rows && k < n; r += kRows) sum += rows[r * n + k];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || k >= n_out) return;
  for (int r = 1; r < kRows; ++r) sum += sums[r][threadIdx.x];
  out[k] = sum;
}

// grad_x[j, k] = Σ grad_edge[e, k] over the edges e out of j
template <typename R, typename Index>
__global__ void sum_by_source(const R* grad_edge, const Index* order, const Index* colptr, int64_t n_src, int n,
                              R* grad_x) {
  const int64_t at = thread_number();
  if (at >= n_src * n) return;
  const int64_t j = at / n, k = at % n, end = colptr[j + 1];
  R sum{};
  for (int64_t i = colptr[j]; i < end; ++i) sum += grad_edge[static_cast<int64_t>(order[i]) * n + k];
  grad_x[at] = sum;
}

// out[i, k] / (edges into i), if `mean`, + Σ expansion[k, n] bias[n]
template <typename R, typename Index>
__global__ void finish_nodes(const Index* rowptr, int64_t n_dst, int width, const R* expansion, const R* bias,
                             int64_t n_bias, bool mean, R* out) {
  const int64_t at = thread_number();
  if (at >= n_dst * width) return;
  const int64_t i = at / width, edges = rowptr[i + 1] - rowptr[i];
  R shift{};
  for (int64_t n = 0; n < n_bias; ++n) shift += expansion[at % width * n_bias + n] * bias[n];
  out[at] = (mean && edges > 1 ? out[at] / static_cast<R>(edges) : out[at]) + shift;
}

template <typename R>
__global__ void multiply(const __grid_constant__ SparseMatrix<R> matrix, const R* in, R* out) {
  const int64_t i = thread_number();
  if (i < matrix.n_rows) out[i] = matrix.multiply_row(i, in);
}

// One thread for each channel of every batch norm.
template <typename R>
__global__ void pack_norms(const __grid_constant__ PlanView<R> plan, const R* parameters, const R* statistics,
                           R* packed) {
  const int64_t at = thread_number(), channels = plan.layers[0].out_size / plan.c;
  if (at >= channels * plan.n_layers) return;
  pack_channel(plan, static_cast<int>(at / channels), static_cast<int>(at % channels), parameters, statistics, packed);
}
template <typename R>
__global__ void pack_norms_backward(const __grid_constant__ PlanView<R> plan, const R* statistics, const R* grad,
                                    R* grad_parameters) {
  const int64_t at = thread_number(), channels = plan.layers[0].out_size / plan.c;
  if (at >= channels * plan.n_layers) return;
  const int n = static_cast<int>(at / channels), w = static_cast<int>(at % channels);
  pack_channel_backward(plan, n, w, statistics, grad, grad_parameters);
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
  const int64_t at = k - q->theta_forward, u = at % q->out_stride, w = at / q->out_stride % q->n_hidden;
  const int64_t v = at / q->out_stride / q->n_hidden % q->n_in, b = at / q->out_stride / q->n_hidden / q->n_in;
  if (u < q->n_out)
    pairs[2 * k + 1] = tangent[q->theta + (b * q->n_out + u) * q->theta_size + v * q->hidden_stride + w];
}

}  // namespace implicit_steer::IST_ISA
