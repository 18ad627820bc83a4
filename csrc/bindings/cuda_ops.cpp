// The torch operators of conv_ops.cpp, layer_ops.cpp and ops.cpp for CUDA tensors, through torch's stable ABI. No CUDA:
// the kernels are in a library of their own (cuda_device.h).

#include <algorithm>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda_device.h"

namespace {

using namespace implicit_steer;

// ---- arguments

// As check, of a tensor on the call's device.
void check_here(const Context& context, const Tensor& t, const char* name, ScalarType type, int64_t numel) {
  check(t, name, type, numel);
  STD_TORCH_CHECK(numel == 0 || (t.is_cuda() && t.get_device_index() == context.device), name,
                  ": expected a tensor on the call's device, cuda:", context.device, ".");
}

// Of one call: its device, its plan there and what forward and backward share.
template <typename R>
struct Arguments {
  const Context context;
  const DevicePlan<R>& device_plan;
  const PlanView<R>& plan;
  const ScalarType real;
  ConvArgs<R> args{};
  Tensor pairs;

  Arguments(const Tensor& ints, const Tensor& reals, const Tensor& delta, const Tensor& attr)
      : context(delta),
        device_plan(implicit_steer::device_plan<R>(context, ints, reals)),
        plan(*kernels<R>().plan_view(&device_plan)),
        real(delta.scalar_type()) {
    args.n_edges = delta.size(0), args.scratch = Context::scratch;
    args.delta = pointer(delta, "delta", args.n_edges * plan.dim);
    args.attr = pointer(attr, "attr", args.n_edges * plan.n_attr);
  }

  const R* pointer(const Tensor& t, const char* name, int64_t numel) const {
    check_here(context, t, name, real, numel);
    return data<R>(t);
  }
  void weights(const Tensor& t) { args.weights = pointer(t, "weights", plan.n_weights); }
  void graph(const Tensor& x, const Tensor& src, const Tensor& order, const Tensor& rowptr) {
    args.n_src = x.size(0), args.n_dst = rowptr.numel() - 1;
    args.x = pointer(x, "x", args.n_src * plan.in_size);
    const ScalarType index = src.scalar_type();
    STD_TORCH_CHECK(index == ScalarType::Int || index == ScalarType::Long, "src: expected int32 or int64.");
    check_here(context, src, "src", index, args.n_edges), check_here(context, order, "order", index, args.n_edges);
    check_here(context, rowptr, "rowptr", index, args.n_dst + 1);
    args.src = src.const_data_ptr(), args.order = order.const_data_ptr(), args.rowptr = rowptr.const_data_ptr();
    args.index64 = index == ScalarType::Long;
  }
  void by_source(const Tensor& order, const Tensor& colptr) {
    const ScalarType index = args.index64 ? ScalarType::Long : ScalarType::Int;
    check_here(context, order, "order_by_source", index, args.n_edges);
    check_here(context, colptr, "colptr", index, args.n_src + 1);
    args.order_by_source = order.const_data_ptr(), args.colptr = colptr.const_data_ptr();
  }
  // The direction along which the call takes derivatives.
  void direction(const Tensor& weights, const Tensor& delta, const Tensor& attr) {
    const R* tangent = pointer(weights, "tangent_weights", plan.n_weights);
    args.delta_tangent = pointer(delta, "tangent_delta", args.n_edges * plan.dim);
    args.attr_tangent = pointer(attr, "tangent_attr", args.n_edges * plan.n_attr);
    pairs = new_empty(weights, {2 * int64_t{plan.n_weights}});
    check(kernels<R>().pair_weights(device_plan, args.weights, tangent, mutable_data<R>(pairs), context.stream));
    args.weights = data<R>(pairs);
  }
  template <typename Pass>
  void run(Pass pass) const {
    check(pass(device_plan, args, context.stream));
  }
};

// Results of a backward pass, empty where not needed.
struct Results {
  Tensor x, delta, attr, weights, of_edges;

  template <typename R>
  void bind(Arguments<R>& a, const Tensor& like, bool need_x, bool need_delta, bool need_attr, bool need_weights) {
    const auto rows = [&](bool need, int64_t n, int64_t columns) { return new_empty(like, {need ? n : 0, columns}); };
    const int64_t e = a.args.n_edges;
    x = rows(need_x, a.args.n_src, a.plan.in_size), of_edges = rows(need_x, std::max<int64_t>(e, 1), a.plan.in_size);
    delta = rows(need_delta, e, a.plan.dim), attr = rows(need_attr, e, a.plan.n_attr);
    weights = new_empty(like, {need_weights ? a.plan.n_weights : 0});
    a.args.grad_x = mutable_data<R>(x), a.args.grad_edge = mutable_data<R>(of_edges);
    a.args.grad_delta = mutable_data<R>(delta), a.args.grad_attr = mutable_data<R>(attr);
    a.args.grad_weights = mutable_data<R>(weights);
  }
};

// Calls f with Arguments of delta's floating type.
template <typename F>
void with_arguments(const Tensor& ints, const Tensor& reals, const Tensor& delta, const Tensor& attr, F f) {
  dispatch_real(delta, "delta", [&](auto* tag) {
    Arguments<std::remove_pointer_t<decltype(tag)>> arguments(ints, reals, delta, attr);
    f(arguments, tag);
  });
}

// ---- the operators; conv_ops.cpp and layer_ops.cpp say what they give

Tensor conv_forward(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& x,
                    const Tensor& delta, const Tensor& attr, const Tensor& src, const Tensor& order,
                    const Tensor& rowptr, const Tensor& expansion, const Tensor& bias, bool mean, int64_t, int64_t) {
  Tensor out;
  with_arguments(ints, reals, delta, attr, [&](auto& a, auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    a.weights(weights), a.graph(x, src, order, rowptr);
    out = new_empty(x, {a.args.n_dst, a.plan.out_size});
    a.args.out = mutable_data<R>(out);
    a.run(kernels<R>().forward);
    const int64_t n = bias.numel();
    const R *matrix = a.pointer(expansion, "expansion", a.plan.out_size * n), *values = a.pointer(bias, "bias", n);
    if (n > 0 || mean) check(kernels<R>().finish(a.device_plan, a.args, matrix, values, n, mean, a.context.stream));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& ints, const Tensor& reals, const Tensor& weights,
                                                         const Tensor& x, const Tensor& delta, const Tensor& attr,
                                                         const Tensor& src, const Tensor& order, const Tensor& rowptr,
                                                         const Tensor& grad_out, const Tensor& order_by_source,
                                                         const Tensor& colptr, bool need_x, bool need_delta,
                                                         bool need_attr, bool need_weights, int64_t) {
  Results results;
  with_arguments(ints, reals, delta, attr, [&](auto& a, auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    a.weights(weights), a.graph(x, src, order, rowptr);
    if (need_x) a.by_source(order_by_source, colptr);
    a.args.grad_out = a.pointer(grad_out, "grad_out", a.args.n_dst * a.plan.out_size);
    results.bind(a, x, need_x, need_delta, need_attr, need_weights);
    a.run(kernels<R>().backward);
  });
  return {results.x, results.delta, results.attr, results.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_double_backward(
    const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& x, const Tensor& delta,
    const Tensor& attr, const Tensor& src, const Tensor& order, const Tensor& rowptr, const Tensor& grad_out,
    const Tensor& order_by_source, const Tensor& colptr, const Tensor& tangent_weights, const Tensor& tangent_x,
    const Tensor& tangent_delta, const Tensor& tangent_attr, bool need_out, bool need_x, bool need_delta,
    bool need_attr, bool need_weights, int64_t) {
  Tensor out;
  Results results;
  with_arguments(ints, reals, delta, attr, [&](auto& a, auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    a.weights(weights), a.graph(x, src, order, rowptr), a.direction(tangent_weights, tangent_delta, tangent_attr);
    if (need_x) a.by_source(order_by_source, colptr);
    a.args.x_tangent = a.pointer(tangent_x, "tangent_x", x.numel());
    a.args.grad_out = a.pointer(grad_out, "grad_out", a.args.n_dst * a.plan.out_size);
    out = new_empty(x, {need_out ? a.args.n_dst : 0, a.plan.out_size});
    a.args.out = mutable_data<R>(out);
    if (need_out) a.run(kernels<R>().forward_tangent);
    results.bind(a, x, need_x, need_delta, need_attr, need_weights);
    if (need_x || need_delta || need_attr || need_weights) a.run(kernels<R>().backward_tangent);
  });
  return {out, results.x, results.delta, results.attr, results.weights};
}

Tensor conv_hidden(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& delta,
                   const Tensor& attr, int64_t, int64_t) {
  Tensor out;
  with_arguments(ints, reals, delta, attr, [&](auto& a, auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    a.weights(weights);
    out = new_empty(delta, {a.args.n_edges, hidden_size(a.plan)});
    a.args.out = mutable_data<R>(out);
    a.run(kernels<R>().hidden_forward);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> conv_hidden_backward(const Tensor& ints, const Tensor& reals, const Tensor& weights,
                                                        const Tensor& delta, const Tensor& attr, const Tensor& grad_out,
                                                        int64_t) {
  Results results;
  with_arguments(ints, reals, delta, attr, [&](auto& a, auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    a.weights(weights);
    a.args.grad_out = a.pointer(grad_out, "grad_out", a.args.n_edges * hidden_size(a.plan));
    results.bind(a, delta, false, true, true, true);
    a.run(kernels<R>().hidden_backward);
  });
  return {results.delta, results.attr, results.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_hidden_double_backward(const Tensor& ints, const Tensor& reals,
                                                                       const Tensor& weights, const Tensor& delta,
                                                                       const Tensor& attr, const Tensor& grad_out,
                                                                       const Tensor& tangent_weights,
                                                                       const Tensor& tangent_delta,
                                                                       const Tensor& tangent_attr, int64_t) {
  Tensor out;
  Results results;
  with_arguments(ints, reals, delta, attr, [&](auto& a, auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    a.weights(weights), a.direction(tangent_weights, tangent_delta, tangent_attr);
    a.args.grad_out = a.pointer(grad_out, "grad_out", a.args.n_edges * hidden_size(a.plan));
    out = new_empty(delta, {a.args.n_edges, hidden_size(a.plan)});
    a.args.out = mutable_data<R>(out);
    a.run(kernels<R>().hidden_forward_tangent);
    results.bind(a, delta, false, true, true, true);
    a.run(kernels<R>().hidden_backward_tangent);
  });
  return {out, results.delta, results.attr, results.weights};
}

// The parameters as one vector.
template <typename R>
Tensor gathered(const Context& context, const std::vector<Tensor>& parameters, int64_t n_parameters, ScalarType real) {
  if (parameters.size() == 1) {
    check_here(context, parameters[0], "parameters", real, n_parameters);
    return parameters[0];
  }
  Tensor vector = context.bytes(std::max<int64_t>(n_parameters, 1) * sizeof(R));
  char* next = static_cast<char*>(vector.mutable_data_ptr());
  int64_t left = n_parameters;
  for (const Tensor& t : parameters) {
    check_here(context, t, "parameters", real, t.numel());
    left -= t.numel();
    STD_TORCH_CHECK(left >= 0, "parameters: expected ", n_parameters, " numbers, got more.");
    check(library().copy(next, t.const_data_ptr(), t.numel() * sizeof(R), context.stream));
    next += t.numel() * sizeof(R);
  }
  STD_TORCH_CHECK(left == 0, "parameters: expected ", n_parameters, " numbers, got ", left, " fewer.");
  return vector;
}

std::tuple<Tensor, Tensor> conv_statistics(const Tensor& ints, const Tensor& reals, const Tensor& rowptr,
                                           const Tensor& column, const Tensor& value,
                                           const std::vector<Tensor>& parameters, const Tensor& delta,
                                           const Tensor& attr, int64_t n_layers, int64_t size, int64_t) {
  Tensor statistics, packed;
  with_arguments(ints, reals, delta, attr, [&](auto& a, auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    STD_TORCH_CHECK(a.plan.has_norms, "plan: expected one with batch norms.");
    STD_TORCH_CHECK(a.plan.n_layers == n_layers && statistics_size(a.plan) == size, "n_layers, size: expected ",
                    a.plan.n_layers, ", ", statistics_size(a.plan), ", got ", n_layers, ", ", size, ".");
    STD_TORCH_CHECK(a.args.n_edges > 1, "delta: expected at least 2 edges, one has no variance.");
    const HeldMatrix<R>& held = device_matrix(a.context, a.plan, rowptr, column, value);
    const Tensor p = gathered<R>(a.context, parameters, a.plan.n_parameters, a.real);
    packed = new_empty(delta, {a.plan.n_weights});
    // Overwritten norm by norm; until then finite numbers stand where the packing reads them.
    statistics = torch::stable::new_zeros(delta, {a.plan.n_layers, statistics_size(a.plan)});
    R *const weights = mutable_data<R>(packed), *const out = mutable_data<R>(statistics);
    check(kernels<R>().pack(a.device_plan, held.matrix, data<R>(p), out, weights, a.context.stream));
    check(kernels<R>().statistics(a.device_plan, a.args, data<R>(p), weights, out, a.context.stream));
  });
  return {statistics, packed};
}

Tensor conv_moments(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& delta,
                    const Tensor& attr, int64_t layer, int64_t size, int64_t) {
  Tensor moments;
  with_arguments(ints, reals, delta, attr, [&](auto& a, auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    STD_TORCH_CHECK(a.plan.has_norms && layer >= 0 && layer < a.plan.n_layers,
                    "layer: expected a batch norm's number.");
    const int64_t expected = int64_t{a.plan.layers[layer].out_size / a.plan.c} * a.plan.d;
    STD_TORCH_CHECK(size == expected, "size: expected ", expected, ", got ", size, ".");
    a.weights(weights), a.args.layer = static_cast<int>(layer);
    moments = torch::stable::new_zeros(delta, {2, size});
    if (a.args.n_edges == 0) return;
    check(kernels<R>().moments(a.device_plan, a.args, mutable_data<R>(moments), a.context.stream));
  });
  return moments;
}

Tensor conv_pack(const Tensor& ints, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                 const Tensor& value, const std::vector<Tensor>& parameters, const Tensor& statistics) {
  Tensor packed;
  dispatch_real(statistics, "statistics", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    const Context context(statistics);
    const DevicePlan<R>& plan = device_plan<R>(context, ints, reals);
    const PlanView<R>& view = *kernels<R>().plan_view(&plan);
    const ScalarType real = statistics.scalar_type();
    check_here(context, statistics, "statistics", real, view.n_layers * statistics_size(view));
    const Tensor p = gathered<R>(context, parameters, view.n_parameters, real);
    packed = new_empty(statistics, {view.n_weights});
    check(kernels<R>().pack(plan, device_matrix(context, view, rowptr, column, value).matrix, data<R>(p),
                            data<R>(statistics), mutable_data<R>(packed), context.stream));
  });
  return packed;
}

Tensor conv_pack_backward(const Tensor& ints, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                          const Tensor& value, const Tensor& statistics, const Tensor& grad_packed, int64_t) {
  Tensor grad;
  dispatch_real(grad_packed, "grad_packed", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    const Context context(grad_packed);
    const DevicePlan<R>& plan = device_plan<R>(context, ints, reals);
    const PlanView<R>& view = *kernels<R>().plan_view(&plan);
    const ScalarType real = grad_packed.scalar_type();
    check_here(context, statistics, "statistics", real, view.n_layers * statistics_size(view));
    check_here(context, grad_packed, "grad_packed", real, view.n_weights);
    grad = new_empty(grad_packed, {view.n_parameters});
    check(kernels<R>().pack_backward(plan, device_matrix(context, view, rowptr, column, value).transposed,
                                     data<R>(statistics), data<R>(grad_packed), mutable_data<R>(grad), context.stream));
  });
  return grad;
}

std::tuple<Tensor, Tensor> sort_by_key(const Tensor& key, int64_t n) {
  STD_TORCH_CHECK(key.dim() == 1, "key: expected a tensor of shape (E,), got rank ", key.dim(), ".");
  STD_TORCH_CHECK(n >= 0, "n: expected a count >= 0, got ", n, ".");
  const ScalarType index = key.scalar_type();
  STD_TORCH_CHECK(index == ScalarType::Int || index == ScalarType::Long, "key: expected an int32 or int64 tensor.");
  const Tensor keys = torch::stable::contiguous(key);
  const Context context(keys);
  const int64_t edges = keys.numel(), size = index == ScalarType::Long ? 8 : 4;
  STD_TORCH_CHECK(edges <= std::numeric_limits<int32_t>::max(), "key: expected at most 2^31 - 1 edges, got ", edges,
                  ". Split the graph (implicit_steer.layers.blocks).");
  Tensor order = new_empty(keys, {edges}), offsets = new_empty(keys, {n + 1});
  Tensor memory = context.bytes(3 * edges * size + library().sort_bytes(edges) + 1);
  check(library().sort(keys.const_data_ptr(), edges, n, index == ScalarType::Long, order.mutable_data_ptr(),
                       offsets.mutable_data_ptr(), memory.mutable_data_ptr(), context.stream));
  return {order, offsets};
}

// Raises where the device, or its driver, cannot run the kernels.
void cuda_probe(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  check(library().probe());
}

// Bytes of shared memory that a block of one of the plan's kernels cannot do without.
int64_t cuda_shared_bytes(const Tensor& ints, const Tensor& reals) {
  int64_t bytes = -1;
  dispatch_real(reals, "plan_reals", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    bytes = kernels<R>().shared_bytes(data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel());
  });
  STD_TORCH_CHECK(bytes >= 0, "plan_ints, plan_reals: not what ops/native/arrays.py writes.");
  return bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def("cuda_shared_bytes(Tensor plan_ints, Tensor plan_reals) -> int");
  m.def("cuda_probe(int device) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CUDA, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("conv_double_backward", TORCH_BOX(&conv_double_backward));
  m.impl("conv_hidden", TORCH_BOX(&conv_hidden));
  m.impl("conv_hidden_backward", TORCH_BOX(&conv_hidden_backward));
  m.impl("conv_hidden_double_backward", TORCH_BOX(&conv_hidden_double_backward));
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("conv_moments", TORCH_BOX(&conv_moments));
  m.impl("conv_pack", TORCH_BOX(&conv_pack));
  m.impl("conv_pack_backward", TORCH_BOX(&conv_pack_backward));
  m.impl("sort_by_key", TORCH_BOX(&sort_by_key));
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CompositeExplicitAutograd, m) {
  m.impl("cuda_shared_bytes", TORCH_BOX(&cuda_shared_bytes));
  m.impl("cuda_probe", TORCH_BOX(&cuda_probe));
}
