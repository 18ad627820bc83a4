// Layers with many fields: what happens to whole nodes around the products of T with θ. One thread for each number.
#pragma once

#include "vectors.cuh"
#include "wide_call.h"

namespace implicit_steer::IST_ISA {

// Features by field type, 0 in the padding.
template <typename N>
__global__ void __launch_bounds__(kThreads) wide_features(const __grid_constant__ WideCall<N> call, N* x) {
  const int64_t item = thread_number(), n = call.plan.n_gathered;
  if (item >= call.args.n_src * n) return;
  const int32_t from = call.plan.gathered_from[item % n];
  const int64_t at = item / n * call.plan.in_size + from;
  if (from < 0)
    x[item] = N{};
  else if constexpr (is_dual<N>)
    x[item] = N{call.args.x[at], call.args.x_tangent[at]};
  else
    x[item] = call.args.x[at];
}

// The output of the block's nodes: sums over the slots in their order, then mean and bias.
template <typename N>
__global__ void __launch_bounds__(kThreads)
    wide_outputs(const __grid_constant__ WideCall<N> call, const __grid_constant__ MeanAndBias<Real<N>> after) {
  using R = Real<N>;
  constexpr int kParts = sizeof(N) / sizeof(R);  // of T's numbers and the weights: T's tangent meets the weight
  const PlanView<R>& p = call.plan;
  const int64_t item = thread_number(), node = item / p.out_size, k = item % p.out_size;
  if (node >= call.n_nodes) return;
  const int place = p.mixed_place[k];
  R sum{};
  const int begin = place < 0 ? 0 : call.lists.slots_first[place / kChannels],
            end = place < 0 ? 0 : call.lists.slots_first[place / kChannels + 1];
#pragma unroll 1
  for (int s = begin; s < end; ++s) {
    const WideSlot& slot = call.lists.slots[call.lists.slots_of[s]];
    const int u = place - slot.place;
    if (!slot.depthwise) {
      sum += call.outputs[call.at(slot.out_at, node, slot.n_out) + u];
      continue;
    }
    const R *const weight = call.args.weights + int64_t{kParts} * (slot.theta + u * slot.hidden_stride),
                   *const of_node = call.sums + kParts * (call.at(slot.at, node, slot.size) + u * slot.hidden_stride);
    for (int w = 0; w < kParts * slot.hidden_stride; ++w) sum += weight[w] * of_node[w];
  }
  const int64_t edges = call.first_edge(node + 1) - call.first_edge(node);
  if (after.mean && edges > 1) sum /= static_cast<R>(edges);
  call.args.out[(call.first_node + node) * p.out_size + k] = after.with_bias(sum, k);
}

// The gradient of the outputs by slot.
template <typename N>
__global__ void __launch_bounds__(kThreads)
    wide_grad_outputs(const __grid_constant__ WideCall<N> call, int64_t outputs, Real<N>* grad) {
  const int64_t item = thread_number();
  if (item >= outputs * call.n_nodes) return;
  const WideSlot* slot = call.lists.slots;
  for (int s = 1; s < call.lists.n_slots && slot[1].out_at * call.n_nodes <= item; ++s) ++slot;
  const int64_t of_slot = item - slot->out_at * call.n_nodes, node = of_slot / slot->n_out;
  const int32_t k = call.lists.output[slot->place + of_slot % slot->n_out];
  const int64_t edges = call.mean ? call.first_edge(node + 1) - call.first_edge(node) : 1;
  const int64_t at = (call.first_node + node) * call.plan.out_size + k;
  grad[item] = k < 0 ? Real<N>{} : call.args.grad_out[at] / static_cast<Real<N>>(edges > 1 ? edges : 1);
}

// dT[slot, v, w] = θ[b][v, w] g[o, v] of depthwise couplings
template <typename N>
__global__ void __launch_bounds__(kThreads)
    wide_grad_sums_depthwise(const __grid_constant__ WideCall<N> call, int number, N* grad) {
  const WideSlot& slot = call.lists.slots[number];
  const int64_t item = thread_number(), node = item / slot.size, x = item % slot.size;
  if (node >= call.n_nodes) return;
  const int64_t v = x / slot.hidden_stride;
  const N* const weights = reinterpret_cast<const N*>(call.args.weights);
  grad[call.at(slot.at, node, slot.size) + x] =
      v < slot.n_in ? weights[slot.theta + x] * call.grad_outputs[call.at(slot.out_at, node, slot.n_out) + v] : N{};
}

// dθ[b][v, w] = Σ g[o, v] T[slot, v, w] of a depthwise coupling, over the slots number .. last - 1 of b and all nodes
constexpr int kGradColumns = 32, kGradRows = 32;  // of a block's threads
template <typename N>
__global__ void __launch_bounds__(1024)
    wide_grad_theta_depthwise(const __grid_constant__ WideCall<N> call, int number, int last, Real<N>* grad) {
  using R = Real<N>;
  __shared__ R sums[kGradRows][kGradColumns];
  const int x = static_cast<int>(blockIdx.x) * kGradColumns + threadIdx.x;
  R sum{};
  for (int s = number; s < last; ++s) {
    const WideSlot& slot = call.lists.slots[s];
    const int v = x / slot.hidden_stride;
    const R* const of_slot = call.sums + call.at(slot.at, 0, slot.size) + x;
    const R* const of_out = call.grad_outputs + call.at(slot.out_at, 0, slot.n_out) + v;
#pragma unroll 4
    for (int64_t node = threadIdx.y; node < call.n_nodes && v < slot.n_in; node += kGradRows)
      sum += of_slot[node * slot.size] * of_out[node * slot.n_out];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || x >= call.lists.slots[number].size) return;
  for (int r = 1; r < kGradRows; ++r) sum += sums[r][threadIdx.x];
  grad[x] = sum;
}

// sum[k] += term[k]
template <typename R>
__global__ void __launch_bounds__(kThreads) add_numbers(R* sum, const R* term, int64_t n) {
  const int64_t k = thread_number();
  if (k < n) sum[k] += term[k];
}

template <typename R>
__global__ void __launch_bounds__(kThreads) clear_numbers(R* numbers, int64_t n) {
  const int64_t k = thread_number();
  if (k < n) numbers[k] = R{};
}

}  // namespace implicit_steer::IST_ISA
