// Lists of integers that kernels read beside a plan's two arrays: what CouplingLists and Places of call.h point to.
#pragma once

#include <cstdint>
#include <vector>

#include "call.h"

namespace implicit_steer {

// All lists one after the other. Where each begins is an offset until terms() and places() are told where they lie.
template <typename R>
class PlanLists {
 public:
  std::vector<int32_t> numbers;

  // Of a plan that can be read on the host.
  void make(const Plan<R>& plan) {
    numbers.clear();
    add_nonzeros(plan);
    add_places(plan);
  }

  CouplingLists terms(const int32_t* begin) const { return {begin + harmonic_, begin + nonzero_}; }
  Places places(const int32_t* begin) const { return {begin + input_first_, begin + input_places_}; }

 private:
  int64_t harmonic_ = 0, nonzero_ = 0, input_first_ = 0, input_places_ = 0;

  // The list's offset.
  int64_t add(const std::vector<int32_t>& list) {
    const int64_t offset = static_cast<int64_t>(numbers.size());
    numbers.insert(numbers.end(), list.begin(), list.end());
    return offset;
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
