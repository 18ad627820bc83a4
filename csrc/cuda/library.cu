// The kernel library's one exported function, and what does not depend on the kind of number.

#include "launch.h"
#include "library.h"
#include "sort.cuh"

namespace implicit_steer {

namespace IST_ISA {
extern const CudaTable<float> kCudaFloat;
extern const CudaTable<double> kCudaDouble;
}  // namespace IST_ISA

namespace {

using namespace IST_ISA;

int64_t sort_blocks(int64_t n) { return (n + kDigits * kSortTiles - 1) / (kDigits * kSortTiles); }
int64_t sort_bytes(int64_t n) { return static_cast<int64_t>(sizeof(int32_t)) * kDigits * sort_blocks(n); }

template <typename Index>
Failure sort(const Index* key, int64_t n, int64_t n_keys, Index* order, Index* offsets, Index* memory, void* stream) {
  Index *const keys = memory, *const other_keys = memory + n;
  // As many passes as the keys have bytes, at least one; the last one ends in `order`.
  int passes = 1;
  while (passes < static_cast<int>(sizeof(Index)) && (n_keys - 1) >> (8 * passes) != 0) ++passes;
  int32_t* const counts = reinterpret_cast<int32_t*>(memory + 3 * n);
  Index *const orders[] = {order, memory + 2 * n}, *const all_keys[] = {keys, other_keys};
  const Index *from = nullptr, *values = key;
  const dim3 grid(static_cast<unsigned>(sort_blocks(n))), block(kDigits);
  for (int pass = 0; pass < passes && n > 0; ++pass) {
    Index *const to = orders[(passes - 1 - pass) % 2], *const next = all_keys[pass % 2];
    IST_TRY(launch("count_digits", count_digits<Index>, grid, block, 0, stream, values, n, 8 * pass, counts));
    IST_TRY(launch("scan_digits", scan_digits, dim3(1), block, 0, stream, counts, static_cast<int64_t>(grid.x)));
    IST_TRY(launch("scatter_digits", scatter_digits<Index>, grid, block, 0, stream, values, from, n, 8 * pass,
                   static_cast<const int32_t*>(counts), next, to));
    values = next, from = to;
  }
  return launch("find_offsets", find_offsets<Index>, dim3(static_cast<unsigned>(n_keys / kDigits + 1)), block, 0,
                stream, values, n, n_keys, offsets);
}

Failure sort_any(const void* key, int64_t n, int64_t n_keys, bool index64, void* order, void* offsets, void* memory,
                 void* stream) {
  if (index64)
    return sort(static_cast<const int64_t*>(key), n, n_keys, static_cast<int64_t*>(order),
                static_cast<int64_t*>(offsets), static_cast<int64_t*>(memory), stream);
  return sort(static_cast<const int32_t*>(key), n, n_keys, static_cast<int32_t*>(order), static_cast<int32_t*>(offsets),
              static_cast<int32_t*>(memory), stream);
}

Failure copy(void* to, const void* from, int64_t bytes, void* stream) {
  return failure("copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

Failure wait(void* stream) { return failure("wait", cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }

Failure probe() {
  cudaFuncAttributes unused;
  return failure("probe", cudaFuncGetAttributes(&unused, scan_digits));
}

constexpr CudaLibrary kLibrary{&kCudaFloat, &kCudaDouble, sort_bytes, sort_any, copy, wait, probe};

}  // namespace

}  // namespace implicit_steer

const implicit_steer::CudaLibrary* implicit_steer_cuda_library() { return &implicit_steer::kLibrary; }
