// A plan in device memory: one piece with its two arrays of numbers and the views of its layers and couplings.
#pragma once

#include <algorithm>
#include <array>
#include <iterator>
#include <memory>
#include <vector>

#include "../packing.h"
#include "call.h"
#include "compat.cuh"
#include "failure.h"

namespace implicit_steer {

// Which of the sizes that kernels are compiled for a plan has (specialised.cuh): coefficients and channels of its
// hidden layers.
enum class Sizes { kAny, kElu4x8, kElu6x8, kSilu4x8, kSilu6x8 };

// Whether p's hidden layers are what SpecialisedLayers computes with: all of them alike, with samples in pairs and no
// others, groups that have one coefficient of all channels each, as rows of couplings do.
template <typename R>
bool is_specialised(const Plan<R>& p, int width) {
  if (p.kind != kZonal || p.n_layers == 0 || p.n_even != (p.c + 1) / 2) return false;
  const auto of_one_coefficient = [&](const int32_t* place, int first) {
    for (int w = 0; w < width; ++w)
      if (place[w] != first + w * p.c) return false;
    return first < p.c;
  };
  const LayerView<R>& first = p.layers[0];
  for (int n = 0; n < p.n_layers; ++n) {
    const LayerView<R>& layer = p.layers[n];
    const int64_t rows = int64_t{layer.n_pairs} * p.c;
    if (layer.out_size != width * p.c || layer.n_samples != 2 * layer.n_pairs || layer.n_pairs != first.n_pairs ||
        !std::equal(layer.pair_samples, layer.pair_samples + rows, first.pair_samples) ||
        !std::equal(layer.pair_inverse, layer.pair_inverse + rows, first.pair_inverse))
      return false;
    if (n == 0) continue;
    if (layer.n_groups != p.c) return false;
    const int32_t* group = layer.groups;
    for (int k = 0; k < p.c; ++k, group += 2 + 2 * width)
      if (group[0] != width || group[1] != width || !of_one_coefficient(group + 2, group[2]) ||
          !of_one_coefficient(group + 2 + width, group[2]))
        return false;
  }
  for (int k = 0; k < p.n_rows; ++k) {
    const int32_t* row = p.row + p.row_start[k];
    if (p.row_start[k + 1] - p.row_start[k] != width || !of_one_coefficient(row, row[0])) return false;
  }
  const auto reads_all = [&](const CouplingView& q) { return q.constant || q.n_hidden == width; };
  return std::all_of(p.coupling_storage.begin(), p.coupling_storage.end(), reads_all);
}

template <typename R>
Sizes sizes_of(const Plan<R>& p) {
  constexpr int kWidth = 8;
  constexpr int64_t kMostNumbers = 4096;  // of the layers in a block's shared memory: more would keep warps out
  if ((p.c != 4 && p.c != 6) || !is_specialised(p, kWidth)) return Sizes::kAny;
  const int64_t samples = int64_t{p.layers[0].n_samples} * 8, weights = int64_t{p.n_layers - 1} * p.c * kWidth * kWidth;
  if (samples + weights > kMostNumbers) return Sizes::kAny;
  if (p.function == kElu) return p.c == 4 ? Sizes::kElu4x8 : Sizes::kElu6x8;
  if (p.function == kSilu) return p.c == 4 ? Sizes::kSilu4x8 : Sizes::kSilu6x8;
  return Sizes::kAny;
}

template <typename R>
struct DevicePlan {
  std::vector<int32_t> ints;
  std::vector<R> reals;
  Plan<R> host{};      // of these
  PlanView<R> view{};  // of their copies on the device
  Extent extent;
  Sizes sizes;
  std::vector<int32_t> input_places;                                      // of Places: first, then at
  Places places{};                                                        // of their copy on the device
  std::vector<int32_t> lists;                                             // of Terms, one after the other
  Terms terms{};                                                          // of their copy on the device
  int64_t reals_at, layers_at, couplings_at, places_at, lists_at, bytes;  // of the copies, in one piece of memory

  // False when the arrays are not what ops/native/arrays.py writes.
  bool read(const int32_t* ints_begin, int64_t n_ints, const R* reals_begin, int64_t n_reals) {
    ints.assign(ints_begin, ints_begin + n_ints), reals.assign(reals_begin, reals_begin + n_reals);
    if (!::implicit_steer::plan_view(host, ints.data(), n_ints, reals.data(), n_reals)) return false;
    place_couplings(host), list_places();
    sizes = sizes_of(host);
    list_terms();
    extent.all_layers = extent.widest = 0;
    for (int n = 0; n < host.n_layers; ++n) {
      extent.all_layers += host.layers[n].out_size;
      extent.widest = std::max<int64_t>(extent.widest, host.layers[n].out_size);
    }
    const auto aligned = [](int64_t n) { return (n + 255) / 256 * 256; };
    reals_at = aligned(n_ints * sizeof(int32_t)), layers_at = reals_at + aligned(n_reals * sizeof(R));
    couplings_at = layers_at + aligned(host.n_layers * sizeof(LayerView<R>));
    places_at = couplings_at + aligned(host.n_couplings * sizeof(CouplingView));
    lists_at = places_at + aligned(input_places.size() * sizeof(int32_t));
    bytes = lists_at + aligned(lists.size() * sizeof(int32_t));
    return true;
  }

  cudaError_t copy(void* memory, cudaStream_t stream) {
    char* const to = static_cast<char*>(memory);
    std::vector<char> image(bytes);
    Plan<R> there{};
    ::implicit_steer::plan_view(there, ints.data(), ints.size(), reals.data(), reals.size(),
                                reinterpret_cast<const int32_t*>(to), reinterpret_cast<const R*>(to + reals_at));
    place_couplings(there);
    const auto put = [&](int64_t at, const auto& numbers) {
      if (!numbers.empty()) std::memcpy(image.data() + at, numbers.data(), numbers.size() * sizeof(numbers[0]));
    };
    put(0, ints), put(reals_at, reals), put(layers_at, there.layer_storage), put(couplings_at, there.coupling_storage);
    put(places_at, input_places), put(lists_at, lists);
    view = there;
    view.layers = reinterpret_cast<const LayerView<R>*>(to + layers_at);
    view.couplings = reinterpret_cast<CouplingView*>(to + couplings_at);
    places.first = reinterpret_cast<const int32_t*>(to + places_at), places.at = places.first + host.in_size + 1;
    for (const int32_t** list : lists_of(terms))
      *list = reinterpret_cast<const int32_t*>(to + lists_at) + (*list - lists.data());
    const cudaError_t error = cudaMemcpyAsync(memory, image.data(), bytes, cudaMemcpyHostToDevice, stream);
    return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;  // calls on other streams will read it
  }

 private:
  // Sets the couplings' positions in T, [slot][v, w] as in the first layout of θ.
  void place_couplings(Plan<R>& p) {
    extent.sums = 0;
    for (CouplingView& q : p.coupling_storage) q.at_sums = extent.sums, extent.sums += q.n_slots * q.theta_size;
  }

  // Pointers into `lists`, until copy() makes them such into the device's memory.
  void list_terms() {
    std::vector<int32_t> rows, constant_rows, term_list, by_coefficient, first(1, 0), harmonic(1, 0), nonzero;
    for (int constant = 0; constant < 2 && sizes != Sizes::kAny; ++constant)
      for (const CouplingView& q : host.coupling_storage)
        if (q.constant == constant) list_rows(q, constant ? constant_rows : rows, term_list);
    for (int k = 0; k < host.c; ++k) {
      for (size_t n = 0; n < term_list.size(); n += 4)
        if (term_list[n + 1] == k && term_list[n + 3] > 0)
          by_coefficient.insert(by_coefficient.end(), term_list.begin() + n, term_list.begin() + n + 4);
      first.push_back(static_cast<int32_t>(by_coefficient.size() / 4));
    }
    for (int m = 0; m <= host.d; ++m) {
      for (int k = 0; k < host.n_g; ++k)
        for (int n = host.g_first[k]; n < host.g_first[k + 1]; ++n)
          if (host.nz_harmonic[n] == (m < host.d ? m : -1)) nonzero.insert(nonzero.end(), {k, n});
      harmonic.push_back(static_cast<int32_t>(nonzero.size() / 2));
    }
    std::vector<int32_t> monomials, degrees(1, 0), solid;
    if (host.kind == kZonal) list_harmonics(monomials, degrees, solid);
    terms.n_rows = rows.size() / 4, terms.n_constant_rows = constant_rows.size() / 4;
    terms.n_terms = term_list.size() / 4, terms.n_degrees = degrees.size() - 1;
    rows.insert(rows.end(), constant_rows.begin(), constant_rows.end());
    // Those of four come first: each begins at a whole multiple of 16 bytes.
    const std::vector<int32_t>* const all[] = {&rows,    &term_list, &by_coefficient, &first, &harmonic,
                                               &nonzero, &monomials, &degrees,        &solid};
    lists.clear();
    for (const auto* list : all) lists.insert(lists.end(), list->begin(), list->end());
    const int32_t* at = lists.data();
    for (size_t n = 0; n < std::size(all); ++n) *lists_of(terms)[n] = at, at += all[n]->size();
  }

  static std::array<const int32_t**, 9> lists_of(Terms& t) {
    return {&t.rows,    &t.terms,     &t.by_coefficient, &t.first, &t.harmonic,
            &t.nonzero, &t.monomials, &t.degrees,        &t.solid};
  }

  void list_harmonics(std::vector<int32_t>& monomials, std::vector<int32_t>& degrees,
                      std::vector<int32_t>& solid) const {
    std::vector<int> degree(1, 0);
    for (int j = 1; j < host.used_monomials; ++j) degree.push_back(degree[host.monomial[2 * j]] + 1);
    const int most = *std::max_element(degree.begin(), degree.end());
    for (int d = 1; d <= most; ++d) {
      for (int j = 1; j < host.used_monomials; ++j)
        if (degree[j] == d) monomials.push_back(j);
      degrees.push_back(static_cast<int32_t>(monomials.size()));
    }
    solid.assign(2 * host.d, 0);
    for (int j = host.used_harmonics - 1; j >= 0; --j) {
      int32_t *const begin = &solid[2 * host.harmonic[2 * j]], *const end = begin + 1;
      *begin = j, *end = std::max(*end, j + 1);
    }
  }

  // The rows of one coupling of specialised layers, and their terms; also terms that are in no row, of the products'
  // padding.
  void list_rows(const CouplingView& q, std::vector<int32_t>& rows, std::vector<int32_t>& term_list) const {
    for (int n = 0; n < q.n_groups; ++n) {
      const int32_t* const group = q.groups + 4 * n;
      for (int slot = group[0]; slot < group[0] + group[1]; ++slot)
        for (int v = 0; v < q.in_stride; v += 4) {
          const int32_t at = q.at_sums + slot * q.theta_size + v * q.hidden_stride, begin = term_list.size() / 4;
          const int32_t inputs = std::min(std::max(q.n_in - v, 0), 4);
          for (int b = group[2]; b < group[2] + group[3]; ++b) {
            const int32_t *const block = q.blocks + 2 * b, place = block[1] + (slot - group[0]) * q.in_stride + v;
            const int32_t coefficient = q.constant ? -1 : host.row[host.row_start[block[0]]];
            term_list.insert(term_list.end(), {place, coefficient, at, inputs});
          }
          if (inputs > 0) rows.insert(rows.end(), {at, inputs, begin, static_cast<int32_t>(term_list.size() / 4)});
        }
    }
  }

  void list_places() {
    input_places.assign(host.in_size + 1, 0);
    for (int k = 0; k < host.n_gathered; ++k)
      if (host.input[k] >= 0) ++input_places[host.input[k] + 1];
    for (int i = 0; i < host.in_size; ++i) input_places[i + 1] += input_places[i];
    std::vector<int32_t> next(input_places);
    input_places.resize(host.in_size + 1 + next.back());
    for (int k = 0; k < host.n_gathered; ++k)
      if (host.input[k] >= 0) input_places[host.in_size + 1 + next[host.input[k]]++] = k;
  }
};

// Numbers of a warp's memory behind its edges.
template <typename R>
int64_t forward_rest(const DevicePlan<R>& plan) {
  return plan.extent.sums + plan.host.n_mixed;
}
template <typename R>
int64_t backward_rest(const DevicePlan<R>& plan) {
  return 2 * plan.extent.sums + plan.host.n_mixed;
}
template <typename R>
int64_t statistics_rest(const DevicePlan<R>& plan) {
  return int64_t{3} * (plan.extent.widest / plan.host.c) * plan.host.d;
}
// Channels of all batch norms.
template <typename R>
int64_t norm_channels(const DevicePlan<R>& plan) {
  return plan.host.has_norms ? int64_t{plan.host.n_layers} * (plan.host.layers[0].out_size / plan.host.c) : 0;
}

template <typename R>
int64_t plan_bytes(const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals) {
  DevicePlan<R> plan;
  return plan.read(ints, n_ints, reals, n_reals) ? plan.bytes : -1;
}
template <typename R>
Failure plan_create(const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals, void* memory, void* stream,
                    DevicePlan<R>** plan) {
  auto made = std::make_unique<DevicePlan<R>>();
  if (!made->read(ints, n_ints, reals, n_reals)) return {"plan_create", "not a plan"};
  IST_TRY(failure("plan_create", made->copy(memory, static_cast<cudaStream_t>(stream))));
  *plan = made.release();
  return {};
}
template <typename R>
void plan_destroy(DevicePlan<R>* plan) {
  delete plan;
}
template <typename R>
const PlanView<R>* plan_view_of(const DevicePlan<R>* plan) {
  return &plan->host;
}

}  // namespace implicit_steer
