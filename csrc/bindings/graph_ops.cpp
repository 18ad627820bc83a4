// The torch operators of graph.h, through torch's stable ABI: one binary for every torch >= 2.10, no Python.

#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

#include "../graph.h"
#include "arguments.h"

namespace {

using implicit_steer::new_empty;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor in_order(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Calls f with a null pointer of the tensor's index type: the type is all it carries.
template <typename F>
void dispatch_index(const Tensor& index, const char* name, F f) {
  switch (index.scalar_type()) {
    case ScalarType::Int:
      return f(static_cast<int32_t*>(nullptr));
    case ScalarType::Long:
      return f(static_cast<int64_t*>(nullptr));
    default:
      STD_TORCH_CHECK(false, name, ": expected an int32 or int64 tensor, got another dtype.");
  }
}

// edge_index [2, E] -> scalar bool: every source in 0 .. num_src-1 and every target in 0 .. num_dst-1.
Tensor edges_in_range(const Tensor& edge_index, int64_t num_src, int64_t num_dst) {
  STD_TORCH_CHECK(edge_index.dim() == 2 && edge_index.size(0) == 2, "edge_index: expected a tensor of shape (2, E).");
  const Tensor rows = in_order(edge_index);
  const int64_t edges = rows.size(1);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  Tensor result = new_empty(rows, {}, aoti_torch_dtype_bool());
  dispatch_index(rows, "edge_index", [&](auto* tag) {
    using Index = std::remove_pointer_t<decltype(tag)>;
    const auto* row = static_cast<const Index*>(rows.const_data_ptr());
    *static_cast<bool*>(result.mutable_data_ptr()) = implicit_steer::in_range(row, edges, num_src, threads) &&
                                                     implicit_steer::in_range(row + edges, edges, num_dst, threads);
  });
  return result;
}

// key [E] in 0 .. n-1 -> order [E], offsets [n+1], both of key's dtype.
std::tuple<Tensor, Tensor> sort_by_key(const Tensor& key, int64_t n) {
  STD_TORCH_CHECK(key.dim() == 1, "key: expected a tensor of shape (E,), got rank ", key.dim(), ".");
  STD_TORCH_CHECK(n >= 0, "n: expected a count >= 0, got ", n, ".");
  const Tensor keys = in_order(key);
  const int64_t edges = keys.numel();
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  Tensor order = new_empty(keys, {edges});
  Tensor offsets = new_empty(keys, {n + 1});
  dispatch_index(keys, "key", [&](auto* tag) {
    using Index = std::remove_pointer_t<decltype(tag)>;
    STD_TORCH_CHECK(edges <= std::numeric_limits<Index>::max(), "key: more edges than its dtype can number.");
    const bool valid = implicit_steer::sort_by_key(static_cast<const Index*>(keys.const_data_ptr()), edges, n, threads,
                                                   static_cast<Index*>(order.mutable_data_ptr()),
                                                   static_cast<Index*>(offsets.mutable_data_ptr()));
    STD_TORCH_CHECK(valid, "key: expected values from 0 to n - 1 with n = ", n, ", got one outside.");
  });
  return {order, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY(implicit_steer, m) {
  m.def("edges_in_range(Tensor edge_index, SymInt num_src, SymInt num_dst) -> Tensor");
  m.def("sort_by_key(Tensor key, SymInt n) -> (Tensor order, Tensor offsets)");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  m.impl("edges_in_range", TORCH_BOX(&edges_in_range));
  m.impl("sort_by_key", TORCH_BOX(&sort_by_key));
}
