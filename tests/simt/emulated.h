// The kernel library, emulated, as an engine of tests/native/conv_case.h. The emulator's device memory is the host's.
#pragma once

#include <memory>
#include <stdexcept>
#include <type_traits>

#include "../../csrc/cuda/library.h"
#include "../native/conv_case.h"
#include "engine.h"

namespace simt_test {

using namespace implicit_steer;
using native_test::numbers;
using native_test::Problem;
using native_test::Results;
using native_test::unwritten;
using native_test::widened;

inline void check(const Failure& failure) {
  if (failure.reason) throw std::runtime_error(std::string(failure.what) + ": " + failure.reason);
}

// Device memory of one call, its blocks; each has all bits set (NaN).
inline std::vector<std::vector<double>> scratch_blocks;
inline void* scratch(int64_t bytes) {
  std::vector<double>& memory = scratch_blocks.emplace_back(bytes / 8 + 1);
  std::memset(static_cast<void*>(memory.data()), 0xff, memory.size() * 8);
  simt::add_array(memory.data(), memory.size() * 8, "scratch", true);
  return memory.data();
}

// In the place of a library's: sums in double.
template <typename R>
void multiply(const MatrixProducts<R>& m) {
  for (int64_t n = 0; n < m.batch; ++n) {
    const R *const a = m.a + n * m.rows * m.inner, *const b = m.b + n * m.inner * m.columns;
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t j = 0; j < m.columns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < m.inner; ++k)
          sum += static_cast<double>(a[m.a_transposed ? k * m.rows + i : i * m.inner + k]) *
                 b[m.b_transposed ? j * m.inner + k : k * m.columns + j];
        m.out[(n * m.rows + i) * m.columns + j] = static_cast<R>(sum);
      }
  }
}

template <typename R>
const CudaTable<R>& table() {
  if constexpr (std::is_same_v<R, float>)
    return *implicit_steer_cuda_library()->f32;
  else
    return *implicit_steer_cuda_library()->f64;
}

// A vector in three pieces, each in memory of its own.
template <typename R>
struct Parts {
  std::vector<std::vector<R>> parts;

  explicit Parts(const std::vector<R>& v) {
    const size_t first = std::min<size_t>(1, v.size()), second = v.size() - v.size() / 3;
    parts = {{v.begin(), v.begin() + first}, {v.begin() + first, v.begin() + second}, {v.begin() + second, v.end()}};
  }
  template <typename T>
  Pieces<T> pieces() const {
    Pieces<T> found{};
    for (const auto& part : parts) found.add(const_cast<R*>(part.data()), part.size());
    return found;
  }
  std::vector<R> joined() const {
    std::vector<R> all;
    for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  }
};

template <typename R>
class Emulated {
 public:
  Emulated(const native_test::Case& file, uint64_t seed, bool trace)
      : seed_(seed), trace_(trace), ints_(numbers<int32_t>(file["plan_ints"])), reals_(numbers<R>(file["plan_reals"])) {
    const int64_t bytes = table<R>().plan_bytes(ints_.data(), ints_.size(), reals_.data(), reals_.size());
    memory_.resize(bytes / 8 + 1);
    check(table<R>().plan_create(ints_.data(), ints_.size(), reals_.data(), reals_.size(), memory_.data(), nullptr,
                                 &plan_));
  }
  ~Emulated() { table<R>().plan_destroy(plan_); }

  static int64_t shared_bytes(const native_test::Case& file) {
    const auto ints = numbers<int32_t>(file["plan_ints"]);
    const auto reals = numbers<R>(file["plan_reals"]);
    return table<R>().shared_bytes(ints.data(), ints.size(), reals.data(), reals.size());
  }

  static KernelKind kernel_kind(const native_test::Case& file, Pass pass) {
    const auto ints = numbers<int32_t>(file["plan_ints"]);
    const auto reals = numbers<R>(file["plan_reals"]);
    return table<R>().kernel_kind(ints.data(), ints.size(), reals.data(), reals.size(), pass);
  }

  void pack(Problem<R>& p, Results& results) {
    p.packed = unwritten<R>(p.plan.n_weights);
    const bool running = p.file.has("running");
    p.statistics = running ? numbers<R>(p.file["running"]) : unwritten<R>(p.n_norms() * statistics_size(p.plan));
    const Parts<R> parameters(p.parameters);
    begin();
    reads(p.rowptr), reads(p.column), reads(p.value), reads(p.statistics), writes(p.packed);
    for (const auto& part : parameters.parts) reads(part);
    const auto read = parameters.template pieces<const R>();
    const NormStatistics<R> norms{p.statistics.data(), nullptr, {}};
    check(table<R>().pack(*plan_, p.matrix, read, norms, p.packed.data(), nullptr, nullptr));
    if (running) return;
    ConvArgs<R> a = p.arguments();
    begin(), inputs(p, a);
    for (const auto& part : parameters.parts) reads(part);
    writes(p.packed), writes(p.statistics);
    check(table<R>().statistics(*plan_, a, read, p.packed.data(), p.statistics.data(), nullptr));
    results["statistics"] = widened(p.statistics);
  }
  // What `pack` makes of statistics that lie as batch norms keep them, [W, d] with `trivial` columns and [W]: packed
  // weights, and the statistics one after the other.
  std::pair<std::vector<R>, std::vector<R>> pack_running(Problem<R>& p, const std::vector<std::vector<R>>& running,
                                                         const std::vector<int64_t>& trivial) {
    const Parts<R> parameters(p.parameters);
    auto packed = unwritten<R>(p.plan.n_weights), statistics = unwritten<R>(p.statistics.size());
    NormStatistics<R> norms{nullptr, trivial.data(), {}};
    begin();
    reads(p.rowptr), reads(p.column), reads(p.value), reads(trivial), writes(packed), writes(statistics);
    for (const auto& part : parameters.parts) reads(part);
    for (const auto& values : running) reads(values), norms.running.add(values.data(), values.size());
    check(table<R>().pack(*plan_, p.matrix, parameters.template pieces<const R>(), norms, packed.data(),
                          statistics.data(), nullptr));
    return {packed, statistics};
  }
  // Of the input of batch norm `layer`, [2, size], from the packed weights.
  std::vector<R> moments(Problem<R>& p, int layer, int64_t size) {
    ConvArgs<R> a = p.arguments();
    a.layer = layer;
    auto found = unwritten<R>(2 * size);
    begin(), inputs(p, a);
    reads(p.packed), writes(found);
    check(table<R>().moments(*plan_, a, found.data(), nullptr));
    return found;
  }
  std::vector<R> unpack(Problem<R>& p, const std::vector<R>& grad_packed) {
    const Transposed<R> transposed(p.matrix, p.plan.n_grad, p.plan.n_parameters);
    const SparseMatrix<R> matrix{p.plan.n_parameters, transposed.rowptr.data(), transposed.column.data(),
                                 transposed.value.data()};
    Parts<R> grad(unwritten<R>(p.plan.n_parameters));
    begin();
    reads(transposed.rowptr), reads(transposed.column), reads(transposed.value), reads(p.statistics);
    reads(grad_packed);
    for (const auto& part : grad.parts) writes(part);
    check(table<R>().pack_backward(*plan_, matrix, p.statistics.data(), grad_packed.data(), grad.template pieces<R>(),
                                   nullptr));
    return grad.joined();
  }
  // The whole backward pass of a layer: the gradients of the parameters, then of the bias.
  std::vector<R> layer_backward(Problem<R>& p, ConvArgs<R> a, const MeanAndBias<R>& after) {
    const Transposed<R> transposed(p.matrix, p.plan.n_grad, p.plan.n_parameters);
    const SparseMatrix<R> matrix{p.plan.n_parameters, transposed.rowptr.data(), transposed.column.data(),
                                 transposed.value.data()};
    Parts<R> grad(unwritten<R>(p.plan.n_parameters));
    auto of_bias = unwritten<R>(after.n);
    run(p, a, [&](const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream) {
      reads(transposed.rowptr), reads(transposed.column), reads(transposed.value), reads(p.statistics);
      numbers_at(after.expansion, p.plan.out_size * after.n, "expansion"), writes(of_bias);
      for (const auto& part : grad.parts) writes(part);
      return table<R>().layer_backward(plan, args, after, matrix, p.statistics.data(), grad.template pieces<R>(),
                                       of_bias.data(), stream);
    });
    std::vector<R> found = grad.joined();
    found.insert(found.end(), of_bias.begin(), of_bias.end());
    return found;
  }
  // The kernel reads the first layout of θ alone.
  std::vector<R> pairs(Problem<R>& p, std::vector<R> tangents) {
    std::fill(tangents.begin() + p.plan.n_grad, tangents.end(), std::numeric_limits<R>::quiet_NaN());
    auto pairs = unwritten<R>(2 * p.plan.n_weights);
    begin();
    reads(p.packed), reads(tangents), writes(pairs);
    check(table<R>().pair_weights(*plan_, p.packed.data(), tangents.data(), pairs.data(), nullptr));
    return pairs;
  }
  int64_t gradient_size(Problem<R>& p) const { return p.plan.n_weights; }

  void forward(Problem<R>& p, ConvArgs<R> a, const MeanAndBias<R>& after = {}) {
    run(p, a, [&](const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream) {
      numbers_at(after.expansion, p.plan.out_size * after.n, "expansion");
      numbers_at(after.bias, after.n, "bias");
      return table<R>().forward(plan, args, after, stream);
    });
  }
  // Memory for what forward passes keep of p's sums over nodes.
  std::vector<R> node_sums(Problem<R>& p) { return unwritten<R>(table<R>().node_sums_size(*plan_, p.arguments())); }

  // The whole forward pass of a layer; packs its weights anew, to the same bits as `pack`.
  void layer_forward(Problem<R>& p, ConvArgs<R> a, const MeanAndBias<R>& after) {
    const Parts<R> parameters(p.parameters);
    auto packed = unwritten<R>(p.plan.n_weights);
    run(p, a, [&](const DevicePlan<R>& plan, ConvArgs<R> args, void* stream) {
      numbers_at(after.expansion, p.plan.out_size * after.n, "expansion");
      numbers_at(after.bias, after.n, "bias");
      writes(packed), args.weights = packed.data();
      reads(p.rowptr), reads(p.column), reads(p.value), reads(p.statistics);
      for (const auto& part : parameters.parts) reads(part);
      return table<R>().layer_forward(plan, args, after, p.matrix, parameters.template pieces<const R>(),
                                      {p.statistics.data(), nullptr, {}}, packed.data(), nullptr, stream);
    });
  }
  void backward(Problem<R>& p, ConvArgs<R> a) { run(p, a, table<R>().backward); }
  void forward_tangent(Problem<R>& p, ConvArgs<R> a) { run(p, a, table<R>().forward_tangent); }
  void backward_tangent(Problem<R>& p, ConvArgs<R> a) { run(p, a, table<R>().backward_tangent); }

  using Pass = Failure (*)(const DevicePlan<R>&, const ConvArgs<R>&, void*);
  // `pass` on points, whose results have `hidden` numbers each.
  void run_points(Problem<R>& p, ConvArgs<R> a, Pass pass, int64_t hidden) {
    a.grad_x = a.grad_edge = nullptr;
    run(p, a, pass, a.n_edges * hidden);
  }

 private:
  const uint64_t seed_;
  const bool trace_;
  std::vector<int32_t> ints_;
  std::vector<R> reals_;
  std::vector<double> memory_;
  DevicePlan<R>* plan_;

  // ---- the arrays of a call

  void begin() {
    scratch_blocks.clear();
    simt::reset(seed_, trace_);
    simt::add_array(memory_.data(), memory_.size() * 8, "plan", false);
  }
  void add(const void* begin, int64_t bytes, const char* name, bool writable) {
    if (begin && bytes) simt::add_array(begin, bytes, name, writable);
  }
  template <typename T>
  void reads(const std::vector<T>& v) {
    add(v.data(), v.size() * sizeof(T), "input", false);
  }
  template <typename T>
  void writes(const std::vector<T>& v) {
    add(v.data(), v.size() * sizeof(T), "result", true);
  }
  void numbers_at(const R* begin, int64_t n, const char* name, bool writable = false) {
    add(begin, n * sizeof(R), name, writable);
  }
  void inputs(Problem<R>& p, ConvArgs<R>& a) {
    a.scratch = scratch, a.multiply = multiply<R>;
    const int64_t e = a.n_edges, index = a.index64 ? 8 : 4;
    numbers_at(a.delta, e * p.plan.dim, "delta"), numbers_at(a.delta_tangent, e * p.plan.dim, "delta_tangent");
    numbers_at(a.attr, e * p.plan.n_attr, "attr"), numbers_at(a.attr_tangent, e * p.plan.n_attr, "attr_tangent");
    numbers_at(a.x, a.n_src * p.plan.in_size, "x"), numbers_at(a.x_tangent, a.n_src * p.plan.in_size, "x_tangent");
    add(a.src, e * index, "src", false), add(a.order, e * index, "order", false);
    add(a.rowptr, (a.n_dst + 1) * index, "rowptr", false), add(a.colptr, (a.n_src + 1) * index, "colptr", false);
    add(a.order_by_source, e * index, "order_by_source", false);
  }
  template <typename AnyPass>
  void run(Problem<R>& p, ConvArgs<R> a, AnyPass pass, int64_t results = -1) {
    begin(), inputs(p, a);
    if (results < 0) results = a.n_dst * p.plan.out_size;
    numbers_at(a.weights, p.plan.n_weights * (a.delta_tangent ? 2 : 1), "weights");
    numbers_at(a.out, results, "out", true), numbers_at(a.grad_out, results, "grad_out");
    const int64_t sums = a.node_sums ? table<R>().node_sums_size(*plan_, a) : 0;
    numbers_at(a.node_sums, sums, "node_sums", true);
    numbers_at(a.grad_edge, a.n_edges * p.plan.in_size, "grad_edge", true);
    numbers_at(a.grad_x, a.n_src * p.plan.in_size, "grad_x", true);
    numbers_at(a.grad_delta, a.n_edges * p.plan.dim, "grad_delta", true);
    numbers_at(a.grad_attr, a.n_edges * p.plan.n_attr, "grad_attr", true);
    numbers_at(a.grad_weights, p.plan.n_weights, "grad_weights", true);
    check(pass(*plan_, a, nullptr));
  }
};

}  // namespace simt_test
