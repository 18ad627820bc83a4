// The last layer of a plan with many fields, slot by slot, as the kernels of wide_sums.cuh and wide_backward.cuh read
// it. A node's T takes more memory than a warp has: it lies in global memory, [slot][node][v, w], and a library
// multiplies it with θ.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "call.h"

namespace implicit_steer {

// A slot's T: [v, w] of a node in `size` numbers, which begin at `at` in [slot][node], as its outputs [u] do at
// `out_at`.
struct WideSlot {
  int32_t at, size, n_in, hidden_stride, constant, depthwise;
  int32_t out_at, n_out;
  int32_t place;        // of output u = 0 among the gathered ones
  int32_t theta;        // position of θ[b] in the packed weights, first layout
  int32_t first, last;  // terms
};

// T[slot, v, w] += h[row, w] t[v], t[v] = Σ_g f[i_g, v] G_g over g = begin .. end-1.
struct WideTerm {
  int32_t slot, row, begin, end;
};

// The lists on the device. A record is what the kernel MLP gives for one edge: h [n_rows, stride], then G [n_g], which
// begins at `g`; whole quads.
struct WideView {
  const WideSlot* slots;
  const WideTerm *terms, *by_row;  // slot by slot; row by row, those of the constant one last
  const int32_t* row_first;        // [n_rows + 2] where each row's begin there
  const int32_t* output;           // [n_mixed] number of the output at a place, or -1
  const int32_t* slots_first;      // [n_mixed / 8 + 1] where the slots begin that add to eight places,
  const int32_t* slots_of;         // among these
  int n_slots, stride, g, record;
};

// The lists, and what the host knows of them.
class WidePlan {
 public:
  // Numbers of a node's T above which the kernels with T in shared memory would have less than a third of the warps
  // that registers allow.
  static constexpr int64_t kMostSums = 4096;

  // θ[b] of a coupling: its slots, which follow each other.
  struct Matrix {
    int first, last;
  };
  std::vector<Matrix> matrices;
  std::vector<WideSlot> slots;
  std::vector<int32_t> numbers;  // what WideView points to
  bool used = false;
  int64_t sums = 0, outputs = 0;  // numbers of a node in all slots
  int32_t theta = 0;              // where θ begins in the packed weights
  int stride = 0, g = 0, record = 0;

  template <typename R>
  void make(const Plan<R>& p, int64_t n_sums) {
    *this = WidePlan();
    used = n_sums > kMostSums;
    if (!used) return;
    for (int r = 0; r < p.n_rows; ++r)
      stride = std::max(stride, static_cast<int>(padded(p.row_start[r + 1] - p.row_start[r])));
    g = p.n_rows * stride, record = whole_quads(g + p.n_g);
    theta = p.n_grad;
    for (const CouplingView& q : p.coupling_storage) add_coupling(p, q);
    place(p);
  }

  WideView view(const int32_t* begin) const {
    const auto at = [&](int list) { return begin + list_[list]; };
    return {reinterpret_cast<const WideSlot*>(at(0)),
            reinterpret_cast<const WideTerm*>(at(1)),
            reinterpret_cast<const WideTerm*>(at(2)),
            at(3),
            at(4),
            at(5),
            at(6),
            static_cast<int>(slots.size()),
            stride,
            g,
            record};
  }

 private:
  std::vector<WideTerm> terms_;
  std::vector<int64_t> list_;  // offsets

  template <typename R>
  void add_coupling(const Plan<R>& p, const CouplingView& q) {
    theta = std::min(theta, q.theta);
    std::vector<int> order(q.n_slots);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int s, int t) { return q.slots[2 * s] < q.slots[2 * t]; });
    int before = -1;
    for (const int s : order) {
      const int b = q.slots[2 * s], number = static_cast<int>(slots.size());
      if (b != before) matrices.push_back({number, number});
      matrices.back().last = number + 1, before = b;
      const auto at = static_cast<int32_t>(sums), out_at = static_cast<int32_t>(outputs);
      const auto of_b = static_cast<int32_t>(q.theta + int64_t{b} * q.theta_rows * q.theta_size);
      const auto size = static_cast<int32_t>(q.theta_size), first = static_cast<int32_t>(terms_.size());
      add_terms(p, q, s, number);
      slots.push_back({at, size, q.n_in, q.hidden_stride, q.constant, q.depthwise, out_at, q.n_out,
                       static_cast<int32_t>(q.place_of_output(s)), of_b, first, static_cast<int32_t>(terms_.size())});
      sums += size, outputs += q.n_out;
    }
  }

  template <typename R>
  void add_terms(const Plan<R>& p, const CouplingView& q, int s, int number) {
    for (int n = 0; n < q.n_groups; ++n) {
      const int32_t* const group = q.groups + 4 * n;
      if (s < group[0] || s >= group[0] + group[1]) continue;
      for (int k = group[2]; k < group[2] + group[3]; ++k) {
        const int32_t *const block = q.blocks + 2 * k, place = block[1] + (s - group[0]) * q.in_stride;
        for (int m = 0; m < p.n_products; ++m)
          if (p.products[4 * m] == place)
            terms_.push_back({number, block[0], p.products[4 * m + 2], p.products[4 * m + 3]});
      }
    }
  }

  template <typename R>
  void place(const Plan<R>& p) {
    std::vector<WideTerm> by_row(terms_);
    std::stable_sort(by_row.begin(), by_row.end(), [](auto& x, auto& y) { return x.row < y.row; });
    std::vector<int32_t> row_first(p.n_rows + 2, 0), output(p.n_mixed, -1), slots_first(1, 0), slots_of;
    for (const WideTerm& term : by_row) ++row_first[term.row + 1];
    for (int r = 0; r <= p.n_rows; ++r) row_first[r + 1] += row_first[r];
    for (int k = 0; k < p.out_size; ++k)
      if (p.mixed_place[k] >= 0) output[p.mixed_place[k]] = k;
    for (int at = 0; at < p.n_mixed; at += kChannels) {
      for (size_t s = 0; s < slots.size(); ++s)
        if (slots[s].place <= at && at < slots[s].place + padded(slots[s].n_out))
          slots_of.push_back(static_cast<int32_t>(s));
      slots_first.push_back(static_cast<int32_t>(slots_of.size()));
    }
    add(slots), add(terms_), add(by_row), add(row_first), add(output), add(slots_first), add(slots_of);
  }

  template <typename T>
  void add(const std::vector<T>& list) {
    list_.push_back(static_cast<int64_t>(numbers.size()));
    const auto* const begin = reinterpret_cast<const int32_t*>(list.data());
    numbers.insert(numbers.end(), begin, begin + list.size() * sizeof(T) / sizeof(int32_t));
  }
};

}  // namespace implicit_steer
