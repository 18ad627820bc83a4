// Graph code on plain pointers: range check and stable counting sort of edges. No torch, no Python.
//
// Index is int32_t or int64_t. E edges, N nodes, T threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace implicit_steer {

// Below this many edges per thread, waking a second thread costs more than it saves.
constexpr int64_t kEdgesPerThread = 1 << 15;

// Threads worth using on E edges when every thread keeps `bins` counters: the scan of all counters is serial and must
// stay small beside the edges.
inline int sort_threads(int64_t edges, int64_t bins, int max_threads) {
  const int64_t useful = std::min(edges / kEdgesPerThread, edges / std::max<int64_t>(bins, 1));
  return static_cast<int>(std::clamp<int64_t>(useful, 1, max_threads));
}

// First and one-past-last edge of thread t of T.
inline std::pair<int64_t, int64_t> chunk(int64_t edges, int t, int threads) {
  return {edges * t / threads, edges * (t + 1) / threads};
}

// Whether every index[E] lies in 0 .. N-1. Free of branches and comparisons, so that it runs at the speed of memory
// on any instruction set: x and N-1-x both have a clear sign bit exactly when 0 <= x < N.
template <typename Index>
bool in_range(const Index* index, int64_t edges, int64_t nodes, int max_threads) {
  using Bits = std::make_unsigned_t<Index>;
  const int threads = sort_threads(edges, 1, max_threads);
  const int64_t largest = std::numeric_limits<Index>::max();
  const Bits last = static_cast<Bits>(std::min(nodes - 1, largest));
  Bits bits = nodes > 0 || edges == 0 ? 0 : ~Bits{0};
#pragma omp parallel for num_threads(threads) reduction(| : bits) if (threads > 1)
  for (int64_t e = 0; e < edges; ++e) {
    const Bits x = static_cast<Bits>(index[e]);
    bits |= x | (last - x);
  }
  return bits >> (std::numeric_limits<Bits>::digits - 1) == 0;
}

// Counts the keys of edges [begin, end) into cursor[N]. False when a key lies outside 0 .. N-1.
template <typename Index>
bool count_keys(const Index* key, int64_t begin, int64_t end, int64_t nodes, Index* cursor) {
  for (int64_t e = begin; e < end; ++e) {
    const Index k = key[e];
    if (k < 0 || k >= nodes) return false;
    ++cursor[k];
  }
  return true;
}

// Turns the counts cursor[T][N] into each thread's first output position per key, and fills offsets[N+1].
// Keys are the outer loop and threads the inner one: thread t's edges of a key follow those of threads before it,
// which keeps the sort stable and its result the same for every T.
template <typename Index>
void scan_counts(int64_t nodes, int threads, Index* cursor, Index* offsets) {
  Index position = 0;
  for (int64_t k = 0; k < nodes; ++k) {
    offsets[k] = position;
    for (int t = 0; t < threads; ++t) {
      const Index count = cursor[t * nodes + k];
      cursor[t * nodes + k] = position;
      position += count;
    }
  }
  offsets[nodes] = position;
}

// Stable counting sort of the edges by key[E] in 0 .. N-1.
//   order[E]     edge numbers, ascending by key, equal keys in their given order
//   offsets[N+1] edges of node k are order[offsets[k] .. offsets[k+1])
// Returns false, with the outputs undefined, when a key is out of range. E must fit into Index.
template <typename Index>
bool sort_by_key(const Index* key, int64_t edges, int64_t nodes, int max_threads, Index* order, Index* offsets) {
  const int threads = sort_threads(edges, nodes, max_threads);
  std::vector<Index> cursor(static_cast<size_t>(threads) * nodes, 0);  // [T, N]
  bool valid = true;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(&& : valid) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const auto [begin, end] = chunk(edges, t, threads);
    valid = count_keys(key, begin, end, nodes, cursor.data() + t * nodes);
  }
  if (!valid) return false;
  scan_counts(nodes, threads, cursor.data(), offsets);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const auto [begin, end] = chunk(edges, t, threads);
    Index* next = cursor.data() + t * nodes;  // [N]
    for (int64_t e = begin; e < end; ++e) order[next[key[e]]++] = static_cast<Index>(e);
  }
  return true;
}

}  // namespace implicit_steer
