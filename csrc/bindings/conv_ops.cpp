// The torch operators of the convolution, each once for CPU and CUDA tensors, through torch's stable ABI. A backward
// pass gives the gradients that are not needed as tensors without rows.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "conv_call.h"
#include "cpu_device.h"
#include "cuda_device.h"

namespace {

using namespace implicit_steer;

// -> (N_dst, C_out): the sums over each node's edges, or their mean, then + expansion · bias
template <template <typename> class Device>
Tensor conv_forward(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& x,
                    const Tensor& delta, const Tensor& attr, const Tensor& src, const Tensor& order,
                    const Tensor& rowptr, const Tensor& expansion, const Tensor& bias, bool mean, int64_t out_size,
                    int64_t isa) {
  Tensor out;
  with_call<Device>(ints, reals, delta, attr, isa, [&](auto& call) {
    check_size(call.plan.out_size, out_size, "out_size");
    call.weights(weights), call.graph(x, src, order, rowptr);
    out = call.output(x, call.args.n_dst, call.plan.out_size);
    call.forward(expansion, bias, mean);
  });
  return out;
}

// -> gradients of x, delta, attr and weights
template <template <typename> class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& ints, const Tensor& reals, const Tensor& weights,
                                                         const Tensor& x, const Tensor& delta, const Tensor& attr,
                                                         const Tensor& src, const Tensor& order, const Tensor& rowptr,
                                                         const Tensor& grad_out, const Tensor& order_by_source,
                                                         const Tensor& colptr, bool need_x, bool need_delta,
                                                         bool need_attr, bool need_weights, int64_t isa) {
  Gradients grads;
  with_call<Device>(ints, reals, delta, attr, isa, [&](auto& call) {
    call.weights(weights), call.graph(x, src, order, rowptr), call.grad_of_nodes(grad_out);
    if (need_x) call.by_source(order_by_source, colptr);
    grads = call.gradients(x, {need_x, need_delta, need_attr, need_weights});
    call.run(call.device.table().backward);
    call.collect(grads);
  });
  return {grads.x, grads.delta, grads.attr, grads.weights};
}

// Derivatives, along a direction of weights, x, delta and attr, of conv_forward and of what conv_backward gives:
// products of the Hessian of <grad_out, out> with that direction.
// -> of out, and of the gradients of x, delta, attr and weights
template <template <typename> class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_double_backward(
    const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& x, const Tensor& delta,
    const Tensor& attr, const Tensor& src, const Tensor& order, const Tensor& rowptr, const Tensor& grad_out,
    const Tensor& order_by_source, const Tensor& colptr, const Tensor& tangent_weights, const Tensor& tangent_x,
    const Tensor& tangent_delta, const Tensor& tangent_attr, bool need_out, bool need_x, bool need_delta,
    bool need_attr, bool need_weights, int64_t isa) {
  Tensor out;
  Gradients grads;
  with_call<Device>(ints, reals, delta, attr, isa, [&](auto& call) {
    call.weights(weights), call.graph(x, src, order, rowptr), call.grad_of_nodes(grad_out);
    call.direction(tangent_weights, tangent_delta, tangent_attr);
    call.args.x_tangent = call.read(tangent_x, "tangent_x", x.numel());
    if (need_x) call.by_source(order_by_source, colptr);
    out = call.output(x, need_out ? call.args.n_dst : 0, call.plan.out_size);
    if (need_out) call.run(call.device.table().forward_tangent);
    grads = call.gradients(x, {need_x, need_delta, need_attr, need_weights});
    if (need_x || need_delta || need_attr || need_weights) call.run(call.device.table().backward_tangent);
    call.collect(grads);
  });
  return {out, grads.x, grads.delta, grads.attr, grads.weights};
}

// -> (P, H): the hidden features at P points, times γ s(|x|), the constant one last
template <template <typename> class Device>
Tensor conv_hidden(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& delta,
                   const Tensor& attr, int64_t hidden, int64_t isa) {
  Tensor out;
  with_call<Device>(ints, reals, delta, attr, isa, [&](auto& call) {
    check_size(hidden_size(call.plan), hidden, "hidden");
    call.weights(weights);
    out = call.output(delta, call.args.n_edges, hidden);
    call.run(call.device.table().hidden_forward);
  });
  return out;
}

// -> (T (G + 3), width): how much each spline of a table counts among P points, see cpu/table_sums.h
Tensor table_sums(const Tensor& ints, const Tensor& reals, const Tensor& delta, const Tensor& attr, int64_t size,
                  int64_t width, int64_t isa) {
  Tensor out;
  with_call<Cpu>(ints, reals, delta, attr, isa, [&](auto& call) {
    using R = typename std::remove_reference_t<decltype(call)>::R;
    const auto& plan = call.plan;
    STD_TORCH_CHECK(plan.n_knots > 0, "plan_ints: expected a plan with a table.");
    check_size(plan.n_types * splines_per_type(plan), size, "size");
    check_size(table_sums_width(plan), width, "width");
    const std::vector<R> no_weights(plan.n_weights, R{1});
    call.args.weights = no_weights.data();
    out = call.output(delta, table_blocks(call.args) * size, width);
    call.run(call.device.table().table_sums);
  });
  return torch::stable::narrow(out, 0, 0, size);
}

constexpr Needs kOfHidden{false, true, true, true};  // all but that of x, which the hidden features do not have

// -> gradients of delta, attr and weights
template <template <typename> class Device>
std::tuple<Tensor, Tensor, Tensor> conv_hidden_backward(const Tensor& ints, const Tensor& reals, const Tensor& weights,
                                                        const Tensor& delta, const Tensor& attr, const Tensor& grad_out,
                                                        int64_t isa) {
  Gradients grads;
  with_call<Device>(ints, reals, delta, attr, isa, [&](auto& call) {
    call.weights(weights), call.grad_of_hidden(grad_out);
    grads = call.gradients(delta, kOfHidden);
    call.run(call.device.table().hidden_backward);
    call.collect(grads);
  });
  return {grads.delta, grads.attr, grads.weights};
}

// As conv_double_backward. -> of h, and of the gradients of delta, attr and weights
template <template <typename> class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_hidden_double_backward(const Tensor& ints, const Tensor& reals,
                                                                       const Tensor& weights, const Tensor& delta,
                                                                       const Tensor& attr, const Tensor& grad_out,
                                                                       const Tensor& tangent_weights,
                                                                       const Tensor& tangent_delta,
                                                                       const Tensor& tangent_attr, int64_t isa) {
  Tensor out;
  Gradients grads;
  with_call<Device>(ints, reals, delta, attr, isa, [&](auto& call) {
    call.weights(weights), call.grad_of_hidden(grad_out);
    call.direction(tangent_weights, tangent_delta, tangent_attr);
    out = call.output(delta, call.args.n_edges, hidden_size(call.plan));
    call.run(call.device.table().hidden_forward_tangent);
    grads = call.gradients(delta, kOfHidden);
    call.run(call.device.table().hidden_backward_tangent);
    call.collect(grads);
  });
  return {out, grads.delta, grads.attr, grads.weights};
}

// φ (0 .. 4, Function), exp (5) or erf (6) of every number of x: for tests of the lanes.
Tensor lane_function(const Tensor& x, int64_t which, int64_t isa) {
  Tensor out = new_empty(x, {x.numel()});
  check(x, "x", x.scalar_type(), x.numel());
  dispatch_real(x, "x", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    conv_table<R>(instruction_set(isa)).function(static_cast<int>(which), data<R>(x), mutable_data<R>(out), x.numel());
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
    const int64_t made = conv_table<float>(instruction_set(isa)).peak(threads, kRounds, sums.data());
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(made) / taken.count());
  }
  return best;
}

template <template <typename> class Device, typename Library>
void implement(Library& m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward<Device>));
  m.impl("conv_backward", TORCH_BOX(&conv_backward<Device>));
  m.impl("conv_double_backward", TORCH_BOX(&conv_double_backward<Device>));
  m.impl("conv_hidden", TORCH_BOX(&conv_hidden<Device>));
  m.impl("conv_hidden_backward", TORCH_BOX(&conv_hidden_backward<Device>));
  m.impl("conv_hidden_double_backward", TORCH_BOX(&conv_hidden_double_backward<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def("conv_forward(" IST_PLAN ", " IST_EDGES
        ", Tensor expansion, Tensor bias, bool mean, int out_size, int isa) -> Tensor");
  m.def("conv_backward(" IST_PLAN ", " IST_EDGES ", " IST_GRADIENT ", " IST_NEEDS
        ", bool need_weights, int isa) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_double_backward(" IST_PLAN ", " IST_EDGES ", " IST_GRADIENT
      ", Tensor tangent_weights, Tensor tangent_x, Tensor tangent_delta, Tensor tangent_attr, bool need_out, " IST_NEEDS
      ", bool need_weights, int isa) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("conv_hidden(" IST_PLAN ", " IST_POINTS ", int hidden, int isa) -> Tensor");
  m.def("conv_hidden_backward(" IST_PLAN ", " IST_POINTS ", Tensor grad_out, int isa) -> (Tensor, Tensor, Tensor)");
  m.def("conv_hidden_double_backward(" IST_PLAN ", " IST_POINTS
        ", Tensor grad_out, Tensor tangent_weights, Tensor tangent_delta, Tensor tangent_attr, int isa) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  m.def("table_sums(" IST_PLAN ", Tensor delta, Tensor attr, int size, int width, int isa) -> Tensor");
  m.def("lane_function(Tensor x, int which, int isa) -> Tensor");
  m.def("fma_peak(int isa) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  implement<Cpu>(m);
  m.impl("table_sums", TORCH_BOX(&table_sums));
  m.impl("lane_function", TORCH_BOX(&lane_function));
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CUDA, m) { implement<Cuda>(m); }

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CompositeExplicitAutograd, m) { m.impl("fma_peak", TORCH_BOX(&fma_peak)); }
