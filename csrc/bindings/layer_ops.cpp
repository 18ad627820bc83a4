// The torch operators of a layer: parameters to packed weights and back, and the whole backward pass.

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../packing.h"
#include "conv_arguments.h"

namespace {

using namespace implicit_steer;

int64_t count(const std::vector<Tensor>& parameters) {
  int64_t n = 0;
  for (const Tensor& t : parameters) n += t.numel();
  return n;
}

// The parameters as one vector.
template <typename R>
std::vector<R> gather(const std::vector<Tensor>& parameters, int64_t n_parameters) {
  check_size(n_parameters, count(parameters), "parameters");
  std::vector<R> vector;
  vector.reserve(n_parameters);
  for (const Tensor& t : parameters) {
    check(t, "parameters", sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double, t.numel());
    const R* values = static_cast<const R*>(t.const_data_ptr());
    vector.insert(vector.end(), values, values + t.numel());
  }
  return vector;
}

// The sparse matrix from parameters to packed weights.
template <typename R>
SparseMatrix<R> read_matrix(const PlanView<R>& plan, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                            const Tensor& value) {
  check(rowptr, "pack_rowptr", ScalarType::Int, int64_t{plan.n_weights} + 1);
  check(column, "pack_column", ScalarType::Int, column.numel());
  check(value, "pack_value", reals.scalar_type(), column.numel());
  return {plan.n_weights, data<int32_t>(rowptr), data<int32_t>(column), data<R>(value)};
}

// -> statistics of all batch norms over these edges, (n_layers, W · (n_trivial + 1)): mean [W, n_trivial], variance
// [W]; and the packed weights at them
std::tuple<Tensor, Tensor> conv_statistics(const Tensor& ints, const Tensor& reals, const Tensor& rowptr,
                                           const Tensor& column, const Tensor& value,
                                           const std::vector<Tensor>& parameters, const Tensor& delta,
                                           const Tensor& attr, int64_t n_layers, int64_t size, int64_t isa) {
  Tensor statistics, packed;
  dispatch_real(delta, "delta", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    const SparseMatrix<R> matrix = read_matrix(plan, reals, rowptr, column, value);
    const std::vector<R> p = gather<R>(parameters, plan.n_parameters);
    check_size(plan.n_layers, n_layers, "n_layers"), check_size(statistics_size(plan), size, "size");
    STD_TORCH_CHECK(plan.has_norms, "plan: expected one with batch norms.");
    STD_TORCH_CHECK(delta.size(0) > 1, "delta: expected at least 2 edges, one has no variance.");
    packed = new_empty(delta, {plan.n_weights});
    R* weights = mutable_data<R>(packed);
    matrix.multiply(p.data(), weights);
    ConvArgs<R> a = point_arguments(plan, packed, delta, attr);
    statistics = new_empty(delta, {plan.n_layers, statistics_size(plan)});
    batch_statistics(table<R>(isa), a, p.data(), weights, mutable_data<R>(statistics));
  });
  return {statistics, packed};
}

// -> (2, W · d): of the input of batch norm `layer` over these edges, mean and sum of squared deviations of every
// coordinate, 0 without edges; the packed weights are at the statistics of the norms before it.
Tensor conv_moments(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& delta,
                    const Tensor& attr, int64_t layer, int64_t size, int64_t isa) {
  Tensor moments;
  dispatch_real(delta, "delta", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    STD_TORCH_CHECK(plan.has_norms && layer >= 0 && layer < plan.n_layers, "layer: expected a batch norm's number.");
    check_size(plan.layers[layer].out_size / plan.c * plan.d, size, "size");
    ConvArgs<R> a = point_arguments(plan, weights, delta, attr);
    moments = new_empty(delta, {2, size});
    R* out = mutable_data<R>(moments);
    std::fill(out, out + 2 * size, R{0});
    if (a.n_edges == 0) return;
    const Sums found = batch_sums(table<R>(isa), a, static_cast<int>(layer));
    for (int k = 0; k < size; ++k)
      coordinate_moments(plan, static_cast<int>(size), k, found.sums.data(), found.shift.data(),
                         static_cast<double>(a.n_edges), out);
  });
  return moments;
}

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

// Parameters and statistics -> packed weights.
Tensor conv_pack(const Tensor& ints, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                 const Tensor& value, const std::vector<Tensor>& parameters, const Tensor& statistics) {
  Tensor packed;
  dispatch_real(statistics, "statistics", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    const SparseMatrix<R> matrix = read_matrix(plan, reals, rowptr, column, value);
    const std::vector<R> p = gather<R>(parameters, plan.n_parameters);
    check(statistics, "statistics", statistics.scalar_type(), plan.n_layers * statistics_size(plan));
    packed = new_empty(statistics, {plan.n_weights});
    R* out = mutable_data<R>(packed);
    matrix.multiply(p.data(), out);
    for (int n = 0; n < plan.n_layers && plan.has_norms; ++n) pack_affine(plan, n, p.data(), data<R>(statistics), out);
  });
  return packed;
}

// grad_packed [n_grad] -> the gradient of the parameters, one vector [n_parameters]
template <typename R>
void unpack_gradient(const PlanView<R>& plan, const SparseMatrix<R>& matrix, const Tensor& statistics,
                     const R* grad_packed, R* grad) {
  const ScalarType real = sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double;
  check(statistics, "statistics", real, plan.n_layers * statistics_size(plan));
  std::fill_n(grad, plan.n_parameters, R{});
  matrix.multiply_transposed(plan.n_grad, grad_packed, grad);
  for (int n = 0; n < plan.n_layers && plan.has_norms; ++n)
    pack_affine_backward(plan, n, data<R>(statistics), grad_packed, grad);
}

// grad_packed [n_weights] -> the gradient of the parameters, one vector
Tensor conv_pack_backward(const Tensor& ints, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                          const Tensor& value, const Tensor& statistics, const Tensor& grad_packed,
                          int64_t n_parameters) {
  Tensor grad;
  dispatch_real(grad_packed, "grad_packed", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    const SparseMatrix<R> matrix = read_matrix(plan, reals, rowptr, column, value);
    check(grad_packed, "grad_packed", grad_packed.scalar_type(), plan.n_weights);
    check_size(plan.n_parameters, n_parameters, "n_parameters");
    grad = new_empty(grad_packed, {plan.n_parameters});
    unpack_gradient(plan, matrix, statistics, data<R>(grad_packed), mutable_data<R>(grad));
  });
  return grad;
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

// The vector [n_parameters] in pieces of the parameters' shapes.
template <typename R>
std::vector<Tensor> split(const R* vector, const std::vector<Tensor>& parameters) {
  std::vector<Tensor> pieces;
  pieces.reserve(parameters.size());
  for (const Tensor& t : parameters) {
    pieces.push_back(new_empty(t, t.sizes(), dtype_of(t)));
    std::copy_n(vector, t.numel(), static_cast<R*>(pieces.back().mutable_data_ptr()));
    vector += t.numel();
  }
  return pieces;
}

// The gradients of the sums over the edges, and of the bias [n]; see finish_nodes().
template <typename R>
void finish_backward(ConvArgs<R>& a, const Tensor& expansion, bool mean, std::vector<R>& of_sums, Tensor& of_bias) {
  const int64_t width = a.plan->out_size, n = expansion.numel() / std::max<int64_t>(width, 1);
  std::vector<R> total(width);
  if (mean) of_sums.resize(a.n_dst * width);
  for (int64_t i = 0; i < a.n_dst; ++i)
    for (int64_t k = 0; k < width; ++k) {
      const R g = a.grad_out[i * width + k];
      total[k] += g;
      if (mean) of_sums[i * width + k] = g / divisor(a, i);
    }
  if (mean) a.grad_out = of_sums.data();
  of_bias = new_empty(expansion, {n});
  check(expansion, "expansion", sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double, width * n);
  std::fill_n(mutable_data<R>(of_bias), n, R{});
  for (int64_t k = 0; k < width * n; ++k) mutable_data<R>(of_bias)[k % n] += data<R>(expansion)[k] * total[k / n];
}

// The backward pass of a layer: from the gradient of its output those of x, delta, attr, bias and the parameters; those
// that are not needed are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> conv_gradients(
    const Tensor& ints, const Tensor& reals, const Tensor& pack_rowptr, const Tensor& column, const Tensor& value,
    const std::vector<Tensor>& parameters, const Tensor& statistics, const Tensor& weights, const Tensor& x,
    const Tensor& delta, const Tensor& attr, const Tensor& src, const Tensor& order, const Tensor& rowptr,
    const Tensor& grad_out, const Tensor& order_by_source, const Tensor& colptr, const Tensor& expansion, bool mean,
    bool need_x, bool need_delta, bool need_attr, bool need_parameters, int64_t isa) {
  Gradients grads;
  Tensor of_bias;
  std::vector<Tensor> of_parameters;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    ConvArgs<R> a = backward_arguments(grads, plan, weights, x, delta, attr, src, order, rowptr, grad_out,
                                       order_by_source, colptr, need_x, need_delta, need_attr, need_parameters);
    std::vector<R> of_sums;
    finish_backward(a, expansion, mean, of_sums, of_bias);
    table<R>(isa).backward(a);
    if (!need_parameters) return;
    check_size(plan.n_parameters, count(parameters), "parameters");
    std::vector<R> grad(plan.n_parameters);
    unpack_gradient(plan, read_matrix(plan, reals, pack_rowptr, column, value), statistics, a.grad_weights,
                    grad.data());
    of_parameters = split(grad.data(), parameters);
  });
  return {grads.x, grads.delta, grads.attr, of_bias, of_parameters};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def(
      "conv_statistics(Tensor plan_ints, Tensor plan_reals, Tensor pack_rowptr, Tensor pack_column, Tensor pack_value, "
      "Tensor[] parameters, Tensor delta, Tensor attr, int n_layers, int size, int isa) -> (Tensor, Tensor)");
  m.def(
      "conv_moments(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor delta, Tensor attr, int layer, "
      "int size, int isa) -> Tensor");
  m.def(
      "conv_move_running(Tensor statistics, Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counts, "
      "Tensor trivial, float[] momentum) -> ()");
  m.def(
      "conv_pack(Tensor plan_ints, Tensor plan_reals, Tensor pack_rowptr, Tensor pack_column, Tensor pack_value, "
      "Tensor[] parameters, Tensor statistics) -> Tensor");
  m.def(
      "conv_pack_backward(Tensor plan_ints, Tensor plan_reals, Tensor pack_rowptr, Tensor pack_column, "
      "Tensor pack_value, Tensor statistics, Tensor grad_packed, int n_parameters) -> Tensor");
  m.def(
      "conv_gradients(Tensor plan_ints, Tensor plan_reals, Tensor pack_rowptr, Tensor pack_column, Tensor pack_value, "
      "Tensor[] parameters, Tensor statistics, Tensor weights, Tensor x, Tensor delta, Tensor attr, Tensor src, "
      "Tensor order, Tensor rowptr, Tensor grad_out, Tensor order_by_source, Tensor colptr, Tensor expansion, "
      "bool mean, bool need_x, bool need_delta, bool need_attr, bool need_parameters, int isa) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor[])");
  m.def("same_values(Tensor[] tensors, Tensor copy) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("conv_moments", TORCH_BOX(&conv_moments));
  m.impl("conv_gradients", TORCH_BOX(&conv_gradients));
  m.impl("same_values", TORCH_BOX(&same_values));
  m.impl("conv_move_running", TORCH_BOX(&conv_move_running));
  m.impl("conv_pack", TORCH_BOX(&conv_pack));
  m.impl("conv_pack_backward", TORCH_BOX(&conv_pack_backward));
}
