// The torch operators of cpu/, through torch's stable ABI: checks, memory, the choice of the instruction set.
// Their callers (backends/cpu.py) have validated shapes and indices; what is checked here keeps memory safe.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <tuple>
#include <vector>

#include "cpu/entry.h"
#include "op_arguments.h"

namespace {

using namespace implicit_steer;

void check_size(int64_t found, int64_t given, const char* name) {
  STD_TORCH_CHECK(found == given, name, ": expected ", found, ", got ", given, ".");
}

// Below this many edges per thread, waking a second thread costs more than it saves.
constexpr int64_t kTileEdgesPerThread = 192;

// Memory of one thread that its calls share; only ever grows.
void* scratch(int64_t bytes) {
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

int threads_for(int64_t edges) {
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  return static_cast<int>(std::clamp<int64_t>(edges / kTileEdgesPerThread, 1, most));
}

template <typename R>
const ConvTable<R>& table(int64_t wanted) {
  return conv_table<R>(instruction_set(wanted));
}

// The parameters as one vector.
template <typename R>
std::vector<R> gather(const std::vector<Tensor>& parameters, int64_t n_parameters) {
  std::vector<R> vector;
  vector.reserve(n_parameters);
  for (const Tensor& t : parameters) {
    check(t, "parameters", sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double, t.numel());
    const R* values = static_cast<const R*>(t.const_data_ptr());
    vector.insert(vector.end(), values, values + t.numel());
  }
  STD_TORCH_CHECK(static_cast<int64_t>(vector.size()) == n_parameters, "parameters: expected ", n_parameters,
                  " numbers, got ", vector.size(), ".");
  return vector;
}

template <typename R>
void read_plan(Plan<R>& plan, const Tensor& ints, const Tensor& reals) {
  STD_TORCH_CHECK(ints.scalar_type() == ScalarType::Int && ints.is_contiguous(), "plan_ints: expected int32.");
  check(reals, "plan_reals", sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double, reals.numel());
  const bool valid = plan_view(plan, data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel());
  STD_TORCH_CHECK(valid, "plan_ints, plan_reals: not what backends/cpu_plan.py writes.");
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
  a.wide = index == ScalarType::Long, a.threads = threads_for(a.n_edges), a.scratch = scratch;
  return a;
}

// -> (N_dst, C_out)
Tensor conv_forward(const Tensor& ints, const Tensor& reals, const Tensor& weights, const Tensor& x,
                    const Tensor& delta, const Tensor& attr, const Tensor& src, const Tensor& order,
                    const Tensor& rowptr, int64_t out_size, int64_t isa) {
  Tensor out;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    check_size(plan.out_size, out_size, "out_size");
    ConvArgs<R> a = graph_arguments(plan, weights, x, delta, attr, src, order, rowptr);
    out = torch::stable::new_empty(x, {a.n_dst, plan.out_size});
    a.out = mutable_data<R>(out);
    table<R>(isa).forward(a);
  });
  return out;
}

// What a backward pass gives: gradients of x, delta, attr and weights, those that are not wanted empty; and its memory.
struct Gradients {
  Tensor x, delta, attr, weights;
  Tensor of_edges, of_threads;  // x's gradient edge by edge; that of the weights thread by thread

  // Hands their memory to a call.
  template <typename R>
  void bind(ConvArgs<R>& a, const Tensor& like, bool need_x, bool need_delta, bool need_attr, bool need_weights) {
    const PlanView<R>& plan = *a.plan;
    const auto empty = [&](int64_t rows, int64_t columns) { return torch::stable::new_empty(like, {rows, columns}); };
    x = empty(need_x ? a.n_src : 0, plan.in_size);
    of_edges = empty(need_x ? std::max<int64_t>(a.n_edges, 1) : 0, plan.in_size);  // not null: x's is wanted
    delta = empty(need_delta ? a.n_edges : 0, plan.dim), attr = empty(need_attr ? a.n_edges : 0, plan.n_attr);
    weights = torch::stable::new_empty(like, {need_weights ? plan.n_weights : 0});
    of_threads = empty(need_weights ? a.threads : 0, plan.n_grad);
    a.grad_x = mutable_data<R>(x), a.grad_edge = mutable_data<R>(of_edges);
    a.grad_delta = mutable_data<R>(delta), a.grad_attr = mutable_data<R>(attr);
    a.grad_weights = mutable_data<R>(of_threads);
  }

  // After the call. Every weight of θ stands in the packed weights twice; the first holds the gradient, the second 0.
  template <typename R>
  void finish(const PlanView<R>& plan) {
    if (weights.numel() == 0) return;
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
    ConvArgs<R> a = graph_arguments(plan, weights, x, delta, attr, src, order, rowptr);
    check(grad_out, "grad_out", weights.scalar_type(), a.n_dst * plan.out_size);
    a.grad_out = data<R>(grad_out);
    if (need_x) bind_source_order(a, src, order_by_source, colptr);
    grads.bind(a, x, need_x, need_delta, need_attr, need_weights);
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
    ConvArgs<R> a = graph_arguments(plan, weights, x, delta, attr, src, order, rowptr);
    const ScalarType real = weights.scalar_type();
    check(grad_out, "grad_out", real, a.n_dst * plan.out_size), check(tangent_x, "tangent_x", real, x.numel());
    check(tangent_delta, "tangent_delta", real, delta.numel()), check(tangent_attr, "tangent_attr", real, attr.numel());
    const std::vector<R> pairs = with_tangents(plan, weights, tangent_weights);
    a.weights = pairs.data(), a.x_tangent = data<R>(tangent_x);
    a.delta_tangent = data<R>(tangent_delta), a.attr_tangent = data<R>(tangent_attr);
    a.grad_out = data<R>(grad_out);
    out = torch::stable::new_empty(x, {need_out ? a.n_dst : 0, plan.out_size});
    a.out = mutable_data<R>(out);
    if (need_out) table<R>(isa).forward_tangent(a);
    if (need_x) bind_source_order(a, src, order_by_source, colptr);
    grads.bind(a, x, need_x, need_delta, need_attr, need_weights);
    if (need_x || need_delta || need_attr || need_weights) table<R>(isa).backward_tangent(a);
    grads.finish(plan);
  });
  return {out, grads.x, grads.delta, grads.attr, grads.weights};
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
    out = torch::stable::new_empty(delta, {a.n_edges, hidden});
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
    out = torch::stable::new_empty(delta, {a.n_edges, hidden_size(plan)});
    a.out = mutable_data<R>(out);
    table<R>(isa).hidden_forward_tangent(a);
    grads.bind(a, delta, false, true, true, true);
    table<R>(isa).hidden_backward_tangent(a);
    grads.finish(plan);
  });
  return {out, grads.delta, grads.attr, grads.weights};
}

// -> statistics of all batch norms over these edges, (n_layers, W · (n_trivial + 1)): mean [W, n_trivial], variance [W]
Tensor conv_statistics(const Tensor& ints, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                       const Tensor& value, const std::vector<Tensor>& parameters, const Tensor& delta,
                       const Tensor& attr, int64_t n_layers, int64_t size, int64_t isa) {
  Tensor statistics;
  dispatch_real(delta, "delta", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    Plan<R> plan{};
    read_plan(plan, ints, reals);
    const SparseMatrix<R> matrix = read_matrix(plan, reals, rowptr, column, value);
    const std::vector<R> p = gather<R>(parameters, plan.n_parameters);
    check_size(plan.n_layers, n_layers, "n_layers"), check_size(statistics_size(plan), size, "size");
    STD_TORCH_CHECK(plan.has_norms, "plan: expected one with batch norms.");
    STD_TORCH_CHECK(delta.size(0) > 1, "delta: expected at least 2 edges, one has no variance.");
    Tensor packed = torch::stable::new_empty(delta, {plan.n_weights});
    R* weights = mutable_data<R>(packed);
    matrix.multiply(p.data(), weights);
    ConvArgs<R> a = point_arguments(plan, packed, delta, attr);
    statistics = torch::stable::new_empty(delta, {plan.n_layers, statistics_size(plan)});
    batch_statistics(table<R>(isa), a, p.data(), weights, mutable_data<R>(statistics));
  });
  return statistics;
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
    packed = torch::stable::new_empty(statistics, {plan.n_weights});
    R* out = mutable_data<R>(packed);
    matrix.multiply(p.data(), out);
    for (int n = 0; n < plan.n_layers && plan.has_norms; ++n) pack_affine(plan, n, p.data(), data<R>(statistics), out);
  });
  return packed;
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
    check(statistics, "statistics", grad_packed.scalar_type(), plan.n_layers * statistics_size(plan));
    check(grad_packed, "grad_packed", grad_packed.scalar_type(), plan.n_weights);
    check_size(plan.n_parameters, n_parameters, "n_parameters");
    grad = torch::stable::new_zeros(grad_packed, {plan.n_parameters});
    R* out = mutable_data<R>(grad);
    matrix.multiply_transposed(plan.n_grad, data<R>(grad_packed), out);
    for (int n = 0; n < plan.n_layers && plan.has_norms; ++n)
      pack_affine_backward(plan, n, data<R>(statistics), data<R>(grad_packed), out);
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
  Tensor same = torch::stable::new_empty(copy, {}, ScalarType::Bool);
  *static_cast<bool*>(same.mutable_data_ptr()) = hold_bytes_of(tensors, copy);
  return same;
}

// φ (0 .. 4, Function) or exp (5) of every number of x: for tests of the lanes.
Tensor lane_function(const Tensor& x, int64_t which, int64_t isa) {
  Tensor out = torch::stable::new_empty(x, {x.numel()});
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
      "Tensor src, Tensor order, Tensor rowptr, int out_size, int isa) -> Tensor");
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
  m.def(
      "conv_statistics(Tensor plan_ints, Tensor plan_reals, Tensor pack_rowptr, Tensor pack_column, Tensor pack_value, "
      "Tensor[] parameters, Tensor delta, Tensor attr, int n_layers, int size, int isa) -> Tensor");
  m.def(
      "conv_pack(Tensor plan_ints, Tensor plan_reals, Tensor pack_rowptr, Tensor pack_column, Tensor pack_value, "
      "Tensor[] parameters, Tensor statistics) -> Tensor");
  m.def(
      "conv_pack_backward(Tensor plan_ints, Tensor plan_reals, Tensor pack_rowptr, Tensor pack_column, "
      "Tensor pack_value, Tensor statistics, Tensor grad_packed, int n_parameters) -> Tensor");
  m.def("same_values(Tensor[] tensors, Tensor copy) -> Tensor");
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
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("same_values", TORCH_BOX(&same_values));
  m.impl("conv_pack", TORCH_BOX(&conv_pack));
  m.impl("conv_pack_backward", TORCH_BOX(&conv_pack_backward));
  m.impl("lane_function", TORCH_BOX(&lane_function));
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CompositeExplicitAutograd, m) { m.impl("fma_peak", TORCH_BOX(&fma_peak)); }
