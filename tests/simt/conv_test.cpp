// conv_test DIR MODE [CASE ...]: the case files of DIR (or those named) through the emulated CUDA kernels, in float and
// double, on devices of one and of several multiprocessors, against the expected results in the files; the hidden
// features and the moments of batch norms' inputs against the native loops, which the files' other tests hold to them;
// and the sort of edges. MODE: a number, so many schedules; `trace`: one, every access of which is checked;
// `mutations`: every barrier that the cases reach is left out in turn, which has to be noticed; `count`: nothing is
// compared, but what a forward and a backward pass in float execute is printed.

#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>

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
  const int64_t cpu_weights = int64_t{backward_blocks(p.arguments())} * p.plan.n_grad;
  const Results expected = hidden_results(p, tangents, cpu_weights, [&](ConvArgs<R> a, bool backward) {
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

// How far the moments of every batch norm's input are from those of the native loops, by the norm of either half.
// Measured: at most 2.3e-6 (float), 4.9e-15 (double).
template <typename R>
double moments_deviation(const Case& file, Emulated<R>& engine) {
  Problem<R> p(file);
  Results unused;
  engine.pack(p, unused);
  double largest = 0;
  for (int n = 0; n < p.n_norms() && p.arguments().n_edges > 0; ++n) {
    const int size = norm_input_size(p.plan);
    const std::vector<R> actual = engine.moments(p, n, size);
    ConvArgs<R> a = p.arguments();
    a.threads = 1, a.scratch = host_scratch;
    const Sums sums = batch_sums(conv_table<R>(1), a, n);
    std::vector<R> expected(2 * size);
    for (int k = 0; k < size; ++k)
      coordinate_moments(p.plan, size, k, sums.sums.data(), sums.shift.data(), static_cast<double>(a.n_edges),
                         expected.data());
    for (int half : {0, size}) {
      const auto part = [&](const std::vector<R>& v) { return std::vector<double>(&v[half], &v[half] + size); };
      largest = std::max(largest, native_test::deviation(part(actual), part(expected)));
    }
  }
  return largest;
}

template <typename R>
bool same(const std::vector<R>& x, const std::vector<R>& y) {
  return x.size() == y.size() && (x.empty() || !std::memcmp(x.data(), y.data(), x.size() * sizeof(R)));
}

// The number of edges into a node, at least 1.
template <typename R>
R edges_of(Problem<R>& p, int64_t node) {
  const ConvArgs<R> a = p.arguments();
  return static_cast<R>(std::max<int64_t>(a.index(a.rowptr, node + 1) - a.index(a.rowptr, node), 1));
}

// What follows the sums over edges, forward and backward: mean and bias in the kernels that do a whole layer, against
// the same by hand; and backward passes with what forward ones keep of the sums, where they do, against those without.
// Messages; none: all is right.
template <typename R>
std::vector<std::string> run_layer(const Case& file, Emulated<R>& engine) {
  Problem<R> p(file);
  Results unused;
  engine.pack(p, unused);
  const int64_t n = 3, width = p.plan.out_size, nodes = p.file["rowptr"].size() - 1;
  std::vector<R> sums = unwritten<R>(nodes * width), expansion(width * n), bias{1, -2, 3};
  for (size_t k = 0; k < expansion.size(); ++k) expansion[k] = static_cast<R>(k % 5) / 4;
  ConvArgs<R> a = p.arguments();
  a.out = sums.data();
  engine.forward(p, a);
  auto grad_weights = unwritten<R>(p.plan.n_weights), grad_delta = unwritten<R>(p.delta.size());
  const std::vector<R> grad_out = p.grad_out;
  for (bool mean : {false, true}) {
    std::vector<R> actual = unwritten<R>(nodes * width), whole = actual, of_bias(n), sizes(n), scaled = grad_out;
    const MeanAndBias<R> after{expansion.data(), bias.data(), n, mean};
    auto node_sums = engine.node_sums(p), sums_of_whole = node_sums;
    const auto place = [](std::vector<R>& v) { return v.empty() ? nullptr : v.data(); };
    a = p.arguments(), a.out = actual.data(), a.node_sums = place(node_sums);
    engine.forward(p, a, after);
    a.out = whole.data(), a.node_sums = place(sums_of_whole);
    engine.layer_forward(p, a, after);
    if (!same(node_sums, sums_of_whole)) return {"kept sums: other bits"};
    for (int64_t k = 0; k < nodes * width; ++k) {
      const R edges = mean ? edges_of(p, k / width) : R{1}, *row = expansion.data() + k % width * n;
      const R expected = sums[k] / edges + (row[0] - 2 * row[1] + 3 * row[2]);
      for (const R found : {actual[k], whole[k]})
        if (!(std::abs(found - expected) <= 1e-5 * (1 + std::abs(expected))))
          return {"mean and bias: wrong at " + std::to_string(k)};
      scaled[k] /= edges;
      for (int64_t m = 0; m < n; ++m) of_bias[m] += row[m] * grad_out[k], sizes[m] += std::abs(row[m] * grad_out[k]);
    }
    a = p.arguments(), a.grad_weights = grad_weights.data(), a.grad_delta = grad_delta.data();
    p.grad_out = scaled, a.grad_out = p.grad_out.data();
    engine.backward(p, a);
    std::vector<R> expected = engine.unpack(p, grad_weights);
    const auto expected_delta = widened(grad_delta);
    p.grad_out = grad_out, a.grad_out = p.grad_out.data(), a.node_sums = place(node_sums);
    std::vector<R> found = engine.layer_backward(p, a, after);
    const auto deviates = [&](const std::vector<R>& x, const std::vector<R>& y) {
      return !(native_test::deviation(widened(x), widened(y)) <= kBound<R>);
    };
    const std::vector<R> found_bias(found.end() - n, found.end());
    found.resize(found.size() - n);
    if (deviates(found, expected)) return {"gradients of the parameters: wrong"};
    for (int64_t m = 0; m < n; ++m)
      if (!(std::abs(found_bias[m] - of_bias[m]) <= kBound<R> * sizes[m])) return {"gradient of the bias: wrong"};
    if (!(native_test::deviation(widened(grad_delta), expected_delta) <= kBound<R>)) return {"grad_delta: wrong"};
  }
  return {};
}

// Packed weights at statistics as batch norms keep them: the same bits as at the same ones in a row.
template <typename R>
std::vector<std::string> run_pack_running(const Case& file, Emulated<R>& engine) {
  Problem<R> p(file);
  Results unused;
  engine.pack(p, unused);
  const int64_t trivial = p.plan.n_trivial, channels = norm_channels(p.plan);
  std::vector<std::vector<R>> running;
  std::vector<int64_t> columns;
  const R* next = p.statistics.data();
  for (int n = 0; n < p.n_norms(); ++n) {
    const int64_t width = 2 * trivial + 1 + n;
    std::vector<R> means(channels * width, 7);
    for (int64_t k = 0; k < trivial; ++k) columns.push_back(2 * k + 1);
    for (int64_t k = 0; k < channels * trivial; ++k) means[k / trivial * width + columns[k % trivial]] = *next++;
    running.push_back(means), running.emplace_back(next, next + channels);
    next += channels;
  }
  const auto [packed, statistics] = engine.pack_running(p, running, columns);
  if (p.file.has("running") && !same(packed, p.packed)) return {"packed at running statistics: other bits"};
  if (!same(statistics, p.statistics)) return {"statistics from running ones: other bits"};
  return {};
}

// Deviations of one case under one schedule, as messages; none: all is right.
template <typename R>
std::vector<std::string> run_case(const std::string& name, const Case& file, bool trace, int seed, Largest& largest,
                                  Results& results) {
  const bool near = numbers<int64_t>(file["near"])[0];
  const std::string what = name + (sizeof(R) == 4 ? ", float" : ", double");
  std::vector<std::string> failures;
  try {
    Emulated<R> engine(file, seed, trace);
    results = native_test::run_all<R>(file, engine);
    failures = native_test::failures_of<R>(what, file, results, kBound<R>, second_bound<R>(near), largest);
    for (const std::string& failure : run_layer<R>(file, engine)) failures.push_back(what + ": " + failure);
    for (const std::string& failure : run_pack_running<R>(file, engine)) failures.push_back(what + ": " + failure);
    const double of_moments = moments_deviation<R>(file, engine);
    if (!(of_moments <= kBound<R>)) failures.push_back(what + ": moments deviate by " + std::to_string(of_moments));
    for (bool tangents : {false, true}) {
      const double deviation = hidden_deviation<R>(file, engine, tangents);
      if (!(deviation <= (tangents ? second_bound<R>(near) : kBound<R>)))
        failures.push_back(what + ": hidden features deviate by " + std::to_string(deviation));
    }
  } catch (const std::exception& error) {
    failures.push_back(what + ": " + error.what());
  }
  return failures;
}

int print(const std::vector<std::string>& failures) {
  for (const std::string& failure : failures) std::printf("FAILED %s\n", failure.c_str());
  return static_cast<int>(failures.size());
}

// The kernels that give the derivatives of a backward pass.
template <typename R>
std::map<std::string, simt::Count> launched_for_second(const Case& file) {
  Problem<R> p(file);
  Emulated<R> engine(file, 0, false);
  Results unused;
  engine.pack(p, unused);
  native_test::Second<R, Emulated<R>> second(p, engine);
  simt::take_counts();
  second.backward(unused);
  return simt::take_counts();
}

// Whether the kernels ran that a case of this name is for, and those that kernel_kind says; `launched`: of all passes.
template <typename R>
std::vector<std::string> wrong_kernels(const std::string& name, const Case& file,
                                       const std::map<std::string, simt::Count>& launched) {
  const auto starts_with = [&](const char* what) { return name.rfind(what, 0) == 0; };
  const bool edges = file["src"].size() > 0, single = sizeof(R) == 4;
  const bool exact = starts_with("cloud") || starts_with("zonal-specialised") || name == "depthwise-exact";
  const bool grid = starts_with("grid"), tiled = starts_with("tile");
  const auto has_tangents = launched_for_second<R>(file);
  std::vector<std::string> failures;
  const auto expect = [&](const auto& ran, const std::string& kernel, bool expected) {
    if ((ran.count(kernel) > 0) != (expected && edges)) failures.push_back(name + ": " + kernel + " ran, or did not");
  };
  for (const char* pass : {"forward", "backward"})
    expect(launched, std::string("exact_") + pass, exact && single),
        expect(launched, std::string("grid_") + pass, grid && single);
  const bool channels = name.find("channels") != std::string::npos;  // 16, too many for dual numbers
  for (const char* kernel : {"tile_layers", "tile_layers_backward"}) {
    expect(has_tangents, kernel, (exact || tiled) && single && !channels);
    expect(launched, kernel, (tiled || (exact && !channels)) && single);
  }
  for (const Pass pass : {Pass::kForward, Pass::kBackward, Pass::kSecond}) {
    const auto [kind, why_not] = Emulated<R>::kernel_kind(file, pass);
    const bool fused = !std::strcmp(kind, "exact") || !std::strcmp(kind, "grid"), forward = pass == Pass::kForward;
    const std::string of_pass = forward ? "forward" : "backward", of_nodes = forward ? "sums" : "backward";
    const std::string kernel = !std::strcmp(kind, "wide")    ? "wide_" + of_nodes
                               : !std::strcmp(kind, "tiled") ? "tile_" + of_nodes
                               : fused                       ? std::string(kind) + "_" + of_pass
                                                             : "conv_" + of_pass;
    if (edges) expect(pass == Pass::kSecond ? has_tangents : launched, kernel, true);
    const bool wide = !std::strcmp(kind, "wide");
    const bool may_be = tiled && (!single || (channels && pass == Pass::kSecond));
    if (wide != starts_with("wide") && !(wide && may_be)) failures.push_back(name + ": wide, or not");
    if (fused != !*why_not) failures.push_back(name + ": " + kind + " because of '" + why_not + "'");
  }
  return failures;
}

template <typename R>
int check_case(const std::string& name, const Case& file, bool trace, int seeds) {
  int failures = 0;
  Largest largest;
  Results first, results;
  simt::take_counts();
  for (const simt::Device& device : simt::kDevices) {
    if (Emulated<R>::shared_bytes(file) > device.block_bytes) {
      std::printf("%s: too large for %s\n", name.c_str(), device.name);
      continue;
    }
    simt::use_device(device);
    for (int seed = 0; seed < seeds; ++seed) {
      failures += print(run_case<R>(name + " on " + device.name, file, trace, seed, largest, results));
      if (seed == 0) first = results;
      if (!native_test::same_bits(first, results)) failures += print({name + ": two schedules differ"});
    }
  }
  simt::use_device(simt::kDevices[0]);
  const auto launched = simt::take_counts();
  failures += print(wrong_kernels<R>(name, file, launched));
  for (const char* kernel : {"conv_forward", "conv_backward", "conv_statistics", "conv_hidden", "conv_hidden_backward"})
    if (name == "zonal-odd-sizes-train" && launched.at(kernel).blocks < 2)
      failures += print({name + ": one block of " + kernel});
  std::printf("%s, %s: at most %.2g (%s); second derivatives %.2g (%s)\n", name.c_str(),
              sizeof(R) == 4 ? "float" : "double", largest.first, largest.first_where.c_str(), largest.second,
              largest.second_where.c_str());
  return failures;
}

// Keys with equal ones far apart, of one or several bytes.
template <typename Index>
std::vector<std::string> run_sort(int64_t n, int64_t n_keys, bool trace, int seed) {
  std::vector<Index> key(n), order(n, -1), offsets(n_keys + 1, -1);
  uint64_t state = 1;
  for (Index& k : key)
    k = static_cast<Index>((state = state * 6364136223846793005u + 1442695040888963407u) >> 33) % n_keys;
  const CudaLibrary& library = *implicit_steer_cuda_library();
  std::vector<int64_t> memory((3 * n * sizeof(Index) + library.sort_bytes(n)) / 8 + 1);
  simt::reset(seed, trace);
  simt::add_array(key.data(), n * sizeof(Index), "key", false);
  simt::add_array(order.data(), n * sizeof(Index), "order", true);
  simt::add_array(offsets.data(), offsets.size() * sizeof(Index), "offsets", true);
  simt::add_array(memory.data(), memory.size() * 8, "memory", true);
  const std::string what = "sort of " + std::to_string(n) + " keys below " + std::to_string(n_keys);
  const Failure failure =
      library.sort(key.data(), n, n_keys, sizeof(Index) == 8, order.data(), offsets.data(), memory.data(), nullptr);
  if (failure.reason) return {what + ": " + failure.what + ": " + failure.reason};
  std::vector<Index> expected(n), starts(n_keys + 1);
  for (int64_t k = 0; k < n; ++k) expected[k] = static_cast<Index>(k), ++starts[key[k] + 1];
  for (int64_t k = 0; k < n_keys; ++k) starts[k + 1] += starts[k];
  std::stable_sort(expected.begin(), expected.end(), [&](Index a, Index b) { return key[a] < key[b]; });
  if (order != expected || offsets != starts) return {what + ": wrong"};
  return {};
}

std::vector<std::string> run_sorts(bool trace, int seed) {
  std::vector<std::string> failures;
  for (auto [n, n_keys] : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {700, 3}, {5000, 300}, {3000, 70000}}) {
    for (const std::string& failure : run_sort<int32_t>(n, n_keys, trace, seed)) failures.push_back(failure);
    for (const std::string& failure : run_sort<int64_t>(n, n_keys, trace, seed)) failures.push_back(failure);
  }
  return failures;
}

// Of every kernel that ran since the last call a line "kernel symbol edges nodes warps threads shared-bytes", of
// simt::Count, then lines "place count width" of its memory instructions and "array bytes" of what it touches.
void print_counts(Problem<float>& p) {
  for (const auto& [_, count] : simt::take_counts()) {
    std::printf("kernel %s %lld %lld %llu %u %zu\n", count.symbol.c_str(),
                static_cast<long long>(p.arguments().n_edges), static_cast<long long>(p.arguments().n_dst),
                static_cast<unsigned long long>(count.warps), count.threads, count.shared_bytes);
    for (const auto& [place, executed] : count.instructions)
      std::printf("0x%tx %llu %zu\n", place, static_cast<unsigned long long>(executed.n), executed.bytes);
    for (const auto& [array, bytes] : count.touched)
      if (bytes) std::printf("%s %llu\n", array.c_str(), static_cast<unsigned long long>(bytes));
  }
}

// Of a forward pass, of a backward pass, and of the derivatives of either, one after the other.
void count_passes(const Case& file) {
  Problem<float> p(file);
  Emulated<float> engine(file, 0, true);
  Results results;
  engine.pack(p, results);
  p.node_sums = engine.node_sums(p);
  simt::take_counts();
  simt::count_accesses(true);
  native_test::run_forward(p, engine, results);
  print_counts(p);
  native_test::run_backward(p, engine, {true, true, true, true, ""}, results);
  print_counts(p);
  p.node_sums.clear();
  native_test::Second<float, Emulated<float>> second(p, engine);
  simt::take_counts();
  second.forward(results), print_counts(p);
  second.backward(results), print_counts(p);
}

// Every barrier is left out in the runs that reach it, those first that take the least time, until one goes wrong.
int check_mutations(const std::vector<std::pair<std::string, Case>>& cases) {
  Largest unused;
  Results results;
  std::vector<std::function<std::vector<std::string>()>> runs{[] { return run_sorts(true, 1); }};
  for (const auto& named : cases)
    runs.push_back([&] { return run_case<float>(named.first, named.second, true, 1, unused, results); });
  std::map<std::pair<std::string, int>, std::vector<std::pair<double, size_t>>> reaching;  // seconds, number of the run
  simt::take_barriers();
  for (size_t n = 0; n < runs.size(); ++n) {
    const auto start = std::chrono::steady_clock::now();
    if (!runs[n]().empty()) return print({"a run as it is"});
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    for (const auto& barrier : simt::take_barriers()) reaching[barrier].emplace_back(took.count(), n);
  }
  int failures = 0;
  for (auto& [barrier, those] : reaching) {
    simt::skip_barrier(barrier.first, barrier.second);
    std::sort(those.begin(), those.end());
    const bool noticed = std::any_of(those.begin(), those.end(), [&](auto run) { return !runs[run.second]().empty(); });
    std::printf("without the barrier at %s:%d: %s\n", barrier.first.c_str(), barrier.second,
                noticed ? "noticed" : "FAILED, nothing noticed");
    failures += !noticed;
  }
  std::printf("%zu barriers\n", reaching.size());
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argv[2];
  std::vector<std::filesystem::path> paths;
  for (int k = 3; k < argc; ++k) paths.push_back(std::filesystem::path(argv[1]) / (std::string(argv[k]) + ".case"));
  for (const auto& entry : std::filesystem::directory_iterator(argv[1]))
    if (argc == 3 && entry.path().extension() == ".case") paths.push_back(entry.path());
  std::vector<std::pair<std::string, Case>> cases;
  for (const auto& path : paths) cases.emplace_back(path.stem(), Case(path.string()));
  int failures = cases.empty();
  if (mode == "count") {
    for (const auto& named : cases) count_passes(named.second);
    return cases.empty();
  }
  if (mode == "mutations") {
    failures += check_mutations(cases);
  } else {
    const bool trace = mode == "trace";
    const int seeds = trace ? 1 : std::stoi(mode);
    for (int seed = 0; seed < seeds; ++seed) failures += print(run_sorts(trace, seed));
    for (const auto& [name, file] : cases)
      failures += check_case<float>(name, file, trace, seeds) + check_case<double>(name, file, trace, seeds);
  }
  std::printf("%zu cases, %d failures\n", cases.size(), failures);
  return failures > 0;
}
