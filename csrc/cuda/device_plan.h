// A plan in device memory: one piece with its two arrays of numbers and the views of its layers and couplings.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "../packing.h"
#include "call.h"
#include "compat.cuh"
#include "exact_plan.h"
#include "failure.h"
#include "grid_plan.h"
#include "plan_lists.h"
#include "tile_plan.h"
#include "wide_plan.h"

namespace implicit_steer {

// Whether `width` places are those of one coefficient of all channels, from place `first` on.
template <typename R>
bool of_one_coefficient(const Plan<R>& p, const int32_t* place, int first, int width) {
  for (int w = 0; w < width; ++w)
    if (place[w] != first + w * p.c) return false;
  return first < p.c;
}

// Whether rows of couplings have one coefficient of all channels each, of which there are `width`.
template <typename R>
bool reads_all_channels(const Plan<R>& p, int width) {
  for (int k = 0; k < p.n_rows; ++k) {
    const int32_t* row = p.row + p.row_start[k];
    if (p.row_start[k + 1] - p.row_start[k] != width || !of_one_coefficient(p, row, row[0], width)) return false;
  }
  const auto reads_all = [&](const CouplingView& q) { return q.constant || q.n_hidden == width; };
  return std::all_of(p.coupling_storage.begin(), p.coupling_storage.end(), reads_all);
}

// Whether p's hidden layers are all alike, with samples in pairs and no others, groups that have one coefficient of all
// channels each, as rows of couplings do.
template <typename R>
bool has_equal_layers(const Plan<R>& p, int width) {
  if (p.n_layers == 0 || !reads_all_channels(p, width)) return false;
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
      if (group[0] != width || group[1] != width || !of_one_coefficient(p, group + 2, group[2], width) ||
          !of_one_coefficient(p, group + 2 + width, group[2], width))
        return false;
  }
  return true;
}

// What the launches of a kernel for one plan on one device have in common.
struct LaunchFacts {
  const void* kernel;
  Shape shape;  // but for the edges
  int warps_per_block;
  int64_t resident;  // warps that the device holds at a time
};

template <typename R>
struct DevicePlan {
  std::vector<int32_t> ints;
  std::vector<R> reals;
  Plan<R> host{};      // of these
  PlanView<R> view{};  // of their copies on the device
  Extent extent;
  PlanLists<R> lists;
  ExactPlan exact;                  // of float
  GridPlan grid;                    // of float; at most one of the two has fields
  const char* why_not = "float64";  // where neither of the two has
  FieldView fields_view{};          // of its copy on the device
  WidePlan wide;
  WideView wide_view{};  // likewise
  TilePlan tile;         // of float
  TileView tile_view{};  // likewise
  Places places{};       // of their copies on the device
  CouplingLists terms{};
  int64_t bytes;  // of the one piece of memory that has the copies
  int64_t reals_at, layers_at, couplings_at, lists_at, fields_at, wide_at, tile_at;  // offsets of these in it

  // Of the kernels that ran before; a plan has few.
  mutable std::mutex mutex;
  mutable std::vector<LaunchFacts> prepared;

  // `found` is as at the kernel's first launch for the plan, before which ask() asks the device.
  template <typename Ask>
  Failure prepare(const void* kernel, LaunchFacts& found, Ask ask) const {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const LaunchFacts& known : prepared)
      if (known.kernel == kernel) return found = known, Failure{};
    IST_TRY(ask());
    found.kernel = kernel;
    prepared.push_back(found);
    return {};
  }

  // False when the arrays are not what ops/native/arrays.py writes.
  bool read(const int32_t* ints_begin, int64_t n_ints, const R* reals_begin, int64_t n_reals) {
    ints.assign(ints_begin, ints_begin + n_ints), reals.assign(reals_begin, reals_begin + n_reals);
    if (!::implicit_steer::plan_view(host, ints.data(), n_ints, reals.data(), n_reals)) return false;
    place_couplings(host);
    lists.make(host);
    wide.make(host, extent.sums);
    if constexpr (std::is_same_v<R, float>) make_field_plans();
    extent.all_layers = extent.widest = host.n_knots ? host.hidden_flat : 0;
    extent.table_row = table_row(host);
    for (int n = 0; n < host.n_layers; ++n) {
      extent.all_layers += host.layers[n].out_size;
      extent.widest = std::max<int64_t>(extent.widest, host.layers[n].out_size);
    }
    const auto aligned = [](int64_t n) { return (n + 255) / 256 * 256; };
    reals_at = aligned(n_ints * sizeof(int32_t)), layers_at = reals_at + aligned(n_reals * sizeof(R));
    couplings_at = layers_at + aligned(host.n_layers * sizeof(LayerView<R>));
    lists_at = couplings_at + aligned(host.n_couplings * sizeof(CouplingView));
    fields_at = lists_at + aligned(lists.numbers.size() * sizeof(int32_t));
    wide_at = fields_at + aligned(of_fields().numbers.size() * sizeof(int32_t));
    tile_at = wide_at + aligned(wide.numbers.size() * sizeof(int32_t));
    bytes = tile_at + aligned(tile.numbers.size() * sizeof(int32_t));
    return true;
  }

  cudaError_t copy(void* memory, cudaStream_t stream) {
    const char* const to = static_cast<const char*>(memory);
    const auto ints_at = [&](int64_t offset) { return reinterpret_cast<const int32_t*>(to + offset); };
    Plan<R> there{};
    ::implicit_steer::plan_view(there, ints.data(), ints.size(), reals.data(), reals.size(), ints_at(0),
                                reinterpret_cast<const R*>(to + reals_at));
    place_couplings(there);
    std::vector<char> image(bytes);
    const auto put = [&](int64_t at, const auto& numbers) {
      if (!numbers.empty()) std::memcpy(image.data() + at, numbers.data(), numbers.size() * sizeof(numbers[0]));
    };
    put(0, ints), put(reals_at, reals), put(layers_at, there.layer_storage), put(couplings_at, there.coupling_storage);
    put(lists_at, lists.numbers), put(fields_at, of_fields().numbers);
    put(wide_at, wide.numbers), put(tile_at, tile.numbers);
    view = there;
    view.layers = reinterpret_cast<const LayerView<R>*>(to + layers_at);
    view.couplings = reinterpret_cast<CouplingView*>(static_cast<char*>(memory) + couplings_at);
    places = lists.places(ints_at(lists_at)), terms = lists.terms(ints_at(lists_at));
    fields_view = grid.fields ? grid.view(ints_at(fields_at)) : exact.view(ints_at(fields_at));
    wide_view = wide.view(ints_at(wide_at));
    if (tile.coefficients) tile_view = tile.view(ints_at(tile_at));
    const cudaError_t error = cudaMemcpyAsync(memory, image.data(), bytes, cudaMemcpyHostToDevice, stream);
    return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;  // calls on other streams will read it
  }

  // The one of the two that has fields, if one has.
  const FieldPlan& of_fields() const {
    if (grid.fields) return grid;
    return exact;
  }

 private:
  void make_field_plans() {
    const bool has_table = host.n_knots > 0;
    const int width = has_table ? host.channels : host.n_layers == 0 ? 0 : host.layers[0].out_size / host.c;
    if (!has_table && host.n_layers == 0) {
      why_not = "no hidden layers";
    } else if (!has_table && host.function != kElu && host.function != kSilu) {
      why_not = "an activation other than ELU and SiLU";
    } else if ((width != 8 && width != 16) ||
               !(has_table ? reads_all_channels(host, width) : has_equal_layers(host, width))) {
      why_not = "hidden layers of other than 8 or 16 channels";
    } else if (host.kind == kZonal) {
      exact.make(host, width), why_not = exact.why_not;
      tile.make(host, wide, width);
    } else if (host.kind != kNone) {
      why_not = "a frame that rotates about one axis";
    } else if (width != 8) {
      why_not = "a grid with other than 8 hidden channels";
    } else {
      grid.make(host, width), why_not = grid.why_not;
    }
  }

  // Sets the couplings' positions in T, [slot][v, w] as in the first layout of θ.
  void place_couplings(Plan<R>& p) {
    extent.sums = 0;
    for (CouplingView& q : p.coupling_storage) q.at_sums = extent.sums, extent.sums += q.n_slots * q.theta_size;
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
