// One call of an operator of conv_ops.cpp or layer_ops.cpp on one device, Cpu<R> of cpu_device.h or Cuda<R> of
// cuda_device.h: its arguments, checked, as ConvArgs, and its results. The device says where plan and memory are, which
// functions run, and what they leave to be done.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../cpu/conv.h"
#include "arguments.h"

namespace implicit_steer {

// Which gradients a backward pass has to give.
struct Needs {
  bool x, delta, attr, weights;
};

// Gradients of x, delta, attr and weights, empty where not needed; and the memory that a backward pass works in.
struct Gradients {
  Tensor x, delta, attr, weights;
  Tensor of_edges, of_weights;
};

template <typename Device>
class Call {
 public:
  using R = typename Device::Real;

  Device device;
  const PlanView<R>& plan;
  ConvArgs<R> args{};

  // `of`: what the device is made of.
  template <typename... Of>
  Call(const Tensor& delta, const Tensor& attr, const Of&... of) : device(of...), plan(device.plan()) {
    args.n_edges = delta.size(0);
    args.delta = read(delta, "delta", args.n_edges * plan.dim);
    args.attr = read(attr, "attr", args.n_edges * plan.n_attr);
    device.prepare(args);
  }

  // ---- arguments

  const R* read(const Tensor& t, const char* name, int64_t numel) const {
    device.check(t, name, real_type<R>, numel);
    return data<R>(t);
  }
  void weights(const Tensor& t) { args.weights = read(t, "weights", plan.n_weights); }
  void graph(const Tensor& x, const Tensor& src, const Tensor& order, const Tensor& rowptr) {
    args.n_src = x.size(0), args.n_dst = rowptr.numel() - 1;
    args.x = read(x, "x", args.n_src * plan.in_size);
    const ScalarType index = src.scalar_type();
    STD_TORCH_CHECK(index == ScalarType::Int || index == ScalarType::Long, "src: expected int32 or int64.");
    device.check(src, "src", index, args.n_edges), device.check(order, "order", index, args.n_edges);
    device.check(rowptr, "rowptr", index, args.n_dst + 1);
    args.src = src.const_data_ptr(), args.order = order.const_data_ptr(), args.rowptr = rowptr.const_data_ptr();
    args.index64 = index == ScalarType::Long;
  }
  // After graph().
  void grad_of_nodes(const Tensor& t) { args.grad_out = read(t, "grad_out", args.n_dst * plan.out_size); }
  void grad_of_hidden(const Tensor& t) { args.grad_out = read(t, "grad_out", args.n_edges * hidden_size(plan)); }
  void by_source(const Tensor& order, const Tensor& colptr) {
    const ScalarType index = args.index64 ? ScalarType::Long : ScalarType::Int;
    device.check(order, "order_by_source", index, args.n_edges);
    device.check(colptr, "colptr", index, args.n_src + 1);
    args.order_by_source = order.const_data_ptr(), args.colptr = colptr.const_data_ptr();
  }
  // Raises unless there are batch norms, and a variance over the edges.
  void check_measurable() const {
    STD_TORCH_CHECK(plan.has_norms, "plan: expected one with batch norms.");
    STD_TORCH_CHECK(args.n_edges > 1, "delta: expected at least 2 edges, one has no variance.");
  }
  // The direction along which the call takes derivatives; after weights().
  void direction(const Tensor& weights, const Tensor& delta, const Tensor& attr) {
    const R* tangent = read(weights, "tangent_weights", plan.n_weights);
    args.delta_tangent = read(delta, "tangent_delta", args.n_edges * plan.dim);
    args.attr_tangent = read(attr, "tangent_attr", args.n_edges * plan.n_attr);
    args.weights = device.with_tangents(weights, args.weights, tangent);
  }

  // ---- results

  Tensor output(const Tensor& like, int64_t rows, int64_t columns) {
    Tensor out = new_empty(like, {rows, columns});
    args.out = mutable_data<R>(out);
    return out;
  }
  Gradients gradients(const Tensor& like, Needs needs) {
    const auto rows = [&](bool need, int64_t n, int64_t columns) { return new_empty(like, {need ? n : 0, columns}); };
    Gradients made;
    made.x = rows(needs.x, args.n_src, plan.in_size);
    made.of_edges = rows(needs.x, std::max<int64_t>(args.n_edges, 1), device.edge_width());  // not null: x's is wanted
    made.delta = rows(needs.delta, args.n_edges, plan.dim), made.attr = rows(needs.attr, args.n_edges, plan.n_attr);
    made.of_weights = device.weight_gradient(args, like, needs.weights);
    args.grad_x = mutable_data<R>(made.x), args.grad_edge = mutable_data<R>(made.of_edges);
    args.grad_delta = mutable_data<R>(made.delta), args.grad_attr = mutable_data<R>(made.attr);
    args.grad_weights = mutable_data<R>(made.of_weights);
    return made;
  }
  // `pass`: a function of the device's table.
  template <typename Pass>
  void run(Pass pass) const {
    device.run(pass, args);
  }
  void collect(Gradients& made) const { made.weights = device.summed_weight_gradient(made.of_weights); }
  // Sums over the edges, or the mean over them if `mean`, + expansion [C_out, n] · bias [n].
  void forward(const Tensor& expansion, const Tensor& bias, bool mean) const {
    const int64_t n = bias.numel();
    device.forward(args, read(expansion, "expansion", plan.out_size * n), read(bias, "bias", n), n, mean);
  }
};

// Calls f with a Call in delta's floating type.
template <template <typename> class Device, typename F>
void with_call(const Tensor& ints, const Tensor& reals, const Tensor& delta, const Tensor& attr, int64_t isa, F f) {
  dispatch_real(delta, "delta", [&](auto* tag) {
    Call<Device<std::remove_pointer_t<decltype(tag)>>> call(delta, attr, ints, reals, delta, isa);
    f(call);
  });
}

}  // namespace implicit_steer
