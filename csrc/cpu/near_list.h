// Edges near the origin in regular frames: the tile in which they come counts them as absent and puts them into a list,
// which is gone through afterwards, so that no other edge takes the slow way.
#pragma once

#include "../edge_frame.h"
#include "conv.h"

namespace implicit_steer::IST_ISA {

struct NearList {
  const int64_t capacity;  // all edges that are a worker's; 0 in frames that are not regular
  int64_t size = 0;
  int64_t *edge, *node;  // [capacity]

  explicit NearList(int64_t most) : capacity(most) {}

  void place(Arena& arena) { arena.take(edge, capacity), arena.take(node, capacity); }

  // Adds the edges of those lanes l, l0 <= l < l1, that are set in `lanes`; they go into `into`.
  void add(uint32_t lanes, const int64_t* edges, int64_t into, int l0, int l1) {
    for (int l = l0; l < l1; ++l)
      if (lanes >> l & 1) edge[size] = edges[l], node[size++] = into;
  }
};

// Gives memory of the calling thread to what place(arena) takes, all 0, and to the list, which is written before it is
// read: no page of it is touched here.
template <typename R, typename Place>
void allocate(const ConvArgs<R>& a, NearList& near, Place place) {
  Arena count{nullptr};
  place(count);
  const int64_t zeroed = count.used;
  near.place(count);
  Arena arena{static_cast<char*>(a.scratch(count.used))};
  memset(static_cast<void*>(arena.base), 0, zeroed);
  place(arena);
  near.place(arena);
}

}  // namespace implicit_steer::IST_ISA
