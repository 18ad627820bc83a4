// Small dense products along channels: Q holds QL neighbouring channels of one edge or one node. `pad` is the length of
// a row of channels in memory.
#pragma once

#include "../plan.h"
#include "../simd.h"

namespace implicit_steer::IST_ISA {

template <typename R>
IST_INLINE typename Lane<R>::Q load_row(const R* p) {
  typename Lane<R>::Q q;
  memcpy(&q, p, sizeof q);
  return q;
}
template <typename R>
IST_INLINE void store_row(R* p, typename Lane<R>::Q q) {
  memcpy(p, &q, sizeof q);
}
IST_INLINE int64_t padded(int64_t n) { return (n + kChannels - 1) / kChannels * kChannels; }

// y[j, :] += Σ_{k0 <= k < k1} a[j * a_stride + k * a_step] b[k, :] for j < N; rows of `pad` channels, y's `y_stride`
template <int N, typename R>
IST_INLINE void rank_update(R* y, int64_t y_stride, const R* a, int64_t a_stride, int64_t a_step, const R* b,
                            int64_t b_stride, int k0, int k1, int64_t pad) {
  using Q = typename Lane<R>::Q;
  for (int64_t x = 0; x < pad; x += Lane<R>::QL) {
    Q acc[N];
    for (int j = 0; j < N; ++j) acc[j] = load_row(y + j * y_stride + x);
    for (int k = k0; k < k1; ++k) {
      const Q row = load_row(b + k * b_stride + x);
      for (int j = 0; j < N; ++j) acc[j] += row * a[j * a_stride + k * a_step];
    }
    for (int j = 0; j < N; ++j) store_row(y + j * y_stride + x, acc[j]);
  }
}

// The same for any number of rows.
template <typename R>
void rank_updates(int n, R* y, int64_t y_stride, const R* a, int64_t a_stride, int64_t a_step, const R* b,
                  int64_t b_stride, int k0, int k1, int64_t pad) {
  int j = 0;
  for (; j + 8 <= n; j += 8)
    rank_update<8>(y + j * y_stride, y_stride, a + j * a_stride, a_stride, a_step, b, b_stride, k0, k1, pad);
  for (; j + 4 <= n; j += 4)
    rank_update<4>(y + j * y_stride, y_stride, a + j * a_stride, a_stride, a_step, b, b_stride, k0, k1, pad);
  for (; j < n; ++j)
    rank_update<1>(y + j * y_stride, y_stride, a + j * a_stride, a_stride, a_step, b, b_stride, k0, k1, pad);
}

// in [n][in_pad] -> out [m][out_pad], in_pad >= m and out_pad >= n whole Q
template <typename R>
IST_INLINE void transpose_rows(int n, int m, const R* in, int64_t in_pad, R* out, int64_t out_pad) {
  constexpr int QL = Lane<R>::QL;
  for (int i = 0; i < n; i += QL)
    for (int j = 0; j < m; j += QL) {
      typename Lane<R>::Q block[QL];
      for (int k = 0; k < QL; ++k) block[k] = i + k < n ? load_row(in + (i + k) * in_pad + j) : typename Lane<R>::Q{};
      transpose<QL>(block);
      for (int k = 0; k < QL && j + k < m; ++k) store_row(out + (j + k) * out_pad + i, block[k]);
    }
}

// ---- between lanes (one vector per number, an edge per lane) and rows (an edge's numbers side by side)

// rows[l][0 .. n-1] -> lanes[0 .. n-1]; `inside` tells whether L numbers may be read from a row at an offset.
template <typename R, typename Row, typename Inside>
IST_INLINE void rows_to_lanes(int n, Row row, Inside inside, typename Lane<R>::V* lanes) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L;
  if (n <= 4) {  // one by one is less work than a transposition
    R* out = reinterpret_cast<R*>(lanes);
    for (int l = 0; l < L; ++l)
      for (int k = 0; k < n; ++k) out[k * L + l] = row(l)[k];
    return;
  }
  for (int k = 0; k < n; k += L) {
    const int at = n >= L && k + L > n ? n - L : k;  // the last block overlaps the one before
    const int width = n - at < L ? n - at : L;
    V block[L];
    for (int l = 0; l < L; ++l) {
      if (width == L || inside(l, at)) {
        memcpy(&block[l], row(l) + at, sizeof(V));
      } else {
        R part[L] = {};
        for (int j = 0; j < width; ++j) part[j] = row(l)[at + j];
        memcpy(&block[l], part, sizeof(V));
      }
    }
    transpose<L>(block);
    for (int j = 0; j < width; ++j) lanes[at + j] = block[j];
  }
}

// lanes[0 .. n-1] -> rows[l][0 .. n-1] for l < n_edges
template <typename R, typename Row>
IST_INLINE void lanes_to_rows(int n, const typename Lane<R>::V* lanes, Row row, int n_edges) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
  for (int k = 0; k < n; k += L) {
    const int at = n >= L && k + L > n ? n - L : k;
    const int width = n - at < L ? n - at : L;
    V block[L];
    for (int j = 0; j < L; ++j) block[j] = j < width ? lanes[at + j] : V{};
    transpose<L>(block);
    for (int l = 0; l < n_edges; ++l) {
      if (width == L) {
        memcpy(row(l) + at, &block[l], sizeof(V));
      } else if (width == QL) {
        memcpy(row(l) + at, &block[l], QL * sizeof(R));
      } else {
        for (int j = 0; j < width; ++j) row(l)[at + j] = block[l][j];
      }
    }
  }
}

// One or two Q as lanes, whichever fill them.
template <typename R>
IST_INLINE typename Lane<R>::V join_rows(typename Lane<R>::Q a, typename Lane<R>::Q b) {
#if IST_LANE_BYTES == 2 * IST_ROW_BYTES
  if constexpr (sizeof(R) == 4)
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return (void)b, a;
#endif
}

// QL channels of all edges: lanes at `position` (-1: none) <-> rows [L, pad] at `at`
template <typename R>
struct Unit {
  int64_t at, pad;
  int32_t position[Lane<R>::QL];
};

template <typename R>
IST_INLINE void units_to_rows(int n, const Unit<R>* units, const typename Lane<R>::V* lanes, R* rows) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
  for (int u = 0; u < n; u += L / QL) {
    V block[L];
    for (int j = 0; j < L; ++j) {
      const int position = u + j / QL < n ? units[u + j / QL].position[j % QL] : -1;
      block[j] = position >= 0 ? lanes[position] : V{};
    }
    transpose<L>(block);
    for (int i = 0; i < L / QL && u + i < n; ++i) {
      R* out = rows + units[u + i].at;
      const int64_t pad = units[u + i].pad;
      for (int l = 0; l < L; ++l) memcpy(out + l * pad, reinterpret_cast<const R*>(&block[l]) + i * QL, QL * sizeof(R));
    }
  }
}

// lanes += rows
template <typename R>
IST_INLINE void units_to_lanes(int n, const Unit<R>* units, const R* rows, typename Lane<R>::V* lanes) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
  for (int u = 0; u < n; u += L / QL) {
    V block[L];
    const Unit<R>&first = units[u], &second = units[u + 1 < n ? u + 1 : u];
    for (int l = 0; l < L; ++l)
      block[l] = join_rows<R>(load_row(rows + first.at + l * first.pad), load_row(rows + second.at + l * second.pad));
    transpose<L>(block);
    for (int j = 0; j < L; ++j)
      if (u + j / QL < n && units[u + j / QL].position[j % QL] >= 0)
        lanes[units[u + j / QL].position[j % QL]] += block[j];
  }
}

}  // namespace implicit_steer::IST_ISA
