// A case file as a problem for the native loops and the CUDA kernels: its inputs, all passes, and how far the results
// are from what the file expects. No torch, no Python.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "../../csrc/cpu/conv.h"
#include "../../csrc/packing.h"
#include "arrays.h"

namespace native_test {

using namespace implicit_steer;
using Results = std::map<std::string, std::vector<double>>;

// What is never written, or read before it is written, shows as NaN.
template <typename R>
std::vector<R> unwritten(int64_t n) {
  return std::vector<R>(n, std::numeric_limits<R>::quiet_NaN());
}

// The inputs of one case, and what run_pack makes of the parameters.
template <typename R>
struct Problem {
  const Case& file;
  std::vector<int32_t> ints, rowptr, column;
  std::vector<R> reals, value, parameters, x, delta, attr, grad_out;
  Plan<R> plan{};
  SparseMatrix<R> matrix{};
  std::vector<R> statistics, packed;
  std::vector<R> node_sums;  // of engines that keep some, or empty

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
  // Numbers of the features' gradient edge by edge, given or gathered, whichever an engine keeps; not null.
  int64_t edge_gradient_size() const {
    return std::max<int64_t>(file["src"].size(), 1) * std::max(plan.in_size, plan.n_gathered);
  }

  ConvArgs<R> arguments() {
    ConvArgs<R> a{};
    a.plan = &plan, a.weights = packed.data(), a.x = x.data(), a.delta = delta.data(), a.attr = attr.data();
    a.src = file["src"].bytes.data(), a.order = file["order"].bytes.data(), a.rowptr = file["rowptr"].bytes.data();
    a.order_by_source = file["order_by_source"].bytes.data(), a.colptr = file["colptr"].bytes.data();
    a.index64 = file["src"].dtype == "int64";
    a.n_src = file["x"].shape[0], a.n_dst = file["rowptr"].size() - 1, a.n_edges = file["src"].size();
    a.grad_out = grad_out.data();
    if (!node_sums.empty()) a.node_sums = node_sums.data();
    return a;
  }
};

template <typename R>
std::vector<double> widened(const std::vector<R>& numbers) {
  return {numbers.begin(), numbers.end()};
}

// An engine brings pack(problem, results), unpack(problem, grad_packed), pairs(problem, tangents of the packed
// weights), gradient_size(problem) and the four passes on a ConvArgs.

template <typename R, typename Engine>
void run_forward(Problem<R>& p, Engine& engine, Results& results) {
  ConvArgs<R> a = p.arguments();
  auto out = unwritten<R>(a.n_dst * p.plan.out_size);
  a.out = out.data();
  engine.forward(p, a);
  results["out"] = widened(out);
}

// ⟨∂L/∂p, v⟩ for each of the file's directions v of the parameters p.
template <typename R, typename Engine>
std::vector<double> slopes(Problem<R>& p, Engine& engine, const std::vector<R>& grad_packed) {
  const std::vector<R> grad = engine.unpack(p, grad_packed);
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

template <typename R, typename Engine>
void run_backward(Problem<R>& p, Engine& engine, const Needs& needs, Results& results) {
  ConvArgs<R> a = p.arguments();
  auto grad_edge = unwritten<R>(needs.x ? p.edge_gradient_size() : 0);
  auto grad_x = unwritten<R>(needs.x ? p.x.size() : 0), grad_delta = unwritten<R>(needs.delta ? p.delta.size() : 0);
  auto grad_attr = unwritten<R>(needs.attr ? p.attr.size() : 0);
  auto grad_weights = unwritten<R>(needs.weights ? engine.gradient_size(p) : 0);
  const auto place = [](std::vector<R>& v) { return v.empty() ? nullptr : v.data(); };
  a.grad_edge = place(grad_edge), a.grad_x = place(grad_x), a.grad_delta = place(grad_delta);
  a.grad_attr = place(grad_attr), a.grad_weights = place(grad_weights);
  engine.backward(p, a);
  const std::string suffix = needs.suffix;
  if (needs.x) results["grad_x" + suffix] = widened(grad_x);
  if (needs.delta) results["grad_delta" + suffix] = widened(grad_delta);
  if (needs.attr) results["grad_attr" + suffix] = widened(grad_attr);
  if (needs.weights) results["slope" + suffix] = slopes(p, engine, grad_weights);
}

// Derivatives of what run_forward and run_backward give, along the file's direction.
template <typename R, typename Engine>
class Second {
 public:
  Second(Problem<R>& p, Engine& engine) : p_(p), engine_(engine) {
    const auto direction = numbers<R>(p.file["direction"]);  // [n_directions, n_parameters]
    std::vector<R> of_parameters(p.parameters.size()), of_packed(p.plan.n_weights);
    for (size_t k = 0; k < direction.size(); ++k) of_parameters[k % of_parameters.size()] += direction[k];
    p.matrix.multiply(of_parameters.data(), of_packed.data());  // packing is linear at given statistics
    for (int n = 0; n < p.n_norms(); ++n)
      pack_affine(p.plan, n, of_parameters.data(), p.statistics.data(), of_packed.data());
    pairs_ = engine.pairs(p, of_packed);
    x_ = numbers<R>(p.file["tangent_x"]), delta_ = numbers<R>(p.file["tangent_delta"]);
    attr_ = numbers<R>(p.file["tangent_attr"]);
  }

  void forward(Results& results) {
    ConvArgs<R> a = arguments();
    auto out = unwritten<R>(a.n_dst * p_.plan.out_size);
    a.out = out.data();
    engine_.forward_tangent(p_, a);
    results["out_t"] = widened(out);
  }

  void backward(Results& results) {
    ConvArgs<R> a = arguments();
    auto grad_edge = unwritten<R>(p_.edge_gradient_size()), grad_x = unwritten<R>(p_.x.size());
    auto grad_delta = unwritten<R>(p_.delta.size()), grad_attr = unwritten<R>(p_.attr.size());
    auto grad_weights = unwritten<R>(engine_.gradient_size(p_));
    a.grad_edge = grad_edge.data(), a.grad_x = grad_x.data(), a.grad_delta = grad_delta.data();
    a.grad_attr = grad_attr.data(), a.grad_weights = grad_weights.data();
    engine_.backward_tangent(p_, a);
    results["slope_t"] = slopes(p_, engine_, grad_weights);
    results["grad_x_t"] = widened(grad_x), results["grad_delta_t"] = widened(grad_delta);
    results["grad_attr_t"] = widened(grad_attr);
  }

 private:
  Problem<R>& p_;
  Engine& engine_;
  std::vector<R> pairs_, x_, delta_, attr_;

  ConvArgs<R> arguments() {
    ConvArgs<R> a = p_.arguments();
    a.weights = pairs_.data(), a.x_tangent = x_.data(), a.delta_tangent = delta_.data();
    a.attr_tangent = attr_.data();
    return a;
  }
};

template <typename R, typename Engine>
Results run_all(const Case& file, Engine& engine) {
  Problem<R> p(file);
  Results results;
  engine.pack(p, results);
  run_forward(p, engine, results);
  for (const Needs& needs : {Needs{true, true, true, true, ""}, Needs{true, false, false, false, "/alone"},
                             Needs{false, true, false, false, "/alone"}, Needs{false, false, true, false, "/alone"},
                             Needs{false, false, false, true, "/alone"}})
    run_backward(p, engine, needs, results);
  Second<R, Engine> second(p, engine);
  second.forward(results), second.backward(results);
  return results;
}

// ‖actual − expected‖ / ‖expected‖; where nothing is expected but zeros, ‖actual‖; with NaN infinite, so that the
// largest of several deviations shows it.
double deviation(const std::vector<double>& actual, const std::vector<double>& expected) {
  if (actual.size() != expected.size()) return std::numeric_limits<double>::infinity();
  double difference = 0, scale = 0;
  for (size_t k = 0; k < actual.size(); ++k) {
    difference += (actual[k] - expected[k]) * (actual[k] - expected[k]);
    scale += expected[k] * expected[k];
  }
  const double found = std::sqrt(difference / (scale > 0 ? scale : 1));
  return std::isnan(found) ? std::numeric_limits<double>::infinity() : found;
}

bool same_bits(const Results& a, const Results& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    const std::vector<double>&first = x.second, &second = y.second;
    if (first.size() != second.size()) return false;
    return first.empty() || std::memcmp(first.data(), second.data(), first.size() * sizeof(double)) == 0;
  });
}

// Allowed deviations of second derivatives; where edges are near the origin the softened radius costs digits.
template <typename R>
double second_bound(bool near) {
  if (sizeof(R) == 4) return near ? 2e-2 : 1e-4;
  return near ? 1e-6 : 1e-12;
}

// The largest deviations of one run, of first and of second derivatives.
struct Largest {
  double first = 0, second = 0;
  std::string first_where, second_where;
};

// The results beyond the bounds, as messages.
template <typename R>
std::vector<std::string> failures_of(const std::string& what, const Case& file, const Results& results, double bound,
                                     double second_bound, Largest& largest) {
  std::vector<std::string> failures;
  for (const auto& [tensor, actual] : results) {
    const double error = deviation(actual, numbers<double>(file[tensor.substr(0, tensor.find('/'))]));
    const bool second = tensor.size() > 2 && tensor.substr(tensor.size() - 2) == "_t";
    if (!(error <= (second ? second_bound : bound)))
      failures.push_back(what + ": " + tensor + " deviates by " + std::to_string(error));
    double& worst = second ? largest.second : largest.first;
    if (error > worst) worst = error, (second ? largest.second_where : largest.first_where) = tensor;
  }
  return failures;
}

}  // namespace native_test
