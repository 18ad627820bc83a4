// Layers whose sums over edges tensor cores form, path by path: their hidden layers are those of exact_mlp.cuh, their
// fields irreps of l = 0 to 2, as many as there are. T lies in global memory, where the lists of wide_plan.h say.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include "exact_plan.h"
#include "wide_plan.h"

namespace implicit_steer {

// One element of a coupling's basis: t[o, v] = Σ_i f[i, v] G[i, o], of which T[o, v, w] is the sum with h[row, w].
struct alignas(16) TilePath {
  int32_t at, size;         // T of o = 0 (WideSlot), and from one o to the next
  int32_t n_in, n_out;      // components i and o: 1, 3 or 5
  int32_t diagonal;         // t[o, v] = f[o, v] G[o]
  int32_t channels;         // v
  int32_t from, in_stride;  // place of component i = 0 among the gathered inputs, and from one to the next
  int32_t row;              // where h begins in an edge's record, or -1: 1 in place of h
  int32_t g;                // G, [n_in, n_out] or [n_out]
  int32_t shape;            // tile_shape(), by which kernels choose their code
  int32_t component;        // number of component i = 0 among those of its TileInput
};

// Of a path with h or without it.
IST_HOST_DEVICE constexpr int tile_shape(int n_in, int n_out, bool diagonal, bool constant) {
  return (n_in / 2 * 3 + n_out / 2) * 4 + 2 * diagonal + constant;
}

// What a warp sums at a time: of a path channels v .. v + 7, or two such blocks, and hidden channels w .. w + 7.
struct TileItem {
  int32_t path, v, blocks, w;
};

// One or two blocks of eight channels, v .., of all components of the inputs of a type, and the paths that read them,
// warp by warp.
struct alignas(16) TileInput {
  static constexpr int kBlocks = 2;  // at most
  int32_t from, n_in, in_stride, v, blocks;
  int32_t first[5];  // where each of four warps' paths begin, and end
};

// row `to` += value · row `from`, of the rows of an edge: monomials, harmonics, G. Terms of a row follow each other.
struct alignas(16) TileTerm {
  int32_t from, to;
  float value;
  int32_t is_last;  // of its row
};

// A sparse matrix, in parts of about as many terms, of whole rows each.
struct TileMatrix {
  static constexpr int kParts = 32;
  const TileTerm* terms;
  const int32_t* first;  // [kParts + 1]
};

// The lists on the device. An edge's record is h [degrees, width] times the radial factor, then direction and factor.
struct TileView {
  const TilePath* paths;
  const TileItem* items;     // those that take longest first
  const int32_t* monomials;  // [n_monomials, 2] an earlier one and the coordinate that it is multiplied with
  TileMatrix harmonics, g;   // from the monomials, from the harmonics; rows that have no term are 0
  TileMatrix of_harmonics, of_monomials;  // the transposed matrices: rows are harmonics, monomials
  const TileInput* inputs;
  const int32_t* input_paths;
  const int32_t* unread;  // numbers of inputs that no path reads
  const int32_t* first;   // of the first layer: FieldView
  int n_paths, n_items, n_inputs, n_unread, n_monomials, n_harmonics, n_g, width, record;
  int most_in, blocks;  // of an input

  // Rows of an edge in a block's memory.
  IST_HOST_DEVICE int of_edge() const { return n_monomials + n_harmonics + n_g; }
};

class TilePlan {
 public:
  static constexpr int kWarps = 4;       // of a block
  static constexpr int kMostDegree = 4;  // of the harmonics
  int coefficients = 0;                  // of a channel; 0: there are no such kernels for the plan
  int width = 0;                         // hidden channels
  std::vector<int32_t> numbers;          // what TileView points to

  // As ExactPlan::make.
  void make(const Plan<float>& p, const WidePlan& wide, int channels) {
    *this = TilePlan();
    width = channels;
    if (!p.n_knots) {
      if (!ExactPlan::has_coefficients(p, 6) || !ExactPlan::has_scalar_inputs(p)) return;
      if (!ExactPlan::read_first_layer(p, width, first_)) return;
    }
    const WideSlot* slot = wide.slots.data();
    for (const CouplingView& q : p.coupling_storage)
      if (!add_coupling(p, q, slot)) return;
    if (paths_.empty() || !find_unread(p)) return;
    add_inputs();
    place(p);
  }

  TileView view(const int32_t* begin) const {
    TileView v{};
    const auto at = [&](int list) { return begin + list_[list]; };
    v.paths = reinterpret_cast<const TilePath*>(at(0)), v.items = reinterpret_cast<const TileItem*>(at(1));
    v.monomials = at(2);
    const auto matrix = [&](int k) { return TileMatrix{reinterpret_cast<const TileTerm*>(at(k)), at(k + 1)}; };
    v.harmonics = matrix(3), v.g = matrix(5), v.of_harmonics = matrix(7), v.of_monomials = matrix(9);
    v.first = at(11);
    v.inputs = reinterpret_cast<const TileInput*>(at(12)), v.input_paths = at(13), v.unread = at(14);
    v.n_paths = static_cast<int>(paths_.size()), v.n_items = static_cast<int>(items_.size());
    v.n_inputs = static_cast<int>(inputs_.size()), v.n_unread = static_cast<int>(unread_.size());
    v.n_monomials = n_monomials_, v.n_harmonics = n_harmonics_, v.n_g = static_cast<int>(g_.size());
    v.width = width, v.record = record();
    for (const TileInput& input : inputs_)
      v.most_in = std::max<int>(v.most_in, input.n_in), v.blocks = std::max<int>(v.blocks, input.blocks);
    return v;
  }
  int record() const { return (coefficients - 1) * width + 4; }

 private:
  std::vector<TilePath> paths_;
  std::vector<TileItem> items_;
  std::vector<int> g_;  // of each number of G its place among the plan's, or -1: 0
  std::vector<int32_t> first_, unread_, input_paths_;
  std::vector<TileInput> inputs_;
  std::vector<int64_t> list_;  // offsets
  int n_monomials_ = 0, n_harmonics_ = 0, most_degree_ = 0;

  // `slot`: the first of the coupling's, which wide_plan.h has in the order of b.
  bool add_coupling(const Plan<float>& p, const CouplingView& q, const WideSlot*& slot) {
    for (int b = 0; b < q.n_basis; ++b) {
      std::vector<std::vector<int>> factors;  // of each slot
      int row = -1;
      for (int n = 0; n < q.n_groups; ++n) {
        const int32_t* const group = q.groups + 4 * n;
        for (int s = group[0]; s < group[0] + group[1]; ++s) {
          if (q.slots[2 * s] != b) continue;
          const int32_t* const block = q.blocks + 2 * group[2];
          if (group[3] != 1 || (!factors.empty() && row != block[0])) return false;
          row = block[0];
          factors.push_back(ExactPlan::factors_of(p, block[1] + (s - group[0]) * q.in_stride));
        }
      }
      if (!add_path(p, q, *slot, row, factors)) return false;
      slot += factors.size();
    }
    return true;
  }

  bool add_path(const Plan<float>& p, const CouplingView& q, const WideSlot& slot, int row,
                const std::vector<std::vector<int>>& factors) {
    const int n_out = static_cast<int>(factors.size());
    int first = p.n_gathered, last = 0;
    for (const auto& of_slot : factors)
      for (int g : of_slot) first = std::min(first, p.g_from[g]), last = std::max(last, p.g_from[g]);
    const int n_in = last < first ? 0 : (last - first) / q.in_stride + 1, begin = static_cast<int>(g_.size());
    const auto is_size = [](int n) { return n == 1 || n == 3 || n == 5; };
    if (!is_size(n_in) || !is_size(n_out)) return false;
    bool diagonal = n_in == n_out;
    for (int o = 0; o < n_out; ++o)
      for (int g : factors[o]) {
        if ((p.g_from[g] - first) % q.in_stride != 0) return false;
        diagonal = diagonal && p.g_from[g] == first + o * q.in_stride;
      }
    g_.resize(begin + n_out * (diagonal ? 1 : n_in), -1);
    for (int o = 0; o < n_out; ++o)
      for (int g : factors[o]) g_[begin + (diagonal ? 0 : (p.g_from[g] - first) / q.in_stride * n_out) + o] = g;
    int of_record = -1;
    if (row != p.n_rows) {
      const int degree = ExactPlan::degree_of(p, p.row[p.row_start[row]]);
      if (degree < 0 || degree > kMostDegree) return false;
      most_degree_ = std::max(most_degree_, degree);
      of_record = degree * width;
    }
    if (of_record < 0 && n_in != n_out) return false;
    paths_.push_back({slot.at, slot.size, n_in, n_out, diagonal, q.n_in, first, q.in_stride, of_record, begin,
                      tile_shape(n_in, n_out, diagonal, of_record < 0), 0});
    return true;
  }

  // Whether no input is gathered twice.
  bool find_unread(const Plan<float>& p) {
    std::vector<int> places(p.in_size, 0);
    for (int k = 0; k < p.n_gathered; ++k)
      if (p.gathered_from[k] >= 0) ++places[p.gathered_from[k]];
    for (int i = 0; i < p.in_size; ++i)
      if (places[i] == 0) unread_.push_back(i);
    return std::all_of(places.begin(), places.end(), [](int n) { return n <= 1; });
  }

  // The paths' inputs, which lie apart or are the same components; of each, two blocks of channels at a time. Paths
  // that read the same row of hidden features are one warp's.
  void add_inputs() {
    std::vector<TilePath*> order;
    for (TilePath& path : paths_) order.push_back(&path);
    std::stable_sort(order.begin(), order.end(), [](auto* x, auto* y) { return x->from < y->from; });
    for (size_t begin = 0, end; begin < order.size(); begin = end) {
      const TilePath& path = *order[begin];
      int last = path.from;
      for (end = begin; end < order.size() && order[end]->from <= last; ++end)
        last = std::max(last, order[end]->from + (order[end]->n_in - 1) * path.in_stride);
      for (size_t k = begin; k < end; ++k) order[k]->component = (order[k]->from - path.from) / path.in_stride;
      const auto paths = by_warp({order.begin() + begin, order.begin() + end});
      for (int v = 0; v < path.channels; v += 8 * TileInput::kBlocks) {
        const int blocks = path.channels - v > 8 ? 2 : 1;
        inputs_.push_back({path.from, (last - path.from) / path.in_stride + 1, path.in_stride, v, blocks, {}});
        for (int w = 0; w < kWarps; ++w) {
          inputs_.back().first[w] = static_cast<int32_t>(input_paths_.size());
          for (const TilePath* of_warp : paths[w])
            input_paths_.push_back(static_cast<int32_t>(of_warp - paths_.data()));
        }
        inputs_.back().first[kWarps] = static_cast<int32_t>(input_paths_.size());
      }
    }
  }
  static int cost_of(const TilePath& path) { return path.diagonal ? 2 * path.n_out : (path.n_in + 1) * path.n_out; }
  // Row by row to the warp that has least to do, those that take longest first.
  static std::vector<std::vector<const TilePath*>> by_warp(const std::vector<const TilePath*>& paths) {
    std::map<int, std::vector<const TilePath*>> rows;
    for (const TilePath* path : paths) rows[path->row].push_back(path);
    const auto cost = [](const std::vector<const TilePath*>& of_row) {
      int sum = 0;
      for (const TilePath* path : of_row) sum += cost_of(*path);
      return sum;
    };
    std::vector<std::vector<const TilePath*>> found(kWarps), left;
    for (const auto& [row, of_row] : rows) left.push_back(of_row);
    std::stable_sort(left.begin(), left.end(), [&](auto& x, auto& y) { return cost(x) > cost(y); });
    for (const auto& of_row : left) {
      auto& least = *std::min_element(found.begin(), found.end(), [&](auto& x, auto& y) { return cost(x) < cost(y); });
      least.insert(least.end(), of_row.begin(), of_row.end());
    }
    return found;
  }

  void place(const Plan<float>& p) {
    n_monomials_ = p.used_monomials;
    n_harmonics_ = 0;
    for (int g : g_)
      for (int n = g < 0 ? 0 : p.g_first[g]; g >= 0 && n < p.g_first[g + 1]; ++n)
        n_harmonics_ = std::max(n_harmonics_, p.nz_harmonic[n] + 1);
    coefficients = (p.n_knots ? most_degree_ < 3 : ExactPlan::has_coefficients(p, 4)) ? 4 : 6;
    for (size_t k = 0; k < paths_.size(); ++k)
      for (int v = 0; v < paths_[k].channels; v += 16)
        for (int w = 0; w < (paths_[k].row < 0 ? 8 : width); w += 8)
          items_.push_back({static_cast<int32_t>(k), v, paths_[k].channels - v > 8 ? 2 : 1, w});
    const auto cost = [&](const TileItem& item) { return cost_of(paths_[item.path]) * (1 + item.blocks); };
    std::stable_sort(items_.begin(), items_.end(), [&](auto& x, auto& y) { return cost(x) > cost(y); });
    const int first_g = n_monomials_ + n_harmonics_;
    std::vector<TileTerm> harmonics, of_g;
    for (int n = 0; n < p.used_harmonics; ++n)
      harmonics.push_back({p.harmonic[2 * n + 1], n_monomials_ + p.harmonic[2 * n], p.harmonic_value[n], 0});
    for (int k = 0; k < static_cast<int>(g_.size()); ++k)
      for (int n = g_[k] < 0 ? 0 : p.g_first[g_[k]]; g_[k] >= 0 && n < p.g_first[g_[k] + 1]; ++n)
        of_g.push_back({p.nz_harmonic[n] < 0 ? 0 : n_monomials_ + p.nz_harmonic[n], first_g + k, p.nz_value[n], 0});
    add(paths_), add(items_);
    add(std::vector<int32_t>(p.monomial, p.monomial + 2 * n_monomials_));
    add_matrix(harmonics), add_matrix(of_g), add_matrix(transposed(of_g)), add_matrix(transposed(harmonics));
    add(first_), add(inputs_), add(input_paths_), add(unread_);
  }

  // Without the terms of the first monomial, 1, whose gradient is not wanted.
  static std::vector<TileTerm> transposed(const std::vector<TileTerm>& terms) {
    std::vector<TileTerm> found;
    for (const TileTerm& t : terms)
      if (t.from > 0) found.push_back({t.to, t.from, t.value, 0});
    return found;
  }
  void add_matrix(std::vector<TileTerm> terms) {
    std::stable_sort(terms.begin(), terms.end(), [](auto& x, auto& y) { return x.to < y.to; });
    std::vector<int32_t> first(1, 0);
    const size_t n = terms.size(), parts = TileMatrix::kParts;
    for (size_t k = 0; k < n; ++k) {
      terms[k].is_last = k + 1 == n || terms[k + 1].to != terms[k].to;
      while (terms[k].is_last && first.size() <= parts && (k + 1) * parts >= first.size() * n)
        first.push_back(static_cast<int32_t>(k + 1));
    }
    first.resize(parts + 1, static_cast<int32_t>(n));
    add(terms), add(first);
  }

  // All lists begin at whole quads.
  template <typename T>
  void add(const std::vector<T>& list) {
    numbers.resize((numbers.size() + 3) / 4 * 4);
    list_.push_back(static_cast<int64_t>(numbers.size()));
    const auto* const begin = reinterpret_cast<const int32_t*>(list.data());
    numbers.insert(numbers.end(), begin, begin + list.size() * sizeof(T) / sizeof(int32_t));
  }
};

}  // namespace implicit_steer
