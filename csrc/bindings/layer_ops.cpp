// The torch operators of a layer: parameters to packed weights and back, and statistics of batch norms, each once for
// CPU and CUDA tensors; for CPU tensors also the whole backward pass, and what keeps the batch norms and the weights up
// to date.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "conv_call.h"
#include "cpu_device.h"
#include "cpu_layer.h"
#include "cuda_device.h"

namespace {

using namespace implicit_steer;

// -> statistics of all batch norms over these edges, (n_layers, W · (n_trivial + 1)): mean [W, n_trivial], variance
// [W]; and the packed weights at them
template <template <typename> class Device>
std::tuple<Tensor, Tensor> conv_statistics(const Tensor& ints, const Tensor& reals, const Tensor& rowptr,
                                           const Tensor& column, const Tensor& value,
                                           const std::vector<Tensor>& parameters, const Tensor& delta,
                                           const Tensor& attr, int64_t n_layers, int64_t size, int64_t isa) {
  Tensor statistics, packed;
  with_call<Device>(ints, reals, delta, attr, isa, [&](auto& call) {
    using R = typename std::decay_t<decltype(call)>::R;
    check_size(call.plan.n_layers, n_layers, "n_layers"), check_size(statistics_size(call.plan), size, "size");
    call.check_measurable();
    const auto& matrix = call.device.matrix(rowptr, column, value);
    const auto p = call.device.gathered(parameters);
    packed = new_empty(delta, {call.plan.n_weights});
    statistics = call.device.zeros(delta, {n_layers, size});
    call.device.statistics(call.args, matrix, p, mutable_data<R>(packed), mutable_data<R>(statistics));
  });
  return {statistics, packed};
}

// -> (2, W · d): of the input of batch norm `layer` over these edges, mean and sum of squared deviations of every
// coordinate, 0 without edges; the packed weights are at the statistics of the norms before it.
template <template <typename> class Device>
Tensor conv_moments(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& delta,
                    const Tensor& attr, int64_t layer, int64_t size, int64_t isa) {
  Tensor moments;
  with_call<Device>(ints, reals, delta, attr, isa, [&](auto& call) {
    using R = typename std::decay_t<decltype(call)>::R;
    STD_TORCH_CHECK(call.plan.has_norms && layer >= 0 && layer < call.plan.n_layers,
                    "layer: expected a batch norm's number.");
    check_size(norm_input_size(call.plan), size, "size");
    call.weights(weights), call.args.layer = static_cast<int>(layer);
    moments = call.device.zeros(delta, {2, size});
    if (call.args.n_edges > 0) call.device.moments(call.args, size, mutable_data<R>(moments));
  });
  return moments;
}

// Parameters and statistics -> packed weights.
template <template <typename> class Device>
Tensor conv_pack(const Tensor& ints, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                 const Tensor& value, const std::vector<Tensor>& parameters, const Tensor& statistics) {
  Tensor packed;
  dispatch_real(statistics, "statistics", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Device<R> device(ints, reals, statistics);
    const PlanView<R>& plan = device.plan();
    device.check(statistics, "statistics", real_type<R>, plan.n_layers * statistics_size(plan));
    const auto& matrix = device.matrix(rowptr, column, value);
    const auto p = device.gathered(parameters);
    packed = new_empty(statistics, {plan.n_weights});
    device.pack(matrix, p, data<R>(statistics), mutable_data<R>(packed));
  });
  return packed;
}

// grad_packed [n_weights] -> the gradient of the parameters, one vector [n_parameters]
template <template <typename> class Device>
Tensor conv_pack_backward(const Tensor& ints, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                          const Tensor& value, const Tensor& statistics, const Tensor& grad_packed,
                          int64_t n_parameters) {
  Tensor grad;
  dispatch_real(grad_packed, "grad_packed", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Device<R> device(ints, reals, grad_packed);
    const PlanView<R>& plan = device.plan();
    device.check(statistics, "statistics", real_type<R>, plan.n_layers * statistics_size(plan));
    device.check(grad_packed, "grad_packed", real_type<R>, plan.n_weights);
    check_size(plan.n_parameters, n_parameters, "n_parameters");
    grad = new_empty(grad_packed, {plan.n_parameters});
    device.pack_backward(device.matrix(rowptr, column, value), data<R>(statistics), data<R>(grad_packed),
                         mutable_data<R>(grad));
  });
  return grad;
}

// ---- for CPU tensors alone

// Moves the running statistics of the batch norms, means [W, d], variances [W, 1] and counts [], towards `statistics`,
// of conv_statistics. trivial [n_layers, n_trivial]: the columns of the means that are not always 0.
void conv_move_running(const Tensor& statistics, const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                       const std::vector<Tensor>& counts, const Tensor& trivial, const std::vector<double>& momentum) {
  const int64_t n_layers = statistics.size(0);
  for (const int64_t found : {means.size(), variances.size(), counts.size(), momentum.size()})
    check_size(n_layers, found, "means, variances, counts, momentum");
  check(trivial, "trivial", ScalarType::Long, trivial.numel());
  const int64_t n_trivial = trivial.numel() / n_layers, channels = statistics.size(1) / (n_trivial + 1);
  check_size(statistics.numel(), n_layers * channels * (n_trivial + 1), "statistics");
  dispatch_real(statistics, "statistics", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    check(statistics, "statistics", statistics.scalar_type(), statistics.numel());
    for (int64_t n = 0; n < n_layers; ++n) {
      const int64_t d = means[n].numel() / channels, *column = data<int64_t>(trivial) + n * n_trivial;
      check(means[n], "means", statistics.scalar_type(), channels * d);
      check(variances[n], "variances", statistics.scalar_type(), channels),
          check(counts[n], "counts", ScalarType::Long, 1);
      const R *mean = data<R>(statistics) + n * channels * (n_trivial + 1), *variance = mean + channels * n_trivial;
      const auto move = [&, m = static_cast<R>(momentum[n])](R& kept, R measured) { kept += m * (measured - kept); };
      R* kept = static_cast<R*>(means[n].mutable_data_ptr());
      for (int64_t k = 0; k < channels * n_trivial; ++k) {
        STD_TORCH_CHECK(column[k % n_trivial] >= 0 && column[k % n_trivial] < d,
                        "trivial: expected columns of the means.");
        move(kept[k / n_trivial * d + column[k % n_trivial]], mean[k]);
      }
      for (int64_t w = 0; w < channels; ++w) move(static_cast<R*>(variances[n].mutable_data_ptr())[w], variance[w]);
      ++*static_cast<int64_t*>(counts[n].mutable_data_ptr());
    }
  });
}

bool hold_bytes_of(const std::vector<Tensor>& tensors, const Tensor& copy) {
  const char *next = static_cast<const char*>(copy.const_data_ptr()), *end = next + copy.numel() * copy.element_size();
  for (const Tensor& t : tensors) {
    const int64_t bytes = t.numel() * t.element_size();
    if (!t.is_contiguous() || t.scalar_type() != copy.scalar_type() || end - next < bytes) return false;
    if (bytes && std::memcmp(t.const_data_ptr(), next, bytes) != 0) return false;
    next += bytes;
  }
  return next == end;
}

// Whether the tensors, one after the other, hold the same bytes as `copy`; one bool.
Tensor same_values(const std::vector<Tensor>& tensors, const Tensor& copy) {
  Tensor same = new_empty(copy, {}, aoti_torch_dtype_bool());
  *static_cast<bool*>(same.mutable_data_ptr()) = hold_bytes_of(tensors, copy);
  return same;
}

// The backward pass of a layer: from the gradient of its output those of x, delta, attr, bias and the parameters; those
// that are not needed are empty.
LayerGradients conv_gradients(const Tensor& ints, const Tensor& reals, const Tensor& pack_rowptr, const Tensor& column,
                              const Tensor& value, const std::vector<Tensor>& parameters, const Tensor& statistics,
                              const Tensor& weights, const Tensor& x, const Tensor& delta, const Tensor& attr,
                              const Tensor& src, const Tensor& order, const Tensor& rowptr, const Tensor& grad_out,
                              const Tensor& order_by_source, const Tensor& colptr, const Tensor& expansion, bool mean,
                              bool need_x, bool need_delta, bool need_attr, bool need_parameters, int64_t isa) {
  LayerGradients found;
  with_call<Cpu>(ints, reals, delta, attr, isa, [&](auto& call) {
    using R = typename std::decay_t<decltype(call)>::R;
    const PlanView<R>& plan = call.plan;
    call.weights(weights), call.graph(x, src, order, rowptr), call.grad_of_nodes(grad_out);
    if (need_x) call.by_source(order_by_source, colptr);
    check_size(plan.n_parameters, count(parameters), "parameters");
    check(statistics, "statistics", real_type<R>, plan.n_layers * statistics_size(plan));
    const int64_t n = expansion.numel() / std::max<int64_t>(plan.out_size, 1);
    check(expansion, "expansion", real_type<R>, plan.out_size * n);
    found = layer_gradients(call, x, call.device.matrix(pack_rowptr, column, value), parameters, data<R>(statistics),
                            data<R>(expansion), n, mean, {need_x, need_delta, need_attr, need_parameters});
  });
  return found;
}

template <template <typename> class Device, typename Library>
void implement(Library& m) {
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics<Device>));
  m.impl("conv_moments", TORCH_BOX(&conv_moments<Device>));
  m.impl("conv_pack", TORCH_BOX(&conv_pack<Device>));
  m.impl("conv_pack_backward", TORCH_BOX(&conv_pack_backward<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def("conv_statistics(" IST_PLAN ", " IST_PACKING
        ", Tensor[] parameters, Tensor delta, Tensor attr, int n_layers, int size, int isa) -> (Tensor, Tensor)");
  m.def("conv_moments(" IST_PLAN ", " IST_POINTS ", int layer, int size, int isa) -> Tensor");
  m.def(
      "conv_move_running(Tensor statistics, Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counts, "
      "Tensor trivial, float[] momentum) -> ()");
  m.def("conv_pack(" IST_PLAN ", " IST_PACKING ", Tensor[] parameters, Tensor statistics) -> Tensor");
  m.def("conv_pack_backward(" IST_PLAN ", " IST_PACKING
        ", Tensor statistics, Tensor grad_packed, int n_parameters) -> Tensor");
  m.def("conv_gradients(" IST_PLAN ", " IST_PACKING ", Tensor[] parameters, Tensor statistics, " IST_EDGES
        ", " IST_GRADIENT ", Tensor expansion, bool mean, " IST_NEEDS
        ", bool need_parameters, int isa) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])");
  m.def("same_values(Tensor[] tensors, Tensor copy) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  implement<Cpu>(m);
  m.impl("conv_gradients", TORCH_BOX(&conv_gradients));
  m.impl("same_values", TORCH_BOX(&same_values));
  m.impl("conv_move_running", TORCH_BOX(&conv_move_running));
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CUDA, m) { implement<Cuda>(m); }
