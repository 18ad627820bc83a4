// CUDA tensors as conv_call.h asks for a device. The library of the CUDA kernels, libimplicit_steer_cuda.so beside this
// one, which the first call opens, or the one that IMPLICIT_STEER_CUDA_LIBRARY names: kernels that run on the processor
// take CPU tensors in place of CUDA tensors. A call's device and stream; and what stays on a device: the arrays of a
// plan and of its packing matrix are CPU tensors, their copies are made at the first call and kept for good, with the
// tensors: one of each plan that was made, device and kind of number.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cuda/library.h"
#include "arguments.h"

namespace implicit_steer {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kLibrary = "libimplicit_steer_cuda.so";

inline const CudaLibrary& open_library() {
  Dl_info here;
  STD_TORCH_CHECK(dladdr(reinterpret_cast<const void*>(&open_library), &here) != 0, "cuda: where is this library?");
  std::string path(here.dli_fname);
  const char* const other = std::getenv("IMPLICIT_STEER_CUDA_LIBRARY");
  path = other ? other : path.substr(0, path.rfind('/') + 1) + kLibrary;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(handle, "backend 'cuda': its kernels could not be loaded: ", dlerror(),
                  ". Reinstall implicit_steer where nvcc is found, with IMPLICIT_STEER_CUDA=require.");
  using Entry = const CudaLibrary* (*)();
  return *reinterpret_cast<Entry>(dlsym(handle, "implicit_steer_cuda_library"))();
}

inline const CudaLibrary& library() {
  static const CudaLibrary& opened = open_library();
  return opened;
}

template <typename R>
const CudaTable<R>& kernels() {
  if constexpr (std::is_same_v<R, float>)
    return *library().f32;
  else
    return *library().f64;
}

inline void check(const Failure& failure) {
  STD_TORCH_CHECK(!failure.reason, "CUDA kernel ", failure.what, ": ", failure.reason, ".");
}

// torch's current stream. Before torch 2.13 the stable ABI has no name for it; the C function below is as stable, but
// in a library that a torch with CUDA has loaded already.
inline void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* handle = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return handle ? reinterpret_cast<Get>(dlsym(handle, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get && get(device, &stream) == 0, "backend 'cuda': this torch, built without CUDA, has no stream.");
  return stream;
}

// The device of a call's tensors, current until the end of the call, and its memory. CPU tensors have no device to
// choose and no stream.
class Context {
 public:
  explicit Context(const Tensor& like)
      : on_gpu(like.is_cuda()), device(like.get_device_index()), like_(like), before_(current_) {
    if (on_gpu) guard_.emplace(device), stream = current_stream(device);
    current_ = this;
  }
  ~Context() { current_ = before_; }
  Context(const Context&) = delete;

  const bool on_gpu;
  const int32_t device;
  void* stream = nullptr;

  Tensor bytes(int64_t n) const {
    return new_empty(like_, torch::headeronly::IntHeaderOnlyArrayRef(&n, 1), aoti_torch_dtype_uint8());
  }
  // As ConvArgs.scratch: memory that is given back after the call's last launch, behind it in the stream.
  static void* scratch(int64_t n) {
    current_->scratch_.push_back(current_->bytes(n));
    return current_->scratch_.back().mutable_data_ptr();
  }
  // As ConvArgs.multiply: torch's products, in whatever precision it has for matrices.
  template <typename R>
  static void multiply(const MatrixProducts<R>& m) {
    const Tensor a = current_->matrices(m.a, m.batch, m.rows, m.inner, m.a_transposed),
                 b = current_->matrices(m.b, m.batch, m.inner, m.columns, m.b_transposed),
                 out = current_->matrices(m.out, m.batch, m.rows, m.columns, false);
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // the result, `out` once more
  }

 private:
  // The matrices whose numbers lie there row by row, or those of their transposes.
  template <typename R>
  Tensor matrices(const R* numbers, int64_t batch, int64_t rows, int64_t columns, bool transposed) const {
    const std::array<int64_t, 3> sizes{batch, rows, columns},
        strides{rows * columns, transposed ? 1 : columns, transposed ? rows : 1};
    return torch::stable::from_blob(const_cast<R*>(numbers), {sizes.data(), sizes.size()},
                                    {strides.data(), strides.size()}, like_.device(), real_type<R>);
  }
  std::optional<DeviceGuard> guard_;
  const Tensor& like_;
  Context* const before_;
  std::vector<Tensor> scratch_;
  static inline thread_local Context* current_ = nullptr;
};

// ---- what stays on the device

template <typename R>
struct HeldPlan {
  Tensor ints, reals, memory;
  std::unique_ptr<DevicePlan<R>, void (*)(DevicePlan<R>*)> plan;
};

// The plan on the context's device.
template <typename R>
const DevicePlan<R>& device_plan(const Context& context, const Tensor& ints, const Tensor& reals) {
  static auto* const held =
      new std::map<std::pair<const void*, int32_t>, HeldPlan<R>>;  // never freed: CUDA may be gone
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(reals.const_data_ptr(), context.device);
  if (const auto found = held->find(key); found != held->end()) return *found->second.plan;
  check(ints, "plan_ints", ScalarType::Int, ints.numel());
  check(reals, "plan_reals", real_type<R>, reals.numel());
  const auto numbers = std::make_tuple(data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel());
  const int64_t bytes = std::apply(kernels<R>().plan_bytes, numbers);
  STD_TORCH_CHECK(bytes >= 0, "plan_ints, plan_reals: not what ops/native/arrays.py writes.");
  Tensor memory = context.bytes(bytes);
  DevicePlan<R>* plan = nullptr;
  check(kernels<R>().plan_create(data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel(),
                                 memory.mutable_data_ptr(), context.stream, &plan));
  const auto [place, made] = held->emplace(key, HeldPlan<R>{ints, reals, memory, {plan, kernels<R>().plan_destroy}});
  return *place->second.plan;
}

// A vector's copy on the context's device.
template <typename T>
Tensor to_device(const Context& context, const T* numbers, int64_t n) {
  Tensor copy = context.bytes(std::max<int64_t>(n, 1) * sizeof(T));
  check(library().copy(copy.mutable_data_ptr(), numbers, n * sizeof(T), context.stream));
  return copy;
}

template <typename R>
struct HeldMatrix {
  Tensor value;  // the key's memory
  std::array<Tensor, 6> arrays;
  SparseMatrix<R> matrix, transposed;
};

// The packing matrix, and the transpose of its first n_grad rows.
template <typename R>
const HeldMatrix<R>& device_matrix(const Context& context, const PlanView<R>& plan, const Tensor& rowptr,
                                   const Tensor& column, const Tensor& value) {
  static auto* const held = new std::map<std::pair<const void*, int32_t>, HeldMatrix<R>>;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(value.const_data_ptr(), context.device);
  if (const auto found = held->find(key); found != held->end()) return found->second;
  check_packing<R>(plan, rowptr, column, value);
  const SparseMatrix<R> host{plan.n_weights, data<int32_t>(rowptr), data<int32_t>(column), data<R>(value)};
  const Transposed<R> t(host, plan.n_grad, plan.n_parameters);
  const int64_t n = column.numel(), n_t = t.column.size();
  HeldMatrix<R> made{value,
                     {to_device(context, host.rowptr, plan.n_weights + 1), to_device(context, host.column, n),
                      to_device(context, host.value, n), to_device(context, t.rowptr.data(), plan.n_parameters + 1),
                      to_device(context, t.column.data(), n_t), to_device(context, t.value.data(), n_t)},
                     {},
                     {}};
  check(library().wait(context.stream));  // calls on other streams will read it
  const auto& a = made.arrays;
  made.matrix = {plan.n_weights, data<int32_t>(a[0]), data<int32_t>(a[1]), data<R>(a[2])};
  made.transposed = {plan.n_parameters, data<int32_t>(a[3]), data<int32_t>(a[4]), data<R>(a[5])};
  return held->emplace(key, made).first->second;
}

// Columns of running means, on the context's device.
inline const int64_t* device_columns(const Context& context, const Tensor& columns) {
  static auto* const held = new std::map<std::pair<const void*, int32_t>, std::pair<Tensor, Tensor>>;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(columns.const_data_ptr(), context.device);
  auto found = held->find(key);
  if (found == held->end()) {
    const Tensor there = to_device(context, data<int64_t>(columns), columns.numel());
    check(library().wait(context.stream));  // calls on other streams will read it
    found = held->emplace(key, std::make_pair(columns, there)).first;
  }
  return data<int64_t>(found->second.second);
}

// ---- the device of a call

template <typename R>
class Cuda {
 public:
  using Real = R;

  Cuda(const Tensor& ints, const Tensor& reals, const Tensor& like, int64_t = 0)
      : context_(like), plan_(device_plan<R>(context_, ints, reals)), view_(*kernels<R>().plan_view(&plan_)) {}
  // Of a plan that was looked up before.
  Cuda(const DevicePlan<R>& plan, const Tensor& like)
      : context_(like), plan_(plan), view_(*kernels<R>().plan_view(&plan_)) {}

  const PlanView<R>& plan() const { return view_; }
  const CudaTable<R>& table() const { return kernels<R>(); }
  template <typename Pass>
  void run(Pass pass, const ConvArgs<R>& a) const {
    implicit_steer::check(pass(plan_, a, context_.stream));
  }

  // Also that the tensor is on the call's device.
  void check(const Tensor& t, const char* name, ScalarType type, int64_t numel) const {
    implicit_steer::check(t, name, type, numel);
    const bool there = t.is_cuda() == context_.on_gpu && t.get_device_index() == context_.device;
    STD_TORCH_CHECK(numel == 0 || there, name, ": expected a tensor on the call's device, cuda:", context_.device, ".");
  }
  void prepare(ConvArgs<R>& a) const { a.scratch = Context::scratch, a.multiply = Context::multiply<R>; }
  Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape) const {
    return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()));
  }

  const R* with_tangents(const Tensor& like, const R* weights, const R* tangent) {
    pairs_ = new_empty(like, {2 * int64_t{view_.n_weights}});
    implicit_steer::check(kernels<R>().pair_weights(plan_, weights, tangent, mutable_data<R>(pairs_), context_.stream));
    return data<R>(pairs_);
  }
  void forward(const ConvArgs<R>& a, const R* expansion, const R* bias, int64_t n, bool mean) const {
    implicit_steer::check(kernels<R>().forward(plan_, a, {expansion, bias, n, mean}, context_.stream));
  }

  int64_t edge_width() const { return view_.in_size; }
  // The kernels sum it themselves, in place.
  Tensor weight_gradient(const ConvArgs<R>&, const Tensor& like, bool wanted) const {
    return new_empty(like, {wanted ? view_.n_weights : 0});
  }
  Tensor summed_weight_gradient(const Tensor& summed) const { return summed; }

  // ---- packing

  // Where the parameters are; where there are more of them than the kernels' table holds, they are copied together.
  Pieces<const R> gathered(const std::vector<Tensor>& parameters) {
    check_size(view_.n_parameters, count(parameters), "parameters");
    for (const Tensor& t : parameters) check(t, "parameters", real_type<R>, t.numel());
    Pieces<const R> found{};
    if (parameters.size() <= Pieces<const R>::kMost) {
      for (const Tensor& t : parameters) found.add(data<R>(t), t.numel());
      return found;
    }
    parameters_ = context_.bytes(std::max<int64_t>(view_.n_parameters, 1) * sizeof(R));
    char* next = static_cast<char*>(parameters_.mutable_data_ptr());
    for (const Tensor& t : parameters) {
      implicit_steer::check(library().copy(next, t.const_data_ptr(), t.numel() * sizeof(R), context_.stream));
      next += t.numel() * sizeof(R);
    }
    found.add(data<R>(parameters_), view_.n_parameters);
    return found;
  }
  const HeldMatrix<R>& matrix(const Tensor& rowptr, const Tensor& column, const Tensor& value) const {
    return device_matrix(context_, view_, rowptr, column, value);
  }
  void pack(const HeldMatrix<R>& held, const Pieces<const R>& parameters, const R* statistics, R* packed) const {
    const NormStatistics<R> norms{statistics, nullptr, {}};
    implicit_steer::check(kernels<R>().pack(plan_, held.matrix, parameters, norms, packed, nullptr, context_.stream));
  }
  void pack_backward(const HeldMatrix<R>& held, const R* statistics, const R* grad_packed, R* grad) const {
    Pieces<R> pieces{};
    pieces.add(grad, view_.n_parameters);
    implicit_steer::check(
        kernels<R>().pack_backward(plan_, held.transposed, statistics, grad_packed, pieces, context_.stream));
  }
  void layer_forward(const ConvArgs<R>& a, const MeanAndBias<R>& after, const HeldMatrix<R>& held,
                     const Pieces<const R>& parameters, const NormStatistics<R>& norms, R* packed,
                     R* statistics) const {
    implicit_steer::check(kernels<R>().layer_forward(plan_, a, after, held.matrix, parameters, norms, packed,
                                                     statistics, context_.stream));
  }
  void layer_backward(const ConvArgs<R>& a, const MeanAndBias<R>& after, const HeldMatrix<R>& held, const R* statistics,
                      const Pieces<R>& grad_parameters, R* grad_bias) const {
    implicit_steer::check(kernels<R>().layer_backward(plan_, a, after, held.transposed, statistics, grad_parameters,
                                                      grad_bias, context_.stream));
  }

  int64_t node_sums_size(const ConvArgs<R>& a) const { return kernels<R>().node_sums_size(plan_, a); }

  // ---- statistics of batch norms

  // `out` is overwritten norm by norm; until then finite numbers stand where the packing reads them.
  void statistics(const ConvArgs<R>& a, const HeldMatrix<R>& held, const Pieces<const R>& parameters, R* packed,
                  R* out) const {
    pack(held, parameters, out, packed);
    implicit_steer::check(kernels<R>().statistics(plan_, a, parameters, packed, out, context_.stream));
  }
  void moments(const ConvArgs<R>& a, int64_t, R* out) const {
    implicit_steer::check(kernels<R>().moments(plan_, a, out, context_.stream));
  }

 private:
  const Context context_;
  const DevicePlan<R>& plan_;
  const PlanView<R>& view_;
  Tensor pairs_, parameters_;
};

}  // namespace implicit_steer
