// The torch operators of cpu/, through torch's stable ABI: checks, memory, the choice of the instruction set.
// Their callers (backends/cpu.py) have validated shapes and indices; what is checked here keeps memory safe.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <tuple>
#include <vector>

#include "cpu/conv.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace implicit_steer;

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

// The widest set that this build and this machine have, or the one asked for: 0 any, 1 baseline, 2 AVX2, 3 AVX-512.
int instruction_set(int64_t wanted) {
  int best = 1;
#if defined(IST_HAVE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 2;
  if (best == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = 3;
#endif
  STD_TORCH_CHECK(wanted >= 0 && wanted <= best, "isa: expected 0 .. ", best, " on this machine, got ", wanted, ".");
  return wanted == 0 ? best : static_cast<int>(wanted);
}

template <typename R>
const ConvTable<R>& table(int64_t wanted) {
  [[maybe_unused]] const int isa = instruction_set(wanted);
  constexpr bool single = sizeof(R) == 4;
#if defined(IST_HAVE_X86)
  if constexpr (single) {
    if (isa == 3) return avx512::kConvFloat;
    if (isa == 2) return avx2::kConvFloat;
  } else {
    if (isa == 3) return avx512::kConvDouble;
    if (isa == 2) return avx2::kConvDouble;
  }
#endif
  if constexpr (single)
    return baseline::kConvFloat;
  else
    return baseline::kConvDouble;
}

// Calls f with a null pointer of the tensor's floating type.
template <typename F>
void dispatch_real(const Tensor& t, const char* name, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    default:
      STD_TORCH_CHECK(false, name, ": expected a float32 or float64 tensor, got another dtype.");
  }
}

void check(const Tensor& t, const char* name, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), name,
                  ": expected a contiguous tensor of another dtype.");
  STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " numbers, got ", t.numel(), ".");
}

template <typename R>
const R* data(const Tensor& t) {
  return static_cast<const R*>(t.const_data_ptr());
}
template <typename R>
R* mutable_data(Tensor& t) {
  return t.numel() ? static_cast<R*>(t.mutable_data_ptr()) : nullptr;
}

template <typename R>
void read_plan(PlanView<R>& plan, const Tensor& ints, const Tensor& reals, const Tensor& weights) {
  STD_TORCH_CHECK(ints.scalar_type() == ScalarType::Int && ints.is_contiguous(), "plan_ints: expected int32.");
  check(reals, "plan_reals", weights.scalar_type(), reals.numel());
  const bool valid = plan_view(plan, data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel());
  STD_TORCH_CHECK(valid, "plan_ints, plan_reals: not what backends/cpu.py writes.");
  check(weights, "weights", weights.scalar_type(), plan.n_weights);
}

// The part of the arguments that forward and backward share.
template <typename R>
ConvArgs<R> graph_arguments(PlanView<R>& plan, const Tensor& weights, const Tensor& x, const Tensor& delta,
                            const Tensor& attr, const Tensor& src, const Tensor& order, const Tensor& rowptr) {
  ConvArgs<R> a{};
  const ScalarType real = weights.scalar_type(), index = src.scalar_type();
  a.n_edges = src.numel(), a.n_src = x.size(0), a.n_dst = rowptr.numel() - 1;
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
                    const Tensor& rowptr, int64_t isa) {
  Tensor out;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    PlanView<R> plan{};
    read_plan(plan, ints, reals, weights);
    ConvArgs<R> a = graph_arguments(plan, weights, x, delta, attr, src, order, rowptr);
    out = torch::stable::new_empty(x, {a.n_dst, plan.out_size});
    a.out = mutable_data<R>(out);
    table<R>(isa).forward(a);
  });
  return out;
}

// -> gradients of x, delta, attr, and per thread of weights, their sum first; those not needed are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& ints, const Tensor& reals, const Tensor& weights,
                                                         const Tensor& x, const Tensor& delta, const Tensor& attr,
                                                         const Tensor& src, const Tensor& order, const Tensor& rowptr,
                                                         const Tensor& grad_out, const Tensor& order_by_source,
                                                         const Tensor& colptr, bool need_x, bool need_delta,
                                                         bool need_attr, bool need_weights, int64_t isa) {
  Tensor grad_x, grad_delta, grad_attr, grad_weights;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    PlanView<R> plan{};
    read_plan(plan, ints, reals, weights);
    ConvArgs<R> a = graph_arguments(plan, weights, x, delta, attr, src, order, rowptr);
    check(grad_out, "grad_out", weights.scalar_type(), a.n_dst * plan.out_size);
    a.grad_out = data<R>(grad_out);
    grad_x = torch::stable::new_empty(x, {need_x ? a.n_src : 0, plan.in_size});
    grad_delta = torch::stable::new_empty(x, {need_delta ? a.n_edges : 0, plan.dim});
    grad_attr = torch::stable::new_empty(x, {need_attr ? a.n_edges : 0, plan.n_attr});
    grad_weights = torch::stable::new_empty(x, {need_weights ? a.threads : 0, plan.n_weights});
    a.grad_delta = mutable_data<R>(grad_delta), a.grad_attr = mutable_data<R>(grad_attr);
    a.grad_weights = mutable_data<R>(grad_weights), a.grad_x = mutable_data<R>(grad_x);
    Tensor grad_edge = torch::stable::new_empty(x, {need_x ? std::max<int64_t>(a.n_edges, 1) : 0, plan.in_size});
    if (need_x) {
      check(order_by_source, "order_by_source", src.scalar_type(), a.n_edges);
      check(colptr, "colptr", src.scalar_type(), a.n_src + 1);
      a.order_by_source = order_by_source.const_data_ptr(), a.colptr = colptr.const_data_ptr();
      a.grad_edge = mutable_data<R>(grad_edge);
    }
    table<R>(isa).backward(a);
  });
  return {grad_x, grad_delta, grad_attr, grad_weights};
}

// -> mean and unbiased variance over the edges of every coordinate of the hidden field after activation `layer`,
// (channels * d,) float64 each.
std::tuple<Tensor, Tensor> conv_statistics(const Tensor& ints, const Tensor& reals, const Tensor& weights,
                                           const Tensor& delta, const Tensor& attr, int64_t layer, int64_t isa) {
  Tensor mean, variance;
  dispatch_real(weights, "weights", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    PlanView<R> plan{};
    read_plan(plan, ints, reals, weights);
    ConvArgs<R> a{};
    a.n_edges = delta.size(0);
    STD_TORCH_CHECK(a.n_edges > 0, "delta: expected at least one edge.");
    STD_TORCH_CHECK(layer >= 0 && layer < plan.n_layers, "layer: expected 0 .. ", plan.n_layers - 1, ".");
    check(delta, "delta", weights.scalar_type(), a.n_edges * plan.dim);
    check(attr, "attr", weights.scalar_type(), a.n_edges * plan.n_attr);
    a.plan = &plan, a.weights = data<R>(weights), a.delta = data<R>(delta), a.attr = data<R>(attr);
    a.threads = threads_for(a.n_edges), a.scratch = scratch, a.layer = static_cast<int>(layer);
    const int64_t n = int64_t{plan.layers[layer].out} / plan.c * plan.d;
    std::vector<double> sums(2 * n * a.threads);
    mean = torch::stable::new_empty(delta, {n}, ScalarType::Double);
    variance = torch::stable::new_empty(delta, {n}, ScalarType::Double);
    double *m = mutable_data<double>(mean), *v = mutable_data<double>(variance);
    a.sums = sums.data(), a.shift = m;
    table<R>(isa).statistics(a);
    const double count = static_cast<double>(a.n_edges);
    for (int64_t k = 0; k < n; ++k) {
      const double shifted = sums[k] / count;
      m[k] += shifted;
      v[k] = std::max(sums[n + k] - shifted * sums[k], 0.0) / (count - 1);
    }
  });
  return {mean, variance};
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
      "Tensor src, Tensor order, Tensor rowptr, int isa) -> Tensor");
  m.def(
      "conv_backward(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor x, Tensor delta, Tensor attr, "
      "Tensor src, Tensor order, Tensor rowptr, Tensor grad_out, Tensor order_by_source, Tensor colptr, "
      "bool need_x, bool need_delta, bool need_attr, bool need_weights, int isa) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_statistics(Tensor plan_ints, Tensor plan_reals, Tensor weights, Tensor delta, Tensor attr, int layer, "
      "int isa) -> (Tensor, Tensor)");
  m.def("lane_function(Tensor x, int which, int isa) -> Tensor");
  m.def("fma_peak(int isa) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("lane_function", TORCH_BOX(&lane_function));
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CompositeExplicitAutograd, m) { m.impl("fma_peak", TORCH_BOX(&fma_peak)); }
