// The torch operators of the loops in cpu/, through torch's stable ABI.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../packing.h"
#include "conv_arguments.h"

namespace {

using namespace implicit_steer;

// -> (N_dst, C_out); expansion, bias, mean: of finish_nodes()
Tensor conv_forward(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& x,
                    const Tensor& delta, const Tensor& attr, const Tensor& src, const Tensor& order,
                    const Tensor& rowptr, const Tensor& expansion, const Tensor& bias, bool mean, int64_t out_size,
                    int64_t isa) {
  Tensor out;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    check_size(plan.out_size, out_size, "out_size");
    ConvArgs<R> a = graph_arguments(plan, weights, x, delta, attr, src, order, rowptr);
    out = new_empty(x, {a.n_dst, plan.out_size});
    a.out = mutable_data<R>(out);
    table<R>(isa).forward(a);
    finish_nodes(a, expansion, bias, mean);
  });
  return out;
}

// -> gradients of x, delta, attr and weights; those that are not needed are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& ints, const Tensor& reals, const Tensor& weights,
                                                         const Tensor& x, const Tensor& delta, const Tensor& attr,
                                                         const Tensor& src, const Tensor& order, const Tensor& rowptr,
                                                         const Tensor& grad_out, const Tensor& order_by_source,
                                                         const Tensor& colptr, bool need_x, bool need_delta,
                                                         bool need_attr, bool need_weights, int64_t isa) {
  Gradients grads;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    const ConvArgs<R> a = backward_arguments(grads, plan, weights, x, delta, attr, src, order, rowptr, grad_out,
                                             order_by_source, colptr, need_x, need_delta, need_attr, need_weights);
    table<R>(isa).backward(a);
    grads.finish(plan);
  });
  return {grads.x, grads.delta, grads.attr, grads.weights};
}

// Weights and their tangents side by side, [n_weights, 2]. `tangent` holds every weight of θ in its first place only.
template <typename R>
std::vector<R> with_tangents(const PlanView<R>& plan, const Tensor& weights, const Tensor& tangent) {
  check(tangent, "tangent_weights", weights.scalar_type(), plan.n_weights);
  const R *value = data<R>(weights), *t = data<R>(tangent);
  std::vector<R> pairs(2 * plan.n_weights);
  for (int64_t k = 0; k < plan.n_weights; ++k) pairs[2 * k] = value[k];
  for (int64_t k = 0; k < plan.n_grad; ++k) pairs[2 * k + 1] = t[k];
  for_theta(plan, [&](int64_t from, int64_t to) { pairs[2 * to + 1] = t[from]; });
  return pairs;
}

// Derivatives, along a direction of weights, x, delta and attr, of conv_forward and of what conv_backward gives:
// products of the Hessian of <grad_out, out> with that direction.
// -> of out, and of the gradients of x, delta, attr and weights; those that are not needed are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_double_backward(
    const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& x, const Tensor& delta,
    const Tensor& attr, const Tensor& src, const Tensor& order, const Tensor& rowptr, const Tensor& grad_out,
    const Tensor& order_by_source, const Tensor& colptr, const Tensor& tangent_weights, const Tensor& tangent_x,
    const Tensor& tangent_delta, const Tensor& tangent_attr, bool need_out, bool need_x, bool need_delta,
    bool need_attr, bool need_weights, int64_t isa) {
  Tensor out;
  Gradients grads;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    ConvArgs<R> a = backward_arguments(grads, plan, weights, x, delta, attr, src, order, rowptr, grad_out,
                                       order_by_source, colptr, need_x, need_delta, need_attr, need_weights);
    const ScalarType real = weights.scalar_type();
    check(tangent_x, "tangent_x", real, x.numel()), check(tangent_delta, "tangent_delta", real, delta.numel());
    check(tangent_attr, "tangent_attr", real, attr.numel());
    const std::vector<R> pairs = with_tangents(plan, weights, tangent_weights);
    a.weights = pairs.data(), a.x_tangent = data<R>(tangent_x);
    a.delta_tangent = data<R>(tangent_delta), a.attr_tangent = data<R>(tangent_attr);
    out = new_empty(x, {need_out ? a.n_dst : 0, plan.out_size});
    a.out = mutable_data<R>(out);
    if (need_out) table<R>(isa).forward_tangent(a);
    if (need_x || need_delta || need_attr || need_weights) table<R>(isa).backward_tangent(a);
    grads.finish(plan);
  });
  return {out, grads.x, grads.delta, grads.attr, grads.weights};
}

// -> (P, H): the hidden features at P points, times γ s(|x|), the constant one last
Tensor conv_hidden(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& delta,
                   const Tensor& attr, int64_t hidden, int64_t isa) {
  Tensor out;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    check_size(hidden_size(plan), hidden, "hidden");
    ConvArgs<R> a = point_arguments(plan, weights, delta, attr);
    out = new_empty(delta, {a.n_edges, hidden});
    a.out = mutable_data<R>(out);
    table<R>(isa).hidden_forward(a);
  });
  return out;
}

// -> gradients of delta, attr and weights
std::tuple<Tensor, Tensor, Tensor> conv_hidden_backward(const Tensor& ints, const Tensor& reals, const Tensor& weights,
                                                        const Tensor& delta, const Tensor& attr, const Tensor& grad_out,
                                                        int64_t isa) {
  Gradients grads;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    ConvArgs<R> a = point_arguments(plan, weights, delta, attr);
    check(grad_out, "grad_out", weights.scalar_type(), a.n_edges * hidden_size(plan));
    a.grad_out = data<R>(grad_out);
    grads.bind(a, delta, false, true, true, true);
    table<R>(isa).hidden_backward(a);
    grads.finish(plan);
  });
  return {grads.delta, grads.attr, grads.weights};
}

// As conv_double_backward. -> of out, and of the gradients of delta, attr and weights
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_hidden_double_backward(const Tensor& ints, const Tensor& reals,
                                                                       const Tensor& weights, const Tensor& delta,
                                                                       const Tensor& attr, const Tensor& grad_out,
                                                                       const Tensor& tangent_weights,
                                                                       const Tensor& tangent_delta,
                                                                       const Tensor& tangent_attr, int64_t isa) {
  Tensor out;
  Gradients grads;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    ConvArgs<R> a = point_arguments(plan, weights, delta, attr);
    const ScalarType real = weights.scalar_type();
    check(grad_out, "grad_out", real, a.n_edges * hidden_size(plan));
    check(tangent_delta, "tangent_delta", real, delta.numel()), check(tangent_attr, "tangent_attr", real, attr.numel());
    const std::vector<R> pairs = with_tangents(plan, weights, tangent_weights);
    a.weights = pairs.data(), a.delta_tangent = data<R>(tangent_delta), a.attr_tangent = data<R>(tangent_attr);
    a.grad_out = data<R>(grad_out);
    out = new_empty(delta, {a.n_edges, hidden_size(plan)});
    a.out = mutable_data<R>(out);
    table<R>(isa).hidden_forward_tangent(a);
    grads.bind(a, delta, false, true, true, true);
    table<R>(isa).hidden_backward_tangent(a);
    grads.finish(plan);
  });
  return {out, grads.delta, grads.attr, grads.weights};
}

// φ (0 .. 4, Function), exp (5) or erf (6) of every number of x: for tests of the lanes.
Tensor lane_function(const Tensor& x, int64_t which, int64_t isa) {
  Tensor out = new_empty(x, {x.numel()});
  check(x, "x", x.scalar_type(), x.numel());
  dispatch_real(x, "x", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    table<R>(isa).function(static_cast<int>(which), data<R>(x), mutable_data<R>(out), x.numel());
  });
  return out;
}

// Multiply-adds (one per lane and vector instruction) per second in float32 with torch's number of threads, the best of
// several runs: what the arithmetic of this machine can reach.
double fma_peak(int64_t isa) {
  constexpr int64_t kRounds = 2'000'000;  // about 10 ms
  constexpr int kRuns = 8;
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  std::vector<float> sums(threads);
  double best = 0;
  for (int n = 0; n < kRuns; ++n) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t made = table<float>(isa).peak(threads, kRounds, sums.data());
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(made) / taken.count());
  }
  return best;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def(
      "conv_forward(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor x, Tensor delta, Tensor attr, "
      "Tensor src, Tensor order, Tensor rowptr, Tensor expansion, Tensor bias, bool mean, int out_size, int isa) -> "
      "Tensor");
  m.def(
      "conv_backward(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor x, Tensor delta, Tensor attr, "
      "Tensor src, Tensor order, Tensor rowptr, Tensor grad_out, Tensor order_by_source, Tensor colptr, "
      "bool need_x, bool need_delta, bool need_attr, bool need_weights, int isa) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_double_backward(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor x, Tensor delta, Tensor attr, "
      "Tensor src, Tensor order, Tensor rowptr, Tensor grad_out, Tensor order_by_source, Tensor colptr, "
      "Tensor tangent_weights, Tensor tangent_x, Tensor tangent_delta, Tensor tangent_attr, bool need_out, "
      "bool need_x, bool need_delta, bool need_attr, bool need_weights, int isa) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_hidden(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor delta, Tensor attr, int hidden, "
      "int isa) -> Tensor");
  m.def(
      "conv_hidden_backward(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor delta, Tensor attr, "
      "Tensor grad_out, int isa) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_hidden_double_backward(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor delta, Tensor attr, "
      "Tensor grad_out, Tensor tangent_weights, Tensor tangent_delta, Tensor tangent_attr, int isa) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("lane_function(Tensor x, int which, int isa) -> Tensor");
  m.def("fma_peak(int isa) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("conv_double_backward", TORCH_BOX(&conv_double_backward));
  m.impl("conv_hidden_double_backward", TORCH_BOX(&conv_hidden_double_backward));
  m.impl("conv_hidden", TORCH_BOX(&conv_hidden));
  m.impl("conv_hidden_backward", TORCH_BOX(&conv_hidden_backward));
  m.impl("lane_function", TORCH_BOX(&lane_function));
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CompositeExplicitAutograd, m) { m.impl("fma_peak", TORCH_BOX(&fma_peak)); }
