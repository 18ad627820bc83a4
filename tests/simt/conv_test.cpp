// conv_test DIR trace|plain SEEDS [CASE ...]: the case files of DIR (or those named) through the emulated CUDA kernels,
// in float and double, under so many schedules, against the expected results in the files; and the hidden features
// against the native loops, which the files' other tests hold to them. With `trace` every access is checked, too.

#include <filesystem>

#include "../../csrc/cpu/entry.h"
#include "emulated.h"

namespace {

using namespace simt_test;
using native_test::Case;
using native_test::Largest;
using native_test::second_bound;

// ‖actual − expected‖ / ‖expected‖ allowed; measured: at most 1.9e-6 (float), 1.1e-14 (double).
template <typename R>
constexpr double kBound = sizeof(R) == 4 ? 1e-5 : 1e-12;

// Of memory that the native loops ask for.
void* host_scratch(int64_t bytes) {
  static std::unique_ptr<void, decltype(&std::free)> memory(nullptr, std::free);
  memory.reset(std::aligned_alloc(64, bytes));
  return memory.get();
}

// Results of the hidden features' passes, by name.
template <typename R, typename Pass>
Results hidden_results(Problem<R>& p, bool tangents, int64_t n_weights, Pass pass) {
  const int64_t size = hidden_size(p.plan);
  ConvArgs<R> a = p.arguments();
  std::vector<R> pairs, delta, attr, grad(a.n_edges * size), out = unwritten<R>(a.n_edges * size);
  for (size_t k = 0; k < grad.size(); ++k) grad[k] = static_cast<R>(0.01) * (static_cast<int>(k * 7 % 19) - 9);
  if (tangents) {
    for (R w : p.packed) pairs.push_back(w), pairs.push_back(w / 3);
    delta = numbers<R>(p.file["tangent_delta"]), attr = numbers<R>(p.file["tangent_attr"]);
    a.weights = pairs.data(), a.delta_tangent = delta.data(), a.attr_tangent = attr.data();
  }
  a.x = nullptr, a.src = a.order = a.rowptr = a.order_by_source = a.colptr = nullptr;
  a.out = out.data(), a.grad_out = nullptr;
  pass(a, false);
  auto grad_delta = unwritten<R>(p.delta.size()), grad_attr = unwritten<R>(p.attr.size());
  auto grad_weights = unwritten<R>(n_weights);
  a.out = nullptr, a.grad_out = grad.data(), a.grad_delta = grad_delta.data();
  a.grad_attr = grad_attr.empty() ? nullptr : grad_attr.data(), a.grad_weights = grad_weights.data();
  pass(a, true);
  grad_weights.resize(p.plan.n_couplings ? p.plan.couplings[0].theta : p.plan.n_grad);
  return {{"out", widened(out)},
          {"grad_delta", widened(grad_delta)},
          {"grad_attr", widened(grad_attr)},
          {"grad_weights", widened(grad_weights)}};
}

// How far the hidden features are from those of the native loops.
template <typename R>
double hidden_deviation(const Case& file, Emulated<R>& engine, bool tangents) {
  Problem<R> p(file);
  Results unused;
  engine.pack(p, unused);
  const int64_t size = hidden_size(p.plan);
  const auto& cuda = table<R>();
  const Results actual = hidden_results(p, tangents, p.plan.n_weights, [&](ConvArgs<R> a, bool backward) {
    const auto forward_pass = tangents ? cuda.hidden_forward_tangent : cuda.hidden_forward;
    const auto backward_pass = tangents ? cuda.hidden_backward_tangent : cuda.hidden_backward;
    engine.run_points(p, a, backward ? backward_pass : forward_pass, size);
  });
  const ConvTable<R>& cpu = conv_table<R>(1);
  const Results expected = hidden_results(p, tangents, p.plan.n_grad, [&](ConvArgs<R> a, bool backward) {
    a.plan = &p.plan, a.threads = 1, a.scratch = host_scratch;
    if (backward)
      tangents ? cpu.hidden_backward_tangent(a) : cpu.hidden_backward(a);
    else
      tangents ? cpu.hidden_forward_tangent(a) : cpu.hidden_forward(a);
  });
  double largest = 0;
  for (const auto& [name, values] : actual)
    largest = std::max(largest, native_test::deviation(values, expected.at(name)));
  return largest;
}

template <typename R>
int check_case(const std::string& name, const Case& file, bool trace, int seeds) {
  const bool near = numbers<int64_t>(file["near"])[0];
  const std::string what = name + (sizeof(R) == 4 ? ", float" : ", double");
  int failures = 0;
  Largest largest;
  Results first;
  double hidden = 0;
  for (int seed = 0; seed < seeds; ++seed) {
    Emulated<R> engine(file, seed, trace);
    const Results results = native_test::run_all<R>(file, engine);
    failures += native_test::count_failures<R>(what, file, results, kBound<R>, second_bound<R>(near), largest);
    if (seed == 0) first = results;
    if (!native_test::same_bits(first, results))
      std::printf("FAILED %s: two schedules differ\n", what.c_str()), ++failures;
    for (bool tangents : {false, true}) {
      const double deviation = hidden_deviation<R>(file, engine, tangents);
      hidden = std::max(hidden, deviation);
      if (!(deviation <= (tangents ? second_bound<R>(near) : kBound<R>)))
        std::printf("FAILED %s: hidden features deviate by %.2g\n", what.c_str(), deviation), ++failures;
    }
  }
  std::printf("%s: at most %.2g (%s); second derivatives %.2g (%s); hidden features %.2g\n", what.c_str(),
              largest.first, largest.first_where.c_str(), largest.second, largest.second_where.c_str(), hidden);
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  const bool trace = std::string(argv[2]) == "trace";
  const int seeds = std::atoi(argv[3]);
  std::vector<std::filesystem::path> files;
  for (int k = 4; k < argc; ++k) files.push_back(std::filesystem::path(argv[1]) / (std::string(argv[k]) + ".case"));
  for (const auto& entry : std::filesystem::directory_iterator(argv[1]))
    if (argc == 4 && entry.path().extension() == ".case") files.push_back(entry.path());
  int failures = 0;
  for (const auto& path : files) {
    const Case file(path.string());
    try {
      failures += check_case<float>(path.stem(), file, trace, seeds);
      failures += check_case<double>(path.stem(), file, trace, seeds);
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", path.stem().c_str(), error.what());
      ++failures;
    }
  }
  std::printf("%zu cases, %d failures\n", files.size(), failures);
  return failures > 0 || files.empty();
}
