// The graph code of csrc/graph.h on plain arrays: against std::stable_sort, on one and several threads.

#include "../../csrc/graph.h"

#include <cstdio>
#include <numeric>
#include <random>

namespace {

int failures = 0;

void expect(bool holds, const char* what, int threads) {
  if (holds) return;
  std::printf("FAILED %s, %d threads\n", what, threads);
  ++failures;
}

template <typename Index>
void check(int64_t edges, int64_t nodes, int threads) {
  std::mt19937 generator(0);
  std::vector<Index> key(edges), order(edges), offsets(nodes + 1), expected(edges);
  for (Index& k : key) k = static_cast<Index>(generator() % nodes);
  std::iota(expected.begin(), expected.end(), 0);
  std::stable_sort(expected.begin(), expected.end(), [&](Index a, Index b) { return key[a] < key[b]; });

  const auto sort = [&] {
    return implicit_steer::sort_by_key(key.data(), edges, nodes, threads, order.data(), offsets.data());
  };
  expect(sort(), "sort_by_key is valid", threads);
  expect(order == expected, "order", threads);
  bool right = true;
  for (int64_t k = 0; k <= nodes; ++k) {
    const auto before = std::partition_point(expected.begin(), expected.end(), [&](Index e) { return key[e] < k; });
    right &= offsets[k] == before - expected.begin();
  }
  expect(right, "offsets", threads);

  const auto inside = [&] { return implicit_steer::in_range(key.data(), edges, nodes, threads); };
  expect(inside(), "in_range", threads);
  for (const int64_t wrong : {int64_t{-1}, nodes}) {
    if (edges == 0) continue;
    const Index kept = key[edges / 2];
    key[edges / 2] = static_cast<Index>(wrong);
    expect(!inside() && !sort(), "a key out of range is found", threads);
    key[edges / 2] = kept;
  }
}

}  // namespace

int main() {
  const int64_t many = 4 * implicit_steer::kEdgesPerThread + 1;  // enough for every thread asked for
  for (const int threads : {1, 2, 4}) {
    for (const int64_t edges : {int64_t{0}, int64_t{1}, many}) {
      check<int32_t>(edges, 300, threads);
      check<int64_t>(edges, 300, threads);
    }
  }
  std::printf("graph: %d failures\n", failures);
  return failures > 0;
}
