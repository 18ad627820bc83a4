// What all bindings share: checks of tensors, their memory, the instruction set asked for, and the parts that the
// operators' argument lists have in common.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../cpu/instruction_set.h"
#include "../plan.h"

// Parts of schemas, in the order in which ops/native/operators.py names them.
#define IST_PLAN "Tensor plan_ints, Tensor plan_reals"
#define IST_PACKING "Tensor pack_rowptr, Tensor pack_column, Tensor pack_value"
#define IST_POINTS "Tensor weights, Tensor delta, Tensor attr"
#define IST_EDGES "Tensor weights, Tensor x, Tensor delta, Tensor attr, Tensor src, Tensor order, Tensor rowptr"
#define IST_GRADIENT "Tensor grad_out, Tensor order_by_source, Tensor colptr"
#define IST_NEEDS "bool need_x, bool need_delta, bool need_attr"

namespace implicit_steer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Number of the set asked for: 0 the widest, 1 baseline, 2 AVX2, 3 AVX-512.
inline int instruction_set(int64_t wanted) {
  const int best = widest_instruction_set();
  STD_TORCH_CHECK(wanted >= 0 && wanted <= best, "isa: expected 0 .. ", best, " on this machine, got ", wanted, ".");
  return wanted == 0 ? best : static_cast<int>(wanted);
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

inline void check(const Tensor& t, const char* name, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), name,
                  ": expected a contiguous tensor of another dtype.");
  STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " numbers, got ", t.numel(), ".");
}

inline void check_size(int64_t found, int64_t given, const char* name) {
  STD_TORCH_CHECK(found == given, name, ": expected ", found, ", got ", given, ".");
}

template <typename R>
constexpr ScalarType real_type = sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double;

// The arrays of the sparse matrix from parameters to packed weights, CPU tensors.
template <typename R>
void check_packing(const PlanView<R>& plan, const Tensor& rowptr, const Tensor& column, const Tensor& value) {
  check(rowptr, "pack_rowptr", ScalarType::Int, int64_t{plan.n_weights} + 1);
  check(column, "pack_column", ScalarType::Int, column.numel());
  check(value, "pack_value", real_type<R>, column.numel());
}

inline int64_t count(const std::vector<Tensor>& tensors) {
  int64_t n = 0;
  for (const Tensor& t : tensors) n += t.numel();
  return n;
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A contiguous tensor on the device of `like`. torch::stable::new_empty looks its operator up by name, at three times
// the cost.
inline Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, int32_t dtype) {
  constexpr int kMost = 4;
  int64_t strides[kMost] = {}, stride = 1;
  STD_TORCH_CHECK(shape.size() <= kMost, "shape: expected at most ", kMost, " dimensions, got ", shape.size(), ".");
  for (size_t k = shape.size(); k-- > 0; stride *= shape[k]) strides[k] = stride;
  int32_t device, index;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides,
                                                         dtype, device, index, &handle));
  return Tensor(handle);
}
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype_of(like));
}

template <typename R>
const R* data(const Tensor& t) {
  return static_cast<const R*>(t.const_data_ptr());
}
template <typename R>
R* mutable_data(Tensor& t) {
  return t.numel() ? static_cast<R*>(t.mutable_data_ptr()) : nullptr;
}

}  // namespace implicit_steer
