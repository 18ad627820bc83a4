// Small dense products along channels: Q holds QL neighbouring channels of one edge or one node. `pad` is the length of
// a row of channels in memory.
#pragma once

#include "../activations.h"
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

// How many numbers a T of lanes or channels has.
template <typename T>
constexpr int kWidth = sizeof(typename Parts<T>::Plain) / sizeof(Real<T>);

// rows[N], in place, whose numbers are blocks of N x N side by side
template <int N, int S = N / 2, typename V>
IST_INLINE void transpose(V* rows) {
  for (int i = 0; i < N; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, kWidth<V>>{});
  if constexpr (S > 1) transpose<N, S / 2>(rows);
}

// Of N vectors, which it overwrites: lane j of the result is the sum of rows[j % N] over the lanes of j's own N.
template <int N, int S = N / 2, typename V>
IST_INLINE V lane_sums(V* rows) {
  for (int i = 0; i < S; ++i) {
    exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, kWidth<V>>{});
    rows[i] += rows[i + S];
  }
  if constexpr (S > 1)
    return lane_sums<N, S / 2>(rows);
  else
    return rows[0];
}

// Dual numbers of a row lie side by side in memory: a value, its tangent, the next value.
template <typename T, typename R>
IST_INLINE T load_numbers(const R* p) {
  T x;
  if constexpr (is_dual<R>) {
    using Plain = typename Parts<T>::Plain;
    const Real<R>* next = reinterpret_cast<const Real<R>*>(p);
    unzip(load_numbers<Plain>(next), load_numbers<Plain>(next + kWidth<T>), x,
          std::make_integer_sequence<int, kWidth<T>>{});
  } else {
    memcpy(&x, p, sizeof x);
  }
  return x;
}
template <typename T, typename R>
IST_INLINE void store_numbers(R* p, T x) {
  if constexpr (is_dual<R>)
    zip(x, reinterpret_cast<Real<R>*>(p), std::make_integer_sequence<int, kWidth<T>>{});
  else
    memcpy(p, &x, sizeof x);
}
template <typename R>
IST_INLINE typename Lane<R>::Q load_row(const R* p) {
  return load_numbers<typename Lane<R>::Q>(p);
}
template <typename R>
IST_INLINE void store_row(R* p, typename Lane<R>::Q q) {
  store_numbers(p, q);
}

// sums[j, :] += a(j, k) b[k, :] for j < N, M T wide; `row` is b[k, :], `step` from one T of it to the next
template <int N, int M, typename T, typename R, typename A>
IST_INLINE void add_term(T* sums, A a, const R* row, int k, int64_t step = kWidth<T>) {
  T numbers[M];
  for (int m = 0; m < M; ++m) numbers[m] = load_numbers<T>(row + m * step);
  for (int j = 0; j < N; ++j) {
    const auto factor = a(j, k);
    for (int m = 0; m < M; ++m) sums[j * M + m] += numbers[m] * factor;
  }
}

// y[j, :] = Σ_{k0 <= k < k1} a(j, k) b[k, :] for j < N, M T wide; added to what is there if kAdd. So few sums that each
// addition would wait for the one before are made in several parts.
template <bool kAdd, int N, int M, typename T, typename R, typename A>
IST_INLINE void rank_update(R* y, int64_t y_stride, A a, const R* b, int64_t b_stride, int k0, int k1) {
  constexpr int n = N * M, busy = is_dual<R> ? 4 : 8, parts = n < busy ? busy / n : 1;
  T acc[parts * n] = {};
  for (int j = 0; j < n && kAdd; ++j) acc[j] = load_numbers<T>(y + j / M * y_stride + j % M * kWidth<T>);
  int k = k0;
  for (; k + parts <= k1; k += parts)
    for (int i = 0; i < parts; ++i) add_term<N, M>(acc + i * n, a, b + (k + i) * b_stride, k + i);
  for (; k < k1; ++k) add_term<N, M>(acc, a, b + k * b_stride, k);
  for (int j = 0; j < n; ++j) {
    for (int i = 1; i < parts; ++i) acc[j] += acc[i * n + j];
    store_numbers(y + j / M * y_stride + j % M * kWidth<T>, acc[j]);
  }
}

// The same over rows of `pad` channels.
template <bool kAdd, int N, typename R, typename A>
IST_INLINE void rank_block(R* y, int64_t y_stride, A a, const R* b, int64_t b_stride, int k0, int k1, int64_t pad) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L, M = is_dual<R> ? 1 : 2;  // as many as the registers hold
  int64_t x = 0;
  for (; x + M * L <= pad; x += M * L) rank_update<kAdd, N, M, V>(y + x, y_stride, a, b + x, b_stride, k0, k1);
  for (; M > 1 && x + L <= pad; x += L) rank_update<kAdd, N, 1, V>(y + x, y_stride, a, b + x, b_stride, k0, k1);
  for (; x < pad; x += Lane<R>::QL)
    rank_update<kAdd, N, 1, typename Lane<R>::Q>(y + x, y_stride, a, b + x, b_stride, k0, k1);
}

// The same for any number n of rows; a(j) are the numbers from row j on.
template <bool kAdd = true, typename R, typename A>
void rank_updates(int n, R* y, int64_t y_stride, A a, const R* b, int64_t b_stride, int k0, int k1, int64_t pad) {
  constexpr int kRows = IST_LANE_BYTES == 64 ? 8 : 4;  // as many as the registers hold
  int j = 0;
  for (; j + kRows <= n; j += kRows)
    rank_block<kAdd, kRows>(y + j * y_stride, y_stride, a(j), b, b_stride, k0, k1, pad);
  for (; kRows > 4 && j + 4 <= n; j += 4)
    rank_block<kAdd, 4>(y + j * y_stride, y_stride, a(j), b, b_stride, k0, k1, pad);
  for (; j + 2 <= n; j += 2) rank_block<kAdd, 2>(y + j * y_stride, y_stride, a(j), b, b_stride, k0, k1, pad);
  if (j < n) rank_block<kAdd, 1>(y + j * y_stride, y_stride, a(j), b, b_stride, k0, k1, pad);
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
    const V* at = opaque_pointer(first + j0);
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

template <typename Q, int... K>
IST_INLINE auto join(Q a, Q b, std::integer_sequence<int, K...>) {
  return __builtin_shufflevector(a, b, K...);
}
// The numbers of vectors from(0), from(step), .. one after the other, as a V.
template <typename V, typename F>
IST_INLINE V join_all(F from, int first, int step) {
  const auto one = from(first);
  if constexpr (sizeof(V) == sizeof(one)) {
    return one;
  } else {
    typedef Real<V> Half __attribute__((vector_size(sizeof(V) / 2)));
    constexpr int half = sizeof(V) / 2 / sizeof(one);
    return join(join_all<Half>(from, first, step), join_all<Half>(from, first + half * step, step),
                std::make_integer_sequence<int, kWidth<V>>{});
  }
}

// rows_to_lanes for n <= 4, four numbers of a row at a time.
template <typename R, typename Row, typename Inside>
IST_INLINE void short_rows_to_lanes(int n, Row row, Inside inside, typename Lane<R>::V* lanes, int step) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L;
  typedef R Four __attribute__((vector_size(4 * sizeof(R))));
  if constexpr (L >= 4) {
    const auto four = [&](int l) {
      Four x{};
      if (inside(l, 0, 4))
        memcpy(&x, row(l), sizeof x);
      else
        for (int k = 0; k < n; ++k) x[k] = row(l)[k];
      return x;
    };
    V block[4];
    for (int k = 0; k < 4; ++k) block[k] = join_all<V>(four, k, 4);
    transpose<4>(block);
    for (int k = 0; k < n; ++k) lanes[k * step] = block[k];
  } else {
    for (int k = 0; k < n; ++k)
      for (int l = 0; l < L; ++l) lanes[k * step][l] = row(l)[k];
  }
}

// rows[l][0 .. n-1] -> lanes[0], lanes[step] ..; `inside`: whether so many numbers may be read from row l at an offset.
template <typename R, typename Row, typename Inside>
IST_INLINE void rows_to_lanes(int n, Row row, Inside inside, typename Lane<R>::V* lanes, int step) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L;
  if (n <= 4) {
    short_rows_to_lanes<R>(n, row, inside, lanes, step);
    return;
  }
  for (int k = 0; k < n; k += L) {
    const int at = n >= L && k + L > n ? n - L : k;  // the last block overlaps the one before
    const int width = n - at < L ? n - at : L;
    V block[L];
    for (int l = 0; l < L; ++l) {
      if (width == L || inside(l, at, L)) {
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

// One or two Q as lanes, whichever fill them.
template <typename V, typename Q>
IST_INLINE V join_rows(Q a, Q b) {
  if constexpr (is_dual<V>)
    return {join_rows<decltype(V{}.value)>(a.value, b.value), join_rows<decltype(V{}.value)>(a.tangent, b.tangent)};
  else if constexpr (sizeof(V) == sizeof(Q))
    return a;
  else
    return join(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}
// Lane l of the result: the sum of the QL numbers at rows + l QL.
template <typename R>
IST_INLINE typename Lane<R>::V row_sums(const R* rows) {
  using V = typename Lane<R>::V;
  constexpr int QL = Lane<R>::QL, step = Lane<R>::L - QL;
  V block[QL];
  for (int j = 0; j < QL; ++j) block[j] = join_rows<V>(load_row(rows + j * QL), load_row(rows + (j + step) * QL));
  return lane_sums<QL>(block);
}

// QL channels of all edges: lanes at `position` (-1: none) <-> rows [L, pad] at `at`
template <typename R>
struct Unit {
  int64_t at, pad;
  int32_t position[Lane<R>::QL];
};

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
