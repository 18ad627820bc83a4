// What the operators of conv_ops.cpp and layer_ops.cpp share: their arguments and results as the loops of cpu/ take
// them. Their callers (native/convolution.py) have validated shapes and indices; what is checked here keeps memory
// safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "../cpu/entry.h"
#include "arguments.h"

namespace implicit_steer {

inline void check_size(int64_t found, int64_t given, const char* name) {
  STD_TORCH_CHECK(found == given, name, ": expected ", found, ", got ", given, ".");
}

// Below this many edges per thread, waking a second thread costs more than it saves.
constexpr int64_t kTileEdgesPerThread = 192;

// Memory of one thread that its calls share; only ever grows.
inline void* scratch(int64_t bytes) {
  struct Buffer {
    void* memory = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    std::free(buffer.memory);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.memory = std::aligned_alloc(64, buffer.size);
    if (!buffer.memory) std::abort();  // inside a parallel region: no exception can leave it
  }
  return buffer.memory;
}

inline int threads_for(int64_t edges) {
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  return static_cast<int>(std::clamp<int64_t>(edges / kTileEdgesPerThread, 1, most));
}

template <typename R>
const ConvTable<R>& table(int64_t wanted) {
  return conv_table<R>(instruction_set(wanted));
}

template <typename R>
void read_plan(Plan<R>& plan, const Tensor& ints, const Tensor& reals) {
  STD_TORCH_CHECK(ints.scalar_type() == ScalarType::Int && ints.is_contiguous(), "plan_ints: expected int32.");
  check(reals, "plan_reals", sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double, reals.numel());
  const bool valid = plan_view(plan, data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel());
  STD_TORCH_CHECK(valid, "plan_ints, plan_reals: not what ops/native/arrays.py writes.");
}

// The part of the arguments that forward and backward share.
template <typename R>
ConvArgs<R> graph_arguments(PlanView<R>& plan, const Tensor& weights, const Tensor& x, const Tensor& delta,
                            const Tensor& attr, const Tensor& src, const Tensor& order, const Tensor& rowptr) {
  ConvArgs<R> a{};
  const ScalarType real = weights.scalar_type(), index = src.scalar_type();
  a.n_edges = src.numel(), a.n_src = x.size(0), a.n_dst = rowptr.numel() - 1;
  check(weights, "weights", real, plan.n_weights);
  check(x, "x", real, a.n_src * plan.in_size);
  check(delta, "delta", real, a.n_edges * plan.dim);
  check(attr, "attr", real, a.n_edges * plan.n_attr);
  STD_TORCH_CHECK(index == ScalarType::Int || index == ScalarType::Long, "src: expected int32 or int64.");
  check(src, "src", index, a.n_edges), check(order, "order", index, a.n_edges);
  check(rowptr, "rowptr", index, a.n_dst + 1);
  a.plan = &plan, a.weights = data<R>(weights), a.x = data<R>(x), a.delta = data<R>(delta), a.attr = data<R>(attr);
  a.src = src.const_data_ptr(), a.order = order.const_data_ptr(), a.rowptr = rowptr.const_data_ptr();
  a.index64 = index == ScalarType::Long, a.threads = threads_for(a.n_edges), a.scratch = scratch;
  return a;
}

// The number of edges into node i, at least 1.
template <typename R>
R divisor(const ConvArgs<R>& a, int64_t i) {
  return static_cast<R>(std::max<int64_t>(a.index(a.rowptr, i + 1) - a.index(a.rowptr, i), 1));
}

// What follows the sums over the edges: the mean over them if `mean`, then + expansion [C_out, n] · bias [n].
template <typename R>
void finish_nodes(const ConvArgs<R>& a, const Tensor& expansion, const Tensor& bias, bool mean) {
  const int64_t width = a.plan->out_size, n = bias.numel();
  check(bias, "bias", sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double, n);
  check(expansion, "expansion", bias.scalar_type(), width * n);
  if (n == 0 && !mean) return;
  std::vector<R> shift(width);
  for (int64_t k = 0; k < width * n; ++k) shift[k / n] += data<R>(expansion)[k] * data<R>(bias)[k % n];
  for (int64_t i = 0; i < a.n_dst; ++i) {
    const R edges = mean ? divisor(a, i) : R{1};
    for (int64_t k = 0; k < width; ++k) a.out[i * width + k] = a.out[i * width + k] / edges + shift[k];
  }
}

// The arguments of a call without neighbours.
template <typename R>
ConvArgs<R> point_arguments(PlanView<R>& plan, const Tensor& weights, const Tensor& delta, const Tensor& attr) {
  ConvArgs<R> a{};
  a.n_edges = delta.size(0);
  check(weights, "weights", delta.scalar_type(), plan.n_weights);
  check(delta, "delta", delta.scalar_type(), a.n_edges * plan.dim);
  check(attr, "attr", delta.scalar_type(), a.n_edges * plan.n_attr);
  a.plan = &plan, a.weights = data<R>(weights), a.delta = data<R>(delta), a.attr = data<R>(attr);
  a.threads = threads_for(a.n_edges), a.scratch = scratch;
  return a;
}

// What a backward pass gives: gradients of x, delta, attr and weights, those that are not wanted empty; and its memory.
struct Gradients {
  Tensor x, delta, attr, weights;
  Tensor of_edges, of_threads;  // x's gradient edge by edge; that of the weights thread by thread

  // Hands their memory to a call.
  template <typename R>
  void bind(ConvArgs<R>& a, const Tensor& like, bool need_x, bool need_delta, bool need_attr, bool need_weights) {
    const PlanView<R>& plan = *a.plan;
    const auto empty = [&](int64_t rows, int64_t columns) { return new_empty(like, {rows, columns}); };
    x = empty(need_x ? a.n_src : 0, plan.in_size);
    of_edges = empty(need_x ? std::max<int64_t>(a.n_edges, 1) : 0, plan.n_gathered);  // not null: x's is wanted
    delta = empty(need_delta ? a.n_edges : 0, plan.dim), attr = empty(need_attr ? a.n_edges : 0, plan.n_attr);
    of_threads = empty(need_weights ? a.threads : 0, plan.n_grad);
    a.grad_x = mutable_data<R>(x), a.grad_edge = mutable_data<R>(of_edges);
    a.grad_delta = mutable_data<R>(delta), a.grad_attr = mutable_data<R>(attr);
    a.grad_weights = mutable_data<R>(of_threads);
  }

  // After the call: that of the packed weights, in which every weight of θ stands twice: the first holds the gradient,
  // the second 0.
  template <typename R>
  void finish(const PlanView<R>& plan) {
    const bool wanted = of_threads.numel() > 0;
    weights = new_empty(of_threads, {wanted ? plan.n_weights : 0});
    if (!wanted) return;
    R* out = mutable_data<R>(weights);
    std::copy_n(data<R>(of_threads), plan.n_grad, out);
    std::fill(out + plan.n_grad, out + plan.n_weights, R{});
  }
};

template <typename R>
void bind_source_order(ConvArgs<R>& a, const Tensor& src, const Tensor& order_by_source, const Tensor& colptr) {
  check(order_by_source, "order_by_source", src.scalar_type(), a.n_edges);
  check(colptr, "colptr", src.scalar_type(), a.n_src + 1);
  a.order_by_source = order_by_source.const_data_ptr(), a.colptr = colptr.const_data_ptr();
}

// The arguments of a backward pass, with memory for its results from `grads`.
template <typename R>
ConvArgs<R> backward_arguments(Gradients& grads, PlanView<R>& plan, const Tensor& weights, const Tensor& x,
                               const Tensor& delta, const Tensor& attr, const Tensor& src, const Tensor& order,
                               const Tensor& rowptr, const Tensor& grad_out, const Tensor& order_by_source,
                               const Tensor& colptr, bool need_x, bool need_delta, bool need_attr, bool need_weights) {
  ConvArgs<R> a = graph_arguments(plan, weights, x, delta, attr, src, order, rowptr);
  check(grad_out, "grad_out", weights.scalar_type(), a.n_dst * plan.out_size);
  a.grad_out = data<R>(grad_out);
  if (need_x) bind_source_order(a, src, order_by_source, colptr);
  grads.bind(a, x, need_x, need_delta, need_attr, need_weights);
  return a;
}

}  // namespace implicit_steer
