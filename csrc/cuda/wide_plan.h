// The last layer of a plan with many fields, slot by slot, as the kernels of wide_sums.cuh and wide_backward.cuh read
// it. A node's T takes more memory than a warp has: it lies in global memory, [slot][node][v, w], and a library
// multiplies it with θ.
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace implicit_steer {

// A slot's T: [v, w] of a node in `size` numbers; those of n nodes begin at n · at, its outputs [u] at n · out_at.
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
  // Of a node the numbers of T, and the multiply-adds of mixing, above which these kernels take less time: those with T
  // in shared memory would have less than a third of the warps that registers allow; every warp loads θ for itself.
  static constexpr int64_t kMostSums = 4096, kMostProducts = 65536;

  // θ[b] of `batch` elements b of a coupling's basis that follow each other, of a depthwise one a single b. They have
  // equally many slots, which follow each other, too.
  struct Matrices {
    int first, last, batch;
  };
  std::vector<Matrices> matrices;
  std::vector<WideSlot> slots;
  std::vector<int32_t> numbers;  // what WideView points to
  bool used = false;
  int64_t sums = 0, outputs = 0;  // numbers of a node in all slots
  int32_t theta = 0;              // where θ begins in the packed weights
  int stride = 0, g = 0, record = 0;

  template <typename R>
  void make(const Plan<R>& p, int64_t n_sums) {
    *this = WidePlan();
    used = n_sums > kMostSums || mixing(p) > kMostProducts;
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
  static int64_t mixing(const Plan<R>& p) {
    int64_t sum = 0;
    for (const CouplingView& q : p.coupling_storage)
      sum += int64_t{q.n_slots} * q.n_hidden * q.n_in * (q.depthwise ? 1 : q.n_out);
    return sum;
  }

  template <typename R>
  void add_coupling(const Plan<R>& p, const CouplingView& q) {
    theta = std::min(theta, q.theta);
    const size_t first = matrices.size();
    for (int b = 0; b < q.n_basis; ++b) {
      const int number = static_cast<int>(slots.size());
      for (int s = 0; s < q.n_slots; ++s)
        if (q.slots[2 * s] == b) add_slot(p, q, s);
      const int n = static_cast<int>(slots.size()) - number;
      const bool alike =
          matrices.size() > first && n * matrices.back().batch == matrices.back().last - matrices.back().first;
      if (alike && !q.depthwise)
        matrices.back().last += n, ++matrices.back().batch;
      else
        matrices.push_back({number, number + n, 1});
    }
  }

  template <typename R>
  void add_slot(const Plan<R>& p, const CouplingView& q, int s) {
    const int number = static_cast<int>(slots.size());
    const int64_t of_b = q.theta + int64_t{q.slots[2 * s]} * q.theta_rows * q.theta_size;
    const auto first = static_cast<int32_t>(terms_.size());
    add_terms(p, q, s, number);
    slots.push_back({static_cast<int32_t>(sums), static_cast<int32_t>(q.theta_size), q.n_in, q.hidden_stride,
                     q.constant, q.depthwise, static_cast<int32_t>(outputs), q.n_out,
                     static_cast<int32_t>(q.place_of_output(s)), static_cast<int32_t>(of_b), first,
                     static_cast<int32_t>(terms_.size())});
    sums += q.theta_size, outputs += q.n_out;
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
