// conv_test DIR [once]: every case file of DIR through csrc/packing.h and the loops of csrc/cpu, in float and double,
// with every instruction set that this machine has, against the expected results in the files: on one thread and on
// several, which have to give the same bits; `once`, as slow sanitizers have it, on three threads. No torch, no Python.

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

#include "../../csrc/cpu/entry.h"
#include "conv_case.h"

namespace {

using namespace implicit_steer;
using native_test::Case;
using native_test::failures_of;
using native_test::Largest;
using native_test::numbers;
using native_test::Problem;
using native_test::Results;
using native_test::run_all;
using native_test::same_bits;
using native_test::second_bound;
using native_test::unwritten;
using native_test::widened;

// ‖actual − expected‖ / ‖expected‖ allowed; measured: at most 1.3e-6 (float), 9.4e-15 (double).
template <typename R>
constexpr double kBound = sizeof(R) == 4 ? 1e-5 : 1e-13;

constexpr const char* kSets[] = {"", "baseline", "avx2", "avx512"};

// As ConvArgs asks; a new block of exactly `bytes` at every call, all bits set (NaN).
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  memory.reset(std::aligned_alloc(64, bytes));
  return std::memset(memory.get(), 0xff, bytes);
}

// One instruction set's loops on so many threads.
template <typename R>
struct Loops {
  const ConvTable<R>& table;
  int threads;

  // The packed weights; in training from statistics of these edges, which are a result.
  void pack(Problem<R>& p, Results& results) {
    p.packed = unwritten<R>(p.plan.n_weights);
    p.matrix.multiply(p.parameters.data(), p.packed.data());
    if (p.file.has("running")) {
      p.statistics = numbers<R>(p.file["running"]);
      for (int n = 0; n < p.n_norms(); ++n)
        pack_affine(p.plan, n, p.parameters.data(), p.statistics.data(), p.packed.data());
      return;
    }
    p.statistics = unwritten<R>(p.n_norms() * statistics_size(p.plan));
    ConvArgs<R> a = prepared(p.arguments());
    batch_statistics(table, a, p.parameters.data(), p.packed.data(), p.statistics.data());
    results["statistics"] = widened(p.statistics);
  }
  std::vector<R> unpack(Problem<R>& p, const std::vector<R>& grad_packed) const {
    std::vector<R> grad(p.parameters.size());
    p.matrix.multiply_transposed(p.plan.n_grad, grad_packed.data(), grad.data());
    for (int n = 0; n < p.n_norms(); ++n)
      pack_affine_backward(p.plan, n, p.statistics.data(), grad_packed.data(), grad.data());
    return grad;
  }
  std::vector<R> pairs(Problem<R>& p, const std::vector<R>& tangents) const {
    std::vector<R> pairs(2 * p.plan.n_weights);
    for (int64_t k = 0; k < p.plan.n_weights; ++k) pairs[2 * k] = p.packed[k], pairs[2 * k + 1] = tangents[k];
    return pairs;
  }
  int64_t gradient_size(Problem<R>& p) const { return backward_blocks(p.arguments()) * int64_t{p.plan.n_grad}; }

  ConvArgs<R> prepared(ConvArgs<R> a) const {
    a.threads = threads, a.scratch = scratch;
    return a;
  }
  void forward(Problem<R>&, const ConvArgs<R>& a) const { table.forward(prepared(a)); }
  void backward(Problem<R>&, const ConvArgs<R>& a) const { table.backward(prepared(a)); }
  void forward_tangent(Problem<R>&, const ConvArgs<R>& a) const { table.forward_tangent(prepared(a)); }
  void backward_tangent(Problem<R>&, const ConvArgs<R>& a) const { table.backward_tangent(prepared(a)); }
};

// Number of failures; prints each, and the largest deviation.
template <typename R>
int check(const std::string& name, const Case& file, int isa, bool once) {
  int failures = 0;
  Largest largest;
  const bool near = numbers<int64_t>(file["near"])[0];
  const std::string what = name + ", " + kSets[isa] + (sizeof(R) == 4 ? ", float" : ", double");
  Results first;
  for (int threads : once ? std::vector{3} : std::vector{1, 1, 2, 5}) {
    Loops<R> loops{conv_table<R>(isa), threads};
    const Results results = run_all<R>(file, loops);
    if (first.empty()) first = results;
    const std::string on = what + ", " + std::to_string(threads) + " threads";
    for (const auto& failure : failures_of<R>(on, file, results, kBound<R>, second_bound<R>(near), largest)) {
      std::printf("FAILED %s\n", failure.c_str());
      ++failures;
    }
    if (!same_bits(results, first)) {
      std::printf("FAILED %s: other bits than in the first run\n", on.c_str());
      ++failures;
    }
  }
  std::printf("%s: at most %.2g (%s); second derivatives %.2g (%s)\n", what.c_str(), largest.first,
              largest.first_where.c_str(), largest.second, largest.second_where.c_str());
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  const bool once = argc > 2 && std::string_view(argv[2]) == "once";
  int failures = 0, cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(argc > 1 ? argv[1] : ".")) {
    if (entry.path().extension() != ".case") continue;
    const Case file(entry.path().string());
    for (int isa = 1; isa <= widest_instruction_set(); ++isa) {
      failures += check<float>(entry.path().stem(), file, isa, once);
      failures += check<double>(entry.path().stem(), file, isa, once);
    }
    ++cases;
  }
  std::printf("%d cases, instruction sets up to %s, %d failures\n", cases, kSets[widest_instruction_set()], failures);
  return failures > 0 || cases == 0;
}
