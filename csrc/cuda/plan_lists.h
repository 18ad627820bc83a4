// Lists of integers that kernels read beside a plan's two arrays: what CouplingLists and Places of call.h point to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "call.h"

namespace implicit_steer {

// All lists one after the other. Where each begins is an offset until terms() and places() are told where they lie.
template <typename R>
class PlanLists {
 public:
  std::vector<int32_t> numbers;

  // Of a plan that can be read on the host, its couplings in their places; `specialised`: its hidden layers are.
  void make(const Plan<R>& plan, bool specialised) {
    numbers.clear();
    add_rows(plan, specialised);  // first, as kernels load them four numbers at a time: all begin at whole quads
    add_nonzeros(plan);
    add_harmonics(plan);
    add_places(plan);
  }

  CouplingLists terms(const int32_t* begin) const {
    CouplingLists t = counts_;
    t.rows = begin + rows_, t.terms = begin + terms_, t.by_coefficient = begin + by_coefficient_;
    t.first = begin + first_, t.harmonic = begin + harmonic_, t.nonzero = begin + nonzero_;
    t.monomials = begin + monomials_, t.degrees = begin + degrees_, t.solid = begin + solid_;
    return t;
  }
  Places places(const int32_t* begin) const { return {begin + input_first_, begin + input_places_}; }

 private:
  CouplingLists counts_{};  // without pointers
  int64_t rows_ = 0, terms_ = 0, by_coefficient_ = 0, first_ = 0, harmonic_ = 0, nonzero_ = 0, monomials_ = 0,
          degrees_ = 0, solid_ = 0, input_first_ = 0, input_places_ = 0;

  // The list's offset.
  int64_t add(const std::vector<int32_t>& list) {
    const int64_t offset = static_cast<int64_t>(numbers.size());
    numbers.insert(numbers.end(), list.begin(), list.end());
    return offset;
  }

  // Rows of specialised layers, those of the constant one last, and their terms; of other layers none.
  void add_rows(const Plan<R>& plan, bool specialised) {
    std::vector<int32_t> rows, constant_rows, terms, by_coefficient, first(1, 0);
    for (int constant = 0; constant < 2 && specialised; ++constant)
      for (const CouplingView& q : plan.coupling_storage)
        if (q.constant == constant) list_rows(plan, q, constant ? constant_rows : rows, terms);
    for (int k = 0; k < plan.c; ++k) {
      for (size_t n = 0; n < terms.size(); n += 4)
        if (terms[n + 1] == k && terms[n + 3] > 0)
          by_coefficient.insert(by_coefficient.end(), terms.begin() + n, terms.begin() + n + 4);
      first.push_back(static_cast<int32_t>(by_coefficient.size() / 4));
    }
    counts_.n_rows = rows.size() / 4, counts_.n_constant_rows = constant_rows.size() / 4;
    counts_.n_terms = terms.size() / 4;
    rows.insert(rows.end(), constant_rows.begin(), constant_rows.end());
    rows_ = add(rows), terms_ = add(terms), by_coefficient_ = add(by_coefficient), first_ = add(first);
  }

  // The rows of one coupling, and their terms; also terms that are in no row, of the products' padding.
  static void list_rows(const Plan<R>& plan, const CouplingView& q, std::vector<int32_t>& rows,
                        std::vector<int32_t>& terms) {
    for (int n = 0; n < q.n_groups; ++n) {
      const int32_t* const group = q.groups + 4 * n;
      for (int slot = group[0]; slot < group[0] + group[1]; ++slot)
        for (int v = 0; v < q.in_stride; v += 4) {
          const int32_t at = q.at_sums + slot * q.theta_size + v * q.hidden_stride, begin = terms.size() / 4;
          const int32_t inputs = std::min(std::max(q.n_in - v, 0), 4);
          for (int b = group[2]; b < group[2] + group[3]; ++b) {
            const int32_t *const block = q.blocks + 2 * b, place = block[1] + (slot - group[0]) * q.in_stride + v;
            const int32_t coefficient = q.constant ? -1 : plan.row[plan.row_start[block[0]]];
            terms.insert(terms.end(), {place, coefficient, at, inputs});
          }
          if (inputs > 0) rows.insert(rows.end(), {at, inputs, begin, static_cast<int32_t>(terms.size() / 4)});
        }
    }
  }

  void add_nonzeros(const Plan<R>& plan) {
    std::vector<int32_t> harmonic(1, 0), nonzero;
    for (int m = 0; m <= plan.d; ++m) {
      for (int k = 0; k < plan.n_g; ++k)
        for (int n = plan.g_first[k]; n < plan.g_first[k + 1]; ++n)
          if (plan.nz_harmonic[n] == (m < plan.d ? m : -1)) nonzero.insert(nonzero.end(), {k, n});
      harmonic.push_back(static_cast<int32_t>(nonzero.size() / 2));
    }
    harmonic_ = add(harmonic), nonzero_ = add(nonzero);
  }

  void add_harmonics(const Plan<R>& plan) {
    std::vector<int32_t> monomials, degrees(1, 0), solid;
    if (plan.kind == kZonal) list_harmonics(plan, monomials, degrees, solid);
    counts_.n_degrees = degrees.size() - 1;
    monomials_ = add(monomials), degrees_ = add(degrees), solid_ = add(solid);
  }

  static void list_harmonics(const Plan<R>& plan, std::vector<int32_t>& monomials, std::vector<int32_t>& degrees,
                             std::vector<int32_t>& solid) {
    std::vector<int> degree(1, 0);
    for (int j = 1; j < plan.used_monomials; ++j) degree.push_back(degree[plan.monomial[2 * j]] + 1);
    const int most = *std::max_element(degree.begin(), degree.end());
    for (int d = 1; d <= most; ++d) {
      for (int j = 1; j < plan.used_monomials; ++j)
        if (degree[j] == d) monomials.push_back(j);
      degrees.push_back(static_cast<int32_t>(monomials.size()));
    }
    solid.assign(2 * plan.d, 0);
    for (int j = plan.used_harmonics - 1; j >= 0; --j) {
      int32_t *const begin = &solid[2 * plan.harmonic[2 * j]], *const end = begin + 1;
      *begin = j, *end = std::max(*end, j + 1);
    }
  }

  void add_places(const Plan<R>& plan) {
    std::vector<int32_t> first(plan.in_size + 1, 0);
    for (int k = 0; k < plan.n_gathered; ++k)
      if (plan.gathered_from[k] >= 0) ++first[plan.gathered_from[k] + 1];
    for (int i = 0; i < plan.in_size; ++i) first[i + 1] += first[i];
    std::vector<int32_t> next(first), places(first.back());
    for (int k = 0; k < plan.n_gathered; ++k)
      if (plan.gathered_from[k] >= 0) places[next[plan.gathered_from[k]]++] = k;
    input_first_ = add(first), input_places_ = add(places);
  }
};

}  // namespace implicit_steer
