// The torch operators that CUDA tensors have for themselves: the sort of graph_ops.cpp, and what tells whether a device
// can run the kernels. Those of conv_ops.cpp and layer_ops.cpp are shared with the CPU. No CUDA: the kernels are in a
// library of their own (cuda_device.h).

#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda_device.h"

namespace {

using namespace implicit_steer;

// key [E] in 0 .. n-1 -> order [E], offsets [n+1], both of key's dtype.
std::tuple<Tensor, Tensor> sort_by_key(const Tensor& key, int64_t n) {
  STD_TORCH_CHECK(key.dim() == 1, "key: expected a tensor of shape (E,), got rank ", key.dim(), ".");
  STD_TORCH_CHECK(n >= 0, "n: expected a count >= 0, got ", n, ".");
  const ScalarType index = key.scalar_type();
  STD_TORCH_CHECK(index == ScalarType::Int || index == ScalarType::Long, "key: expected an int32 or int64 tensor.");
  const Tensor keys = torch::stable::contiguous(key);
  const Context context(keys);
  const int64_t edges = keys.numel(), size = index == ScalarType::Long ? 8 : 4;
  STD_TORCH_CHECK(edges <= std::numeric_limits<int32_t>::max(), "key: expected at most 2^31 - 1 edges, got ", edges,
                  ". Split the graph (implicit_steer.layers.blocks).");
  Tensor order = new_empty(keys, {edges}), offsets = new_empty(keys, {n + 1});
  Tensor memory = context.bytes(3 * edges * size + library().sort_bytes(edges) + 1);
  check(library().sort(keys.const_data_ptr(), edges, n, index == ScalarType::Long, order.mutable_data_ptr(),
                       offsets.mutable_data_ptr(), memory.mutable_data_ptr(), context.stream));
  return {order, offsets};
}

// Raises where the device, or its driver, cannot run the kernels.
void cuda_probe(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  check(library().probe());
}

// Bytes of shared memory that a block of one of the plan's kernels cannot do without.
int64_t cuda_shared_bytes(const Tensor& ints, const Tensor& reals) {
  int64_t bytes = -1;
  dispatch_real(reals, "plan_reals", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    bytes = kernels<R>().shared_bytes(data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel());
  });
  STD_TORCH_CHECK(bytes >= 0, "plan_ints, plan_reals: not what ops/native/arrays.py writes.");
  return bytes;
}

// The kind of kernels that serve a pass of the plan, 0, 1 or 2 as in Pass, and, behind a line's end, why it is no
// faster one.
std::string cuda_kernel_kind(const Tensor& ints, const Tensor& reals, int64_t pass_number) {
  STD_TORCH_CHECK(0 <= pass_number && pass_number <= 2, "pass_number: expected 0, 1 or 2, got ", pass_number, ".");
  KernelKind kind{};
  dispatch_real(reals, "plan_reals", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    kind = kernels<R>().kernel_kind(data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel(),
                                    static_cast<Pass>(pass_number));
  });
  STD_TORCH_CHECK(kind.name, "plan_ints, plan_reals: not what ops/native/arrays.py writes.");
  return std::string(kind.name) + "\n" + kind.why_not;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def("cuda_shared_bytes(" IST_PLAN ") -> int");
  m.def("cuda_kernel_kind(" IST_PLAN ", int pass_number) -> str");
  m.def("cuda_probe(int device) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CUDA, m) { m.impl("sort_by_key", TORCH_BOX(&sort_by_key)); }

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CompositeExplicitAutograd, m) {
  m.impl("cuda_shared_bytes", TORCH_BOX(&cuda_shared_bytes));
  m.impl("cuda_kernel_kind", TORCH_BOX(&cuda_kernel_kind));
  m.impl("cuda_probe", TORCH_BOX(&cuda_probe));
}
