// Small dense products along channels: Q holds QL neighbouring channels of one edge or one node. `pad` is the length of
// a row of channels in memory.
#pragma once

#include "../functions.h"
#include "../plan.h"

namespace implicit_steer::IST_ISA {

// Between pairs of numbers and a row of either.
template <typename Q, int... K>
IST_INLINE void unzip(Q low, Q high, Dual<Q>& row, std::integer_sequence<int, K...>) {
  row.value = __builtin_shufflevector(low, high, (2 * K)...);
  row.tangent = __builtin_shufflevector(low, high, (2 * K + 1)...);
}
template <typename Q, typename R, int... K>
IST_INLINE void zip(Dual<Q> row, R* out, std::integer_sequence<int, K...>) {
  constexpr int QL = sizeof...(K);
  const Q low = __builtin_shufflevector(row.value, row.tangent, (K / 2 + K % 2 * QL)...);
  const Q high = __builtin_shufflevector(row.value, row.tangent, (QL / 2 + K / 2 + K % 2 * QL)...);
  memcpy(out, &low, sizeof low), memcpy(out + QL, &high, sizeof high);
}

// Dual numbers of a row lie side by side in memory: a value, its tangent, the next value.
template <typename R>
IST_INLINE typename Lane<R>::Q load_row(const R* p) {
  typename Lane<R>::Q q;
  if constexpr (is_dual<R>) {
    constexpr int QL = Lane<R>::QL;
    const Real<R>* next = reinterpret_cast<const Real<R>*>(p);
    unzip(load_row(next), load_row(next + QL), q, std::make_integer_sequence<int, QL>{});
  } else {
    memcpy(&q, p, sizeof q);
  }
  return q;
}
template <typename R>
IST_INLINE void store_row(R* p, typename Lane<R>::Q q) {
  if constexpr (is_dual<R>) {
    constexpr int QL = Lane<R>::QL;
    zip(q, reinterpret_cast<Real<R>*>(p), std::make_integer_sequence<int, QL>{});
  } else {
    memcpy(p, &q, sizeof q);
  }
}
IST_INLINE int64_t padded(int64_t n) { return (n + kChannels - 1) / kChannels * kChannels; }

// y[j, :] += Σ_{k0 <= k < k1} a(j, k) b[k, :] for j < N; rows of `pad` channels, y's `y_stride`
template <int N, typename R, typename A>
IST_INLINE void rank_update(R* y, int64_t y_stride, A a, const R* b, int64_t b_stride, int k0, int k1, int64_t pad) {
  using Q = typename Lane<R>::Q;
  for (int64_t x = 0; x < pad; x += Lane<R>::QL) {
    Q acc[N];
    for (int j = 0; j < N; ++j) acc[j] = load_row(y + j * y_stride + x);
    for (int k = k0; k < k1; ++k) {
      const Q row = load_row(b + k * b_stride + x);
      for (int j = 0; j < N; ++j) acc[j] += row * a(j, k);
    }
    for (int j = 0; j < N; ++j) store_row(y + j * y_stride + x, acc[j]);
  }
}

// The same for any number of rows; a(j) are the numbers from row j on.
template <typename R, typename A>
void rank_updates(int n, R* y, int64_t y_stride, A a, const R* b, int64_t b_stride, int k0, int k1, int64_t pad) {
  int j = 0;
  for (; j + 8 <= n; j += 8) rank_update<8>(y + j * y_stride, y_stride, a(j), b, b_stride, k0, k1, pad);
  for (; j + 4 <= n; j += 4) rank_update<4>(y + j * y_stride, y_stride, a(j), b, b_stride, k0, k1, pad);
  for (; j < n; ++j) rank_update<1>(y + j * y_stride, y_stride, a(j), b, b_stride, k0, k1, pad);
}

// a for rank_updates: numbers in memory; lanes k of vectors j; lanes l0 + j of vectors k.
template <typename R>
IST_INLINE auto numbers_at(const R* first, int64_t j_step, int64_t k_step) {
  return [=](int j0) {
    const R* at = first + j0 * j_step;
    return [=](int j, int k) { return at[j * j_step + k * k_step]; };
  };
}
template <typename V>
IST_INLINE auto lanes_of(const V* first) {
  return [=](int j0) {
    const V* at = whole(first + j0);
    return [=](int j, int k) { return number(at[j], k); };
  };
}

template <typename V>
IST_INLINE auto lane_by_lane(const V* first, int l0) {
  return [=](int j0) { return [=](int j, int k) { return number(first[k], l0 + j0 + j); }; };
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

// rows[l][0 .. n-1] -> lanes[0], lanes[step] ..; `inside` tells whether L numbers may be read from a row at an offset.
template <typename R, typename Row, typename Inside>
IST_INLINE void rows_to_lanes(int n, Row row, Inside inside, typename Lane<R>::V* lanes, int step) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L;
  if (n <= 4) {  // one by one is less work than a transposition
    R* out = reinterpret_cast<R*>(lanes);
    for (int l = 0; l < L; ++l)
      for (int k = 0; k < n; ++k) out[k * step * L + l] = row(l)[k];
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
    for (int j = 0; j < width; ++j) lanes[(at + j) * step] = block[j];
  }
}

// lanes[0], lanes[step] .. -> rows[l][0 .. n-1] for l < n_edges
template <typename R, typename Row>
IST_INLINE void lanes_to_rows(int n, const typename Lane<R>::V* lanes, int step, Row row, int n_edges) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
  for (int k = 0; k < n; k += L) {
    const int at = n >= L && k + L > n ? n - L : k;
    const int width = n - at < L ? n - at : L;
    V block[L];
    for (int j = 0; j < L; ++j) block[j] = j < width ? lanes[(at + j) * step] : V{};
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

template <typename Q, int... K>
IST_INLINE auto join(Q a, Q b, std::integer_sequence<int, K...>) {
  return __builtin_shufflevector(a, b, K...);
}
// One or two Q as lanes, whichever fill them; and Q number i of lanes.
template <typename V, typename Q>
IST_INLINE V join_rows(Q a, Q b) {
  if constexpr (is_dual<V>)
    return {join_rows<decltype(V{}.value)>(a.value, b.value), join_rows<decltype(V{}.value)>(a.tangent, b.tangent)};
  else if constexpr (sizeof(V) == sizeof(Q))
    return a;
  else
    return join(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}
template <typename Q, typename V>
IST_INLINE Q part_of_lanes(const V& x, int i) {
  Q q;
  if constexpr (is_dual<V>)
    q = {part_of_lanes<decltype(q.value)>(x.value, i), part_of_lanes<decltype(q.value)>(x.tangent, i)};
  else
    memcpy(&q, reinterpret_cast<const char*>(&x) + i * sizeof(Q), sizeof(Q));
  return q;
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
      for (int l = 0; l < L; ++l) store_row(out + l * pad, part_of_lanes<typename Lane<R>::Q>(block[l], i));
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
      block[l] = join_rows<V>(load_row(rows + first.at + l * first.pad), load_row(rows + second.at + l * second.pad));
    transpose<L>(block);
    for (int j = 0; j < L; ++j)
      if (u + j / QL < n && units[u + j / QL].position[j % QL] >= 0)
        lanes[units[u + j / QL].position[j % QL]] += block[j];
  }
}

}  // namespace implicit_steer::IST_ISA
