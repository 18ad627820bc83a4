// The fixed partition of a call's work into blocks, which threads take one after the other. It follows from sizes
// alone, never from the number of threads, and what blocks leave to be added up is added in their order: any number of
// threads gives the same bits. No torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "conv.h"

namespace implicit_steer {

constexpr int kMostBlocks = 64;

// Into how many blocks `work` edges and nodes are divided, each of which leaves `sums` numbers to be added up. A power
// of two: two, four or eight threads share the blocks evenly. What blocks cost grows with their number n, what threads
// wait for the last one falls with it, so that the best n grows as the root of the work. With many sums a block costs
// more, but, the layer being wide, an edge does too: by the root of their number.
inline int block_count(int64_t work, int64_t sums) {
  const double least = std::max(128.0, 2.5 * std::sqrt(static_cast<double>(sums)));
  int n = 1;
  while (n < kMostBlocks && 4 * n * n * least <= static_cast<double>(work)) n *= 2;
  return n;
}

// Of a forward pass over nodes; of a backward pass over nodes, or over points, which leaves gradients of the weights.
template <typename R>
int forward_blocks(const ConvArgs<R>& a) {
  return block_count(a.n_edges + a.n_dst, 0);
}
template <typename R>
int backward_blocks(const ConvArgs<R>& a) {
  return block_count(a.n_edges + a.n_dst, a.plan->n_grad);
}

// Of the edges over which a batch norm's input is averaged.
template <typename R>
int statistics_blocks(const ConvArgs<R>& a) {
  return block_count(a.n_edges, 2 * norm_input_size(*a.plan));
}

// Of the edges that are counted for a table.
template <typename R>
int table_blocks(const ConvArgs<R>& a) {
  return block_count(a.n_edges, table_sums_size(*a.plan));
}

// The first of n things in block b, where every block has as many.
inline int64_t first_of_block(int64_t n, int b, int blocks) { return n * b / blocks; }

// The first node of block b: edges plus nodes are shared out evenly, whole nodes to one block.
template <typename R>
int64_t first_node(const ConvArgs<R>& a, int b, int blocks) {
  const int64_t target = first_of_block(a.n_edges + a.n_dst, b, blocks);
  int64_t low = 0, high = a.n_dst;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.index(a.rowptr, middle) + middle < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace implicit_steer
