// Whether a plan's layer is what the grid kernels (grid_forward.cuh) compute, and where they find its numbers. Fields
// are scalars and vectors; a hidden channel is a function on the sphere in 16 coefficients, which activations evaluate
// at pairs of opposite points.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "field_plan.h"

namespace implicit_steer {

class GridPlan : public FieldPlan {
 public:
  static constexpr int kMostEven = 8, kMostPairs = 16;
  static constexpr int kMostLayers = 8;  // of 8 KB each, beside 31 KB of θ, samples and a warp in the 99 KB of a block

  // Of a plan whose hidden layers are alike, with `width` channels (device_plan.h).
  void make(const Plan<float>& p, int width) {
    *this = GridPlan();
    constexpr int c = GridCoefficients::c;
    if (p.dim != 3 || p.c != c || p.d != c || p.n_even > kMostEven || p.layers[0].n_pairs > kMostPairs)
      return refuse("a grid other than that of 30 points of the sphere for l = 0 to 3");
    if (p.n_layers > kMostLayers) return refuse("too many layers");
    if (p.n_trivial > 1 || !p.attribute_identity || !read_constant(p) || !read_first_layer(p, width))
      return refuse("edge attributes that are no scalars");
    for (const CouplingView& q : p.coupling_storage)
      if (!read_coupling(p, q)) return refuse("fields other than scalars and vectors");
    if (!(are_zero(0, GridCoefficients::n_even_forms, p.n_even, c) &&
          are_zero(GridCoefficients::n_even_forms, GridCoefficients::n_forms, 0, p.n_even)))
      return refuse("fields of other parities than scalars and vectors");
    place(p, {kFields});
    const auto* const begin = reinterpret_cast<const int32_t*>(&grid_);
    numbers.insert(numbers.end(), begin, begin + sizeof grid_ / sizeof(int32_t));
  }

  FieldView view(const int32_t* begin) const {
    FieldView found = FieldPlan::view(begin);
    found.grid = reinterpret_cast<const GridCoefficients*>(begin + numbers.size() - sizeof grid_ / sizeof(int32_t));
    return found;
  }

 private:
  using Form = std::vector<float>;  // [c] of a hidden channel's coefficients
  GridCoefficients grid_{};
  bool has_vector_ = false, has_traceless_ = false;  // forms that some product has set

  // The even coefficient that is the same in all samples, which biases, attributes and batch norms' shifts go to.
  bool read_constant(const Plan<float>& p) {
    const LayerView<float>& layer = p.layers[0];
    const auto is_constant = [&](int k) {
      for (int row = 0; row < layer.n_pairs; ++row)
        if (!(std::abs(layer.pair_samples[row * p.c + k] - layer.pair_samples[k]) <= 1e-6f)) return false;
      return layer.pair_samples[k] != 0;
    };
    for (grid_.constant = 0; grid_.constant < p.n_even; ++grid_.constant)
      if (is_constant(grid_.constant)) return p.n_trivial == 0 || p.trivial[0] == grid_.constant;
    return false;
  }

  // Each coordinate of the position goes into one odd coefficient of every channel, attributes into the constant one.
  bool read_first_layer(const Plan<float>& p, int width) {
    const LayerView<float>& layer = p.layers[0];
    first_.assign(int64_t{p.n_inputs} * width, -1);
    std::fill(grid_.position, grid_.position + 3, -1);
    const bool fits = for_weights(layer, [&](int row, int column, int n_columns, int at) {
      const int k = row % p.c;
      if (column >= 3 ? k != grid_.constant : k < p.n_even || n_columns != 1) return false;
      if (column < 3 && grid_.position[column] != k) {
        if (grid_.position[column] >= 0) return false;
        grid_.position[column] = k;
      }
      first_[column * width + row / p.c] = at;
      return true;
    });
    const int32_t* const of = grid_.position;
    return fits && of[0] >= 0 && of[1] >= 0 && of[2] >= 0 && of[0] != of[1] && of[0] != of[2] && of[1] != of[2];
  }

  bool read_coupling(const Plan<float>& p, const CouplingView& q) {
    for (int b = 0; b < q.n_basis; ++b) {
      Product found{&q, b, -1, false, 0, {}, {}};
      std::vector<std::vector<Form>> forms;  // by output and input
      if (!read_product(p, found, forms) || !recognise(p, found, forms) || !add_fields(p, found)) return false;
      products_.push_back(found);
    }
    return true;
  }

  // Inputs, outputs and the forms that multiply each input in each output; constant ones stand in place 0.
  bool read_product(const Plan<float>& p, Product& product, std::vector<std::vector<Form>>& forms) const {
    const CouplingView& q = *product.q;
    struct Entry {
      int output, input, coefficient;
      float value;
    };
    std::vector<Entry> entries;
    for (int n = 0; n < q.n_groups; ++n) {
      const int32_t* const group = q.groups + 4 * n;
      for (int slot = group[0]; slot < group[0] + group[1]; ++slot) {
        if (q.slots[2 * slot] != product.b) continue;
        for (int block = group[2]; block < group[2] + group[3]; ++block) {
          const int row = q.blocks[2 * block], place = q.blocks[2 * block + 1] + (slot - group[0]) * q.in_stride;
          product.constant = row == p.n_rows;
          const int coefficient = product.constant ? 0 : p.row[p.row_start[row]] % p.c;
          for (int g : factors_of(p, place))
            for (int k = p.g_first[g]; k < p.g_first[g + 1]; ++k) {
              if (p.nz_harmonic[k] >= 0) return false;
              entries.push_back({q.slots[2 * slot + 1], p.g_from[g], coefficient, p.nz_value[k]});
            }
        }
      }
    }
    for (const Entry& entry : entries) add(product.inputs, entry.input), add(product.outputs, entry.output);
    std::sort(product.inputs.begin(), product.inputs.end()), std::sort(product.outputs.begin(), product.outputs.end());
    forms.assign(product.outputs.size(), std::vector<Form>(product.inputs.size(), Form(p.c, 0.0f)));
    for (const Entry& entry : entries)
      forms[add(product.outputs, entry.output)][add(product.inputs, entry.input)][entry.coefficient] += entry.value;
    return true;
  }

  // The product's path and its ratio to the forms of that path, which the first product of a path defines.
  bool recognise(const Plan<float>& p, Product& product, const std::vector<std::vector<Form>>& forms) {
    using namespace IST_ISA;
    const size_t n_in = product.inputs.size(), n_out = product.outputs.size();
    Form one(p.c, 0.0f);
    one[product.constant ? 0 : grid_.constant] = 1;
    if (!product.constant) std::copy(one.begin(), one.end(), grid_.forms[0]);
    const auto ratio_is = [&](const std::vector<Form>& theirs, const std::vector<Form>& ours) {
      float both = 0, own = 0;
      for (size_t n = 0; n < ours.size(); ++n)
        for (size_t k = 0; k < one.size(); ++k) both += theirs[n][k] * ours[n][k], own += ours[n][k] * ours[n][k];
      product.ratio = both / own;
      for (size_t n = 0; n < ours.size(); ++n)
        for (size_t k = 0; k < one.size(); ++k)
          if (!(std::abs(theirs[n][k] - product.ratio * ours[n][k]) <= 1e-5f)) return false;
      return true;
    };
    // The forms from `at` on are `theirs` unless they are set.
    const auto ratio_to = [&](bool& set, int at, const std::vector<Form>& theirs) {
      std::vector<Form> ours;
      for (const Form& form : theirs) {
        float* const to = grid_.forms[at++];
        if (!set) std::copy(form.begin(), form.end(), to);
        ours.emplace_back(to, to + p.c);
      }
      set = true;
      return ratio_is(theirs, ours);
    };
    if (n_in == 1 && n_out == 1) return product.path = kScalarScalar, ratio_is(forms[0], {one});
    if (n_in == 3 && n_out == 3 && ratio_is({forms[0][0], forms[1][1], forms[2][2]}, {one, one, one}))
      return product.path = kVectorVector, is_diagonal(forms);
    if (product.constant) return false;
    constexpr int of_vector = GridCoefficients::n_even_forms;
    if (n_in == 3 && n_out == 1) return product.path = kVectorScalar, ratio_to(has_vector_, of_vector, forms[0]);
    if (n_in == 1 && n_out == 3)
      return product.path = kScalarVector, ratio_to(has_vector_, of_vector, {forms[0][0], forms[1][0], forms[2][0]});
    if (n_in != 3 || n_out != 3 || !is_symmetric(forms)) return false;
    product.path = kTraceless;
    return ratio_to(has_traceless_, 1, {forms[0][0], forms[1][1], forms[2][2], forms[0][1], forms[0][2], forms[1][2]});
  }

  static bool is_diagonal(const std::vector<std::vector<Form>>& forms) {
    const auto is_zero = [](const Form& form) {
      return std::all_of(form.begin(), form.end(), [](float x) { return x == 0; });
    };
    for (size_t o = 0; o < forms.size(); ++o)
      for (size_t i = 0; i < forms.size(); ++i)
        if (o != i && !is_zero(forms[o][i])) return false;
    return true;
  }
  static bool is_symmetric(const std::vector<std::vector<Form>>& forms) {
    for (size_t o = 0; o < forms.size(); ++o)
      for (size_t i = 0; i < o; ++i)
        for (size_t k = 0; k < forms[o][i].size(); ++k)
          if (!(std::abs(forms[o][i][k] - forms[i][o][k]) <= 1e-5f)) return false;
    return true;
  }

  // Whether forms n0 .. n1 - 1 read none of the coefficients k0 .. k1 - 1.
  bool are_zero(int n0, int n1, int k0, int k1) const {
    for (int n = n0; n < n1; ++n)
      for (int k = k0; k < k1; ++k)
        if (grid_.forms[n][k] != 0) return false;
    return true;
  }
};

}  // namespace implicit_steer
