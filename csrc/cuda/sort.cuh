// Stable sort of edges by an integer key, one byte of the key after the other: per block a histogram, one scan over all
// of them, and a scatter in which every edge knows how many equal bytes stand before it. The same bits at every run.
#pragma once

#include <cstdint>

#include "compat.cuh"

namespace implicit_steer::IST_ISA {

constexpr int kDigits = 256;   // values of a byte, and threads of a block
constexpr int kSortTiles = 8;  // edges per thread of a block
constexpr int kSortWarps = kDigits / 32;

template <typename Index>
__device__ __forceinline__ int digit_of(Index key, int shift) {
  return static_cast<int>(key >> shift) & (kDigits - 1);
}

// counts[digit, block]: how many keys of the block have the digit
template <typename Index>
__global__ void __launch_bounds__(kDigits) count_digits(const Index* key, int64_t n, int shift, int32_t* counts) {
  __shared__ int32_t count[kDigits];
  count[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kDigits * kSortTiles;
  for (int tile = 0; tile < kSortTiles; ++tile) {
    const int64_t at = begin + tile * kDigits + threadIdx.x;
    if (at < n) atomicAdd(&count[digit_of(key[at], shift)], 1);  // of integers: the order does not matter
  }
  __syncthreads();
  counts[int64_t{threadIdx.x} * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

// counts -> for every digit and block the number of keys before its first one. One block, a thread for each digit.
static __global__ void __launch_bounds__(kDigits) scan_digits(int32_t* counts, int64_t blocks) {
  __shared__ int64_t total[kDigits];
  int32_t* const row = counts + threadIdx.x * blocks;
  int64_t sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += row[b];
  total[threadIdx.x] = sum;
  __syncthreads();
  int64_t position = 0;
  for (int digit = 0; digit < static_cast<int>(threadIdx.x); ++digit) position += total[digit];
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t n = row[b];
    row[b] = static_cast<int32_t>(position);
    position += n;
  }
}

// The lanes of the warp, of those in `inside`, whose digit is that of this lane.
__device__ __forceinline__ unsigned equal_lanes(int digit, unsigned inside) {
  unsigned equal = inside;
  for (int bit = 1; bit < kDigits; bit *= 2) {
    const unsigned set = __ballot_sync(0xffffffffu, digit & bit);
    equal &= digit & bit ? set : ~set;
  }
  return equal;
}

// Moves keys and edge numbers (order; null: 0, 1, 2, …) to their places in next_key and next_order.
template <typename Index>
__global__ void __launch_bounds__(kDigits)
    scatter_digits(const Index* key, const Index* order, int64_t n, int shift, const int32_t* positions,
                   Index* next_key, Index* next_order) {
  __shared__ int32_t next[kDigits];                 // place of the digit's next key
  __shared__ int32_t of_warp[kSortWarps][kDigits];  // keys of the tile by warp
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  next[thread] = positions[int64_t{thread} * gridDim.x + blockIdx.x];
  for (int tile = 0; tile < kSortTiles; ++tile) {
    const int64_t at = (int64_t{blockIdx.x} * kSortTiles + tile) * kDigits + thread;
    for (int w = 0; w < kSortWarps; ++w) of_warp[w][thread] = 0;
    __syncthreads();
    const Index value = at < n ? key[at] : 0;
    const int digit = digit_of(value, shift);
    const unsigned equal = equal_lanes(digit, __ballot_sync(0xffffffffu, at < n));
    const int before = __popc(equal & ((1u << lane) - 1));
    if (at < n && before == 0) of_warp[warp][digit] = __popc(equal);
    __syncthreads();
    if (at < n) {
      int64_t to = next[digit] + before;
      for (int w = 0; w < warp; ++w) to += of_warp[w][digit];
      next_key[to] = value;
      next_order[to] = order ? order[at] : static_cast<Index>(at);
    }
    __syncthreads();
    for (int w = 0; w < kSortWarps; ++w) next[thread] += of_warp[w][thread];
  }
}

// offsets[k]: how many of the sorted keys are smaller than k, 0 <= k <= n_keys; a thread for each k
template <typename Index>
__global__ void __launch_bounds__(kDigits) find_offsets(const Index* key, int64_t n, int64_t n_keys, Index* offsets) {
  const int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (k > n_keys) return;
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (key[middle] < k)
      low = middle + 1;
    else
      high = middle;
  }
  offsets[k] = static_cast<Index>(low);
}

}  // namespace implicit_steer::IST_ISA
