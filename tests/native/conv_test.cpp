// conv_test DIR: every case file of DIR through csrc/packing.h and the loops of csrc/cpu, in float and double, with
// every instruction set that this machine has, on one and several threads, against the expected results in the files.
// No torch, no Python.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <memory>

#include "../../csrc/cpu/entry.h"
#include "arrays.h"

namespace {

using namespace implicit_steer;
using native_test::Case;
using native_test::numbers;
using Results = std::map<std::string, std::vector<double>>;

// ‖actual − expected‖ / ‖expected‖ allowed; measured: at most 1.3e-6 (float), 9.4e-15 (double).
template <typename R>
constexpr double kBound = sizeof(R) == 4 ? 1e-5 : 1e-13;
// The same of second derivatives, and where edges are near the origin: there the softened radius costs digits.
template <typename R>
double second_bound(bool near) {
  if (sizeof(R) == 4) return near ? 2e-2 : 1e-4;
  return near ? 1e-6 : 1e-12;
}

constexpr const char* kSets[] = {"", "baseline", "avx2", "avx512"};

// What is never written, or read before it is written, shows as NaN.
template <typename R>
std::vector<R> unwritten(int64_t n) {
  return std::vector<R>(n, std::numeric_limits<R>::quiet_NaN());
}

// As ConvArgs asks; a new block of exactly `bytes` at every call, all bits set (NaN).
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  memory.reset(std::aligned_alloc(64, bytes));
  return std::memset(memory.get(), 0xff, bytes);
}

// The inputs of one case, and what run_pack makes of the parameters.
template <typename R>
struct Problem {
  const Case& file;
  std::vector<int32_t> ints, rowptr, column;
  std::vector<R> reals, value, parameters, x, delta, attr, grad_out;
  PlanView<R> plan{};
  SparseMatrix<R> matrix{};
  std::vector<R> statistics, packed;

  explicit Problem(const Case& c)
      : file(c),
        ints(numbers<int32_t>(c["plan_ints"])),
        rowptr(numbers<int32_t>(c["pack_rowptr"])),
        column(numbers<int32_t>(c["pack_column"])),
        reals(numbers<R>(c["plan_reals"])),
        value(numbers<R>(c["pack_value"])),
        parameters(numbers<R>(c["parameters"])),
        x(numbers<R>(c["x"])),
        delta(numbers<R>(c["delta"])),
        attr(numbers<R>(c["attr"])),
        grad_out(numbers<R>(c["grad_out"])) {
    if (!plan_view(plan, ints.data(), ints.size(), reals.data(), reals.size())) throw std::runtime_error("plan");
    if (plan.n_parameters != static_cast<int64_t>(parameters.size())) throw std::runtime_error("parameters");
    if (plan.n_weights + 1 != static_cast<int64_t>(rowptr.size())) throw std::runtime_error("pack_rowptr");
    matrix = {plan.n_weights, rowptr.data(), column.data(), value.data()};
  }

  int n_norms() const { return plan.has_norms ? plan.n_layers : 0; }

  ConvArgs<R> arguments(int threads) {
    ConvArgs<R> a{};
    a.plan = &plan, a.weights = packed.data(), a.x = x.data(), a.delta = delta.data(), a.attr = attr.data();
    a.src = file["src"].bytes.data(), a.order = file["order"].bytes.data(), a.rowptr = file["rowptr"].bytes.data();
    a.order_by_source = file["order_by_source"].bytes.data(), a.colptr = file["colptr"].bytes.data();
    a.wide = file["src"].dtype == "int64";
    a.n_src = file["x"].shape[0], a.n_dst = file["rowptr"].size() - 1, a.n_edges = file["src"].size();
    a.threads = threads, a.scratch = scratch, a.grad_out = grad_out.data();
    return a;
  }
};

template <typename R>
std::vector<double> widened(const std::vector<R>& numbers) {
  return {numbers.begin(), numbers.end()};
}

// The packed weights; in training from statistics of these edges, which are a result.
template <typename R>
void run_pack(Problem<R>& p, const ConvTable<R>& table, int threads, Results& results) {
  p.packed = unwritten<R>(p.plan.n_weights);
  p.matrix.multiply(p.parameters.data(), p.packed.data());
  if (p.file.has("running")) {
    p.statistics = numbers<R>(p.file["running"]);
    for (int n = 0; n < p.n_norms(); ++n)
      pack_affine(p.plan, n, p.parameters.data(), p.statistics.data(), p.packed.data());
    return;
  }
  p.statistics = unwritten<R>(p.n_norms() * statistics_size(p.plan));
  ConvArgs<R> a = p.arguments(threads);
  batch_statistics(table, a, p.parameters.data(), p.packed.data(), p.statistics.data());
  results["statistics"] = widened(p.statistics);
}

template <typename R>
void run_forward(Problem<R>& p, const ConvTable<R>& table, int threads, Results& results) {
  ConvArgs<R> a = p.arguments(threads);
  auto out = unwritten<R>(a.n_dst * p.plan.out_size);
  a.out = out.data();
  table.forward(a);
  results["out"] = widened(out);
}

// ⟨∂L/∂p, v⟩ for each of the file's directions v of the parameters p.
template <typename R>
std::vector<double> slopes(const Problem<R>& p, const std::vector<R>& grad_packed) {
  std::vector<R> grad(p.parameters.size());
  p.matrix.multiply_transposed(p.plan.n_grad, grad_packed.data(), grad.data());
  for (int n = 0; n < p.n_norms(); ++n)
    pack_affine_backward(p.plan, n, p.statistics.data(), grad_packed.data(), grad.data());
  const auto direction = numbers<double>(p.file["direction"]);  // [n_directions, n_parameters]
  std::vector<double> slope(p.file["slope"].size());
  for (size_t n = 0; n < slope.size(); ++n)
    for (size_t k = 0; k < grad.size(); ++k) slope[n] += direction[n * grad.size() + k] * grad[k];
  return slope;
}

// The gradients asked for, each under its name followed by `suffix`.
struct Needs {
  bool x, delta, attr, weights;
  const char* suffix;
};

template <typename R>
void run_backward(Problem<R>& p, const ConvTable<R>& table, int threads, const Needs& needs, Results& results) {
  ConvArgs<R> a = p.arguments(threads);
  auto grad_edge = unwritten<R>(needs.x ? std::max<int64_t>(a.n_edges, 1) * p.plan.n_gathered : 0);
  auto grad_x = unwritten<R>(needs.x ? p.x.size() : 0), grad_delta = unwritten<R>(needs.delta ? p.delta.size() : 0);
  auto grad_attr = unwritten<R>(needs.attr ? p.attr.size() : 0);
  auto grad_weights = unwritten<R>(needs.weights ? int64_t{threads} * p.plan.n_grad : 0);
  const auto place = [](std::vector<R>& v) { return v.empty() ? nullptr : v.data(); };
  a.grad_edge = place(grad_edge), a.grad_x = place(grad_x), a.grad_delta = place(grad_delta);
  a.grad_attr = place(grad_attr), a.grad_weights = place(grad_weights);
  table.backward(a);
  const std::string suffix = needs.suffix;
  if (needs.x) results["grad_x" + suffix] = widened(grad_x);
  if (needs.delta) results["grad_delta" + suffix] = widened(grad_delta);
  if (needs.attr) results["grad_attr" + suffix] = widened(grad_attr);
  if (needs.weights) results["slope" + suffix] = slopes(p, grad_weights);
}

// Derivatives of what run_forward and run_backward give, along the file's direction.
template <typename R>
void run_second(Problem<R>& p, const ConvTable<R>& table, int threads, Results& results) {
  const auto direction = numbers<R>(p.file["direction"]);  // [n_directions, n_parameters]
  std::vector<R> of_parameters(p.parameters.size()), of_packed(p.plan.n_weights);
  for (size_t k = 0; k < direction.size(); ++k) of_parameters[k % of_parameters.size()] += direction[k];
  p.matrix.multiply(of_parameters.data(), of_packed.data());  // packing is linear at given statistics
  for (int n = 0; n < p.n_norms(); ++n)
    pack_affine(p.plan, n, of_parameters.data(), p.statistics.data(), of_packed.data());
  std::vector<R> pairs(2 * p.plan.n_weights);
  for (int64_t k = 0; k < p.plan.n_weights; ++k) pairs[2 * k] = p.packed[k], pairs[2 * k + 1] = of_packed[k];
  const auto x = numbers<R>(p.file["tangent_x"]), delta = numbers<R>(p.file["tangent_delta"]);
  const auto attr = numbers<R>(p.file["tangent_attr"]);

  ConvArgs<R> a = p.arguments(threads);
  a.weights = pairs.data(), a.x_tangent = x.data(), a.delta_tangent = delta.data(), a.attr_tangent = attr.data();
  auto out = unwritten<R>(a.n_dst * p.plan.out_size);
  a.out = out.data();
  table.forward_tangent(a);
  auto grad_edge = unwritten<R>(std::max<int64_t>(a.n_edges, 1) * p.plan.n_gathered), grad_x = unwritten<R>(p.x.size());
  auto grad_delta = unwritten<R>(p.delta.size()), grad_attr = unwritten<R>(p.attr.size());
  auto grad_weights = unwritten<R>(int64_t{threads} * p.plan.n_grad);
  a.grad_edge = grad_edge.data(), a.grad_x = grad_x.data(), a.grad_delta = grad_delta.data();
  a.grad_attr = grad_attr.data(), a.grad_weights = grad_weights.data();
  table.backward_tangent(a);
  results["out_t"] = widened(out), results["slope_t"] = slopes(p, grad_weights);
  results["grad_x_t"] = widened(grad_x), results["grad_delta_t"] = widened(grad_delta);
  results["grad_attr_t"] = widened(grad_attr);
}

template <typename R>
Results run_all(const Case& file, const ConvTable<R>& table, int threads) {
  Problem<R> p(file);
  Results results;
  run_pack(p, table, threads, results);
  run_forward(p, table, threads, results);
  for (const Needs& needs : {Needs{true, true, true, true, ""}, Needs{true, false, false, false, "/alone"},
                             Needs{false, true, false, false, "/alone"}, Needs{false, false, true, false, "/alone"},
                             Needs{false, false, false, true, "/alone"}})
    run_backward(p, table, threads, needs, results);
  run_second(p, table, threads, results);
  return results;
}

// ‖actual − expected‖ / ‖expected‖; where nothing is expected but zeros, ‖actual‖.
double deviation(const std::vector<double>& actual, const std::vector<double>& expected) {
  if (actual.size() != expected.size()) return std::numeric_limits<double>::infinity();
  double difference = 0, scale = 0;
  for (size_t k = 0; k < actual.size(); ++k) {
    difference += (actual[k] - expected[k]) * (actual[k] - expected[k]);
    scale += expected[k] * expected[k];
  }
  return std::sqrt(difference / (scale > 0 ? scale : 1));
}

bool same_bits(const Results& a, const Results& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    const std::vector<double>&first = x.second, &second = y.second;
    if (first.size() != second.size()) return false;
    return first.empty() || std::memcmp(first.data(), second.data(), first.size() * sizeof(double)) == 0;
  });
}

// Number of failures; prints each, and the largest deviation.
template <typename R>
int check(const std::string& name, const Case& file, int isa) {
  int failures = 0;
  double largest = 0, largest_second = 0;
  std::string where, where_second;
  const bool near = numbers<int64_t>(file["near"])[0];
  const std::string what = name + ", " + kSets[isa] + (sizeof(R) == 4 ? ", float" : ", double");
  for (int threads : {1, 2, 5}) {
    const Results results = run_all<R>(file, conv_table<R>(isa), threads);
    for (const auto& [tensor, actual] : results) {
      const double error = deviation(actual, numbers<double>(file[tensor.substr(0, tensor.find('/'))]));
      const bool second = tensor.size() > 2 && tensor.substr(tensor.size() - 2) == "_t";
      if (!(error <= (second ? second_bound<R>(near) : kBound<R>))) {
        std::printf("FAILED %s, %d threads: %s deviates by %.2g\n", what.c_str(), threads, tensor.c_str(), error);
        ++failures;
      }
      double& worst = second ? largest_second : largest;
      if (error > worst) worst = error, (second ? where_second : where) = tensor;
    }
    if (!same_bits(results, run_all<R>(file, conv_table<R>(isa), threads))) {
      std::printf("FAILED %s: two runs on %d threads differ\n", what.c_str(), threads);
      ++failures;
    }
  }
  std::printf("%s: at most %.2g (%s); second derivatives %.2g (%s)\n", what.c_str(), largest, where.c_str(),
              largest_second, where_second.c_str());
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  int failures = 0, cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(argc > 1 ? argv[1] : ".")) {
    if (entry.path().extension() != ".case") continue;
    const Case file(entry.path().string());
    for (int isa = 1; isa <= widest_instruction_set(); ++isa) {
      failures += check<float>(entry.path().stem(), file, isa);
      failures += check<double>(entry.path().stem(), file, isa);
    }
    ++cases;
  }
  std::printf("%d cases, instruction sets up to %s, %d failures\n", cases, kSets[widest_instruction_set()], failures);
  return failures > 0 || cases == 0;
}
