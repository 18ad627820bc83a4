// One block of a convolution: its walk over nodes and their edges, and the sums T of the products over these.
#pragma once

#include "products.h"

namespace implicit_steer::IST_ISA {

constexpr int kNodes = 8;       // nodes that share loads of θ
constexpr int kMostNodes = 32;  // whose sums T wait until they are mixed, a multiple of kNodes
// Of their products with θ as many at a time as the registers hold: M = kVectors<R> vectors of kTogether<M> nodes.
template <typename R>
constexpr int kVectors = is_dual<R> ? 1 : 2;
template <int M>
constexpr int kTogether = IST_LANE_BYTES == 64 ? kNodes : kNodes / M;
constexpr int64_t kNearestCache = 16 << 10;  // bytes of it for what is read again and again

// Slots of a coupling that read the same rows, first .. first + n_slots - 1, or a bundle of such groups. Its T lie at
// `sums` as [w][slot, v], `width` of them side by side in rows of `stride` numbers, and at `slot_sums` as [slot, v][w].
struct Group {
  const CouplingView& q;
  int first, n_slots;
  int64_t width, stride, sums, slot_sums;
  const int32_t* blocks;
  int n_blocks;
  bool leads;  // the first of its bundle

  // Group `number` of a coupling.
  IST_INLINE Group(const CouplingView& coupling, int number) : q(coupling) {
    const int32_t *group = q.groups + 4 * number, *place = q.places + 4 * number;
    first = group[0], n_slots = group[1];
    blocks = q.blocks + 2 * group[2], n_blocks = group[3];
    sums = place[0], stride = place[1], slot_sums = place[2], leads = place[3] != 0;
    width = int64_t{n_slots} * q.in_stride;
  }
};
// f(group) for all groups of all couplings
template <typename F>
IST_INLINE void for_groups(const CouplingView* couplings, int n, F f) {
  for (int k = 0; k < n; ++k) {
    const CouplingView& q = couplings[k];
    for (int g = 0; g < q.n_groups; ++g) f(Group(q, g));
  }
}
// Slots first .. end-1 of a group, with the same b
struct Slots {
  int64_t b;
  int first, end;
};
// f(group, slots) for all slots of all couplings
template <typename F>
IST_INLINE void for_slots(const CouplingView* couplings, int n, F f) {
  for_groups(couplings, n, [&](const Group& group) {
    const int last = group.first + group.n_slots;
    for (Slots slots{0, group.first, group.first}; slots.first < last; slots.first = slots.end) {
      slots.b = group.q.slots[2 * slots.first];
      while (slots.end < last && group.q.slots[2 * slots.end] == slots.b) ++slots.end;
      f(group, slots);
    }
  });
}
// f(rows, to) of N nodes out of `count` after the other: their rows of `in`, and the first one's of `out`
template <int N, typename R, typename F>
IST_INLINE void for_nodes(int count, const R* in, int64_t in_stride, R* out, int64_t out_stride, F f) {
  for (int first = 0; first < count; first += N, in += N * in_stride, out += N * out_stride) {
    const R* rows[N];
    for (int n = 0; n < N; ++n) rows[n] = opaque_pointer(in + n * in_stride);
    f(rows, out);
  }
}
// f(bundle): the group that leads it, as wide as all of them
template <typename F>
IST_INLINE void for_bundles(const CouplingView* couplings, int n, F f) {
  for_groups(couplings, n, [&](Group group) {
    if (!group.leads) return;
    group.width = group.stride;
    f(group);
  });
}

template <typename R>
struct Worker {
  using V = typename Lane<R>::V;
  static constexpr int L = Lane<R>::L;

  const ConvArgs<Real<R>>& a;
  const PlanView<Real<R>>& p;
  const R* weights;  // packed
  EdgeTile<R> tile;
  Products<R> products;
  NearList near;
  V* h;                 // all rows' channels, and last the constant one, times the radial factor
  const bool by_rows;   // all of h but the constant one stays in the splines' rows
  const int ring_size;  // nodes whose T are mixed together
  // From the T of one node to those of the next, as [w][slot, v] and [slot, v][w]; from its outputs to the next one's
  const int64_t node_sums, node_slot_sums, node_mixed;
  R* mixed;                  // [ring_size, node_mixed] outputs or their gradients, by field type
  int64_t ring[kMostNodes];  // nodes whose T are complete
  int n_ring = 0;
  bool untouched = true;  // the T of the current node

  Worker(const ConvArgs<Real<R>>& args, int64_t own_edges)
      : a(args),
        p(*args.plan),
        weights(reinterpret_cast<const R*>(args.weights)),
        tile(args),
        products(*args.plan),
        near(p.regular ? own_edges : 0),
        by_rows(!is_dual<R> && p.n_knots && p.kind == kZonal && channels_are_equal()),
        ring_size(nodes_at_once()),
        node_sums(spread(p.n_sums)),
        node_slot_sums(spread(p.n_slot_sums)),
        node_mixed(spread(p.n_mixed)) {}

  // Numbers from row to row of at least n: an odd number of the cache's lines, so that rows which are read side by side
  // do not all fall into the same few places of it.
  static int64_t spread(int64_t n) {
    constexpr int64_t line = 64 / sizeof(R);
    return ((n + line - 1) / line | 1) * line;
  }

  // Whether every row of h has the same coefficient of one channel after the other.
  bool channels_are_equal() const {
    bool equal = true;
    for (int r = 0; r < p.n_rows; ++r)
      for (int k = p.row_start[r] + 1; k < p.row_start[r + 1]; ++k) equal = equal && p.row[k] == p.row[k - 1] + p.c;
    return equal;
  }

  // Where θ is larger than a part of the cache that stays, all nodes in the ring take each row of it from there at
  // once.
  int nodes_at_once() const {
    constexpr int64_t kSmall = 256 << 10, kSums = 1536 << 10;  // bytes
    int64_t theta = 0;
    for (int k = 0; k < p.n_couplings; ++k)
      theta += int64_t{p.couplings[k].n_basis} * p.couplings[k].theta_rows * p.couplings[k].theta_size;
    if (theta * static_cast<int64_t>(sizeof(R)) <= kSmall) return kNodes;
    const int64_t fit = kSums / static_cast<int64_t>(sizeof(R)) / (p.n_sums + 1) / kNodes * kNodes;
    return static_cast<int>(fit < kNodes ? kNodes : fit > kMostNodes ? kMostNodes : fit);
  }

  void place(Arena& arena, bool backward) {
    tile.place(arena, backward), products.place(arena, backward);
    arena.take(h, p.row_start[p.n_rows] + 1), arena.take(mixed, ring_size * node_mixed);
  }

  // Hidden features times the radial factor, and products.
  void evaluate() {
    const int n = p.row_start[p.n_rows];
    by_rows ? tile.evaluate_rows() : tile.evaluate();
    for (int k = 0; k < n && !by_rows; ++k) h[k] = tile.features[p.row[k]] * tile.e.factor;
    h[n] = tile.e.factor;
    products.evaluate(tile);
  }

  // Where the splines' row of lane l holds a row of h, of all channels.
  int64_t column_of(int row) const { return p.row[p.row_start[row]] * tile.splines.pad; }
  const Real<R>* rows_of(int row, int l) const { return tile.splines.edge_row(0, l) + column_of(row); }

  // f(a) with the numbers of a row of h: those in the splines' rows from lane l on, or else `lanes`.
  template <typename Lanes, typename F>
  IST_INLINE void with_hidden(int row, int l, int64_t j_step, int64_t k_step, Lanes lanes, F f) {
    if constexpr (!is_dual<R>)
      if (by_rows && row < p.n_rows) return f(numbers_at(rows_of(row, l), j_step, k_step));
    f(lanes);
  }

  // T = h ⊗ t over the lanes l0 .. l1-1, all into one node; added to that of its earlier lanes.
  void accumulate(R* node, int l0, int l1) {
    for_bundles(p.couplings, p.n_couplings, [&](const Group& bundle) {
      for (int k = 0; k < bundle.n_blocks; ++k) {
        const int row = bundle.blocks[2 * k], place = bundle.blocks[2 * k + 1];
        const bool is_first = untouched && k == 0;
        const auto update = [&](auto add, auto hidden) {
          rank_updates<decltype(add)::value == 1>(bundle.q.n_hidden, node + bundle.sums, bundle.width, hidden,
                                                  products.t + place, p.product_size, l0, l1, bundle.width);
        };
        with_hidden(row, 0, 1, tile.splines.row, lanes_of(h + p.row_start[row]),
                    [&](auto hidden) { is_first ? update(Count<0>{}, hidden) : update(Count<1>{}, hidden); });
      }
    });
    untouched = false;
  }

  // After a node's last edge: where all of them were left to the near list, nothing has been written yet.
  void complete(R* node) {
    if (untouched) memset(static_cast<void*>(node), 0, sizeof(R) * p.n_sums);
  }

  // Walks the nodes first .. last-1: start(i) before a node's first edge, run(l0, l1) for the lanes of a tile that
  // belong to it, finish(i) after its last, empty(i) instead where it has none; end_tile() after each tile. Edges near
  // the origin are left to walk_near().
  template <typename Start, typename Run, typename Finish, typename Empty, typename EndTile>
  void walk(int64_t first, int64_t last, Start start, Run run, Finish finish, Empty empty, EndTile end_tile) {
    int64_t node = first, next = a.index(a.rowptr, first), node_end = a.index(a.rowptr, first + 1);
    const int64_t end = a.index(a.rowptr, last);
    bool started = false;
    for (; next < end; next += tile.n_edges) {
      tile.load(next, end);
      evaluate();
      for (int l = 0; l < tile.n_edges;) {
        while (node_end <= next + l) {
          started ? finish(node) : empty(node);
          started = false;
          node_end = a.index(a.rowptr, ++node + 1);
        }
        if (!started) start(node);
        started = true;
        const int stop = node_end - next < tile.n_edges ? static_cast<int>(node_end - next) : tile.n_edges;
        if (tile.near_lanes)
          run_far(node, l, stop, run);
        else
          run(l, stop);
        l = stop;
      }
      end_tile();
    }
    for (; node < last; ++node, started = false) started ? finish(node) : empty(node);
  }

  // run() for the lanes between near ones, which go into the list
  template <typename Run>
  void run_far(int64_t node, int l0, int l1, Run run) {
    near.add(tile.near_lanes, tile.edge, node, l0, l1);
    for (int l = l0; l < l1; l = l0 + 1) {
      for (l0 = l; l0 < l1 && !(tile.near_lanes >> l0 & 1);) ++l0;
      if (l < l0) run(l, l0);
    }
  }

  // After walk(): the nodes with edges in the near list once more.
  template <typename Start, typename Run, typename Finish, typename EndTile>
  void walk_near(Start start, Run run, Finish finish, EndTile end_tile) {
    for (int64_t next = 0; next < near.size; next += tile.n_edges) {
      tile.load(near, next);
      evaluate();
      for (int l = 0; l < tile.n_edges;) {
        const int64_t node = near.node[next + l];
        int stop = l + 1;
        while (stop < tile.n_edges && near.node[next + stop] == node) ++stop;
        start(node), run(l, stop), finish(node);
        l = stop;
      }
      end_tile();
    }
  }
};

}  // namespace implicit_steer::IST_ISA
