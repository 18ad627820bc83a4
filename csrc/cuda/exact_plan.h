// Whether a plan's layer is what the exact kernels compute, and where they find its numbers. Fields are scalars and
// vectors, the frame is zonal, a channel has four coefficients or fewer.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "field_plan.h"

namespace implicit_steer {

class ExactPlan : public FieldPlan {
 public:
  static constexpr int kCoefficients = 4, kEven = 2;
  using FieldPlan::factors_of;
  int width = 0;  // hidden channels

  // Of a plan with a zonal frame and a table, or hidden layers that are alike, with so many channels (device_plan.h).
  void make(const Plan<float>& p, int channels) {
    *this = ExactPlan();
    width = channels;
    if (!p.n_knots) {
      if (!has_coefficients(p, kCoefficients)) return refuse("hidden features of l > 3");
      if (!has_scalar_inputs(p) || !read_first_layer(p, width, first_))
        return refuse("edge attributes that are no scalars");
    }
    for (const CouplingView& q : p.coupling_storage)
      if (!read_coupling(p, q)) return refuse("fields other than scalars and vectors");
    if (!p.n_knots && cross && width > 8) return refuse("16 hidden channels with the product u x x");
    if (width > 8)
      place(p, {kFields});
    else
      place(p, {kFields, kManyFields});
  }

  // Whether kernels for c coefficients of each channel, half of them of even degrees, have room for those of p.
  static bool has_coefficients(const Plan<float>& p, int c) { return p.n_even <= c / 2 && p.c - p.n_even <= c / 2; }

  // Whether p's hidden layers, which have zonal frames and so many channels, get the radius and scalar attributes. The
  // radius is a vector in the frame: it goes into coefficients of degree 1, the scalars into those of 0. `first`: of
  // FieldView.
  static bool has_scalar_inputs(const Plan<float>& p) {
    return p.order_zero == 1 && p.regular && p.n_trivial <= 1 && p.attribute_identity;
  }
  static bool read_first_layer(const Plan<float>& p, int width, std::vector<int32_t>& first) {
    first.assign(int64_t{p.n_inputs} * width, -1);
    return for_weights(p.layers[0], [&](int row, int column, int, int at) {
      if (row % p.c != (column == 0 ? p.n_even : 0)) return false;
      first[column * width + row / p.c] = at;
      return true;
    });
  }

  // Of a coefficient; -1 where the kernels expect none at its place: of hidden layers the even ones come first, and the
  // highest one is not read; of a table degree l is at place l.
  static int degree_of(const Plan<float>& p, int coefficient) {
    if (!p.n_knots) {
      const int degree = coefficient < p.n_even ? 2 * coefficient : 2 * (coefficient - p.n_even) + 1;
      return degree < p.c - 1 ? degree : -1;
    }
    const int m = static_cast<int>(std::find(p.coordinate, p.coordinate + p.d, coefficient) - p.coordinate);
    return m < p.d && p.degree[m] == coefficient ? coefficient : -1;
  }

 private:
  bool read_coupling(const Plan<float>& p, const CouplingView& q) {
    for (int b = 0; b < q.n_basis; ++b) {
      Product found{&q, b, -1, false, 0, {}, {}};
      std::vector<int> places;  // of the product of every output
      int degree = -1;
      for (int n = 0; n < q.n_groups; ++n) {
        const int32_t* const group = q.groups + 4 * n;
        for (int slot = group[0]; slot < group[0] + group[1]; ++slot) {
          if (q.slots[2 * slot] != b) continue;
          const int32_t* const block = q.blocks + 2 * group[2];
          if (group[3] != 1) return false;
          found.constant = block[0] == p.n_rows;
          degree = found.constant ? 0 : degree_of(p, p.row[p.row_start[block[0]]]);
          found.outputs.push_back(q.slots[2 * slot + 1]), places.push_back(block[1] + (slot - group[0]) * q.in_stride);
          for (int g : factors_of(p, places.back())) add(found.inputs, p.g_from[g]);
        }
      }
      std::sort(found.inputs.begin(), found.inputs.end());
      found.path = path_of(found.inputs.size(), found.outputs.size(), degree);
      if (found.path < 0 || !compare(p, found, places)) return false;
      cross = cross || found.path == IST_ISA::kCross;
      if (!add_fields(p, found)) return false;
      products_.push_back(found);
    }
    return true;
  }

  static int path_of(size_t n_inputs, size_t n_outputs, int degree) {
    using namespace IST_ISA;
    if (n_inputs == 1 && n_outputs == 1 && degree == 0) return kScalarScalar;
    if (n_inputs == 3 && n_outputs == 1 && degree == 1) return kVectorScalar;
    if (n_inputs == 1 && n_outputs == 3 && degree == 1) return kScalarVector;
    if (n_inputs != 3 || n_outputs != 3) return -1;
    return degree == 0 ? kVectorVector : degree == 1 ? kCross : degree == 2 ? kTraceless : -1;
  }

  // Harmonics [d] in direction u, as in edge_frame.h.
  static std::vector<float> harmonics(const Plan<float>& p, const float (&u)[3]) {
    std::vector<float> monomial(p.n_monomials, 1), result(p.d, 0);
    for (int j = 1; j < p.n_monomials; ++j) monomial[j] = monomial[p.monomial[2 * j]] * u[p.monomial[2 * j + 1]];
    for (int j = 0; j < p.n_harmonics; ++j)
      result[p.harmonic[2 * j]] += p.harmonic_value[j] * monomial[p.harmonic[2 * j + 1]];
    return result;
  }

  // Whether the plan's product is its path's formula times a number, which becomes the ratio: at some f and u.
  static bool compare(const Plan<float>& p, Product& product, const std::vector<int>& places) {
    using Slots = IST_ISA::ExactSlots<true>;
    constexpr float fields[3][4] = {{0.9f, 0.3f, -0.7f, 0.5f}, {-0.4f, 0.8f, 0.6f, 0.2f}, {0.7f, -0.2f, 0.4f, 1.1f}};
    constexpr float directions[3][3] = {{0.48f, 0.6f, 0.64f}, {-0.8f, 0.0f, 0.6f}, {0.36f, -0.8f, 0.48f}};
    std::vector<float> theirs, ours;
    for (int n = 0; n < 3; ++n) {
      float slots[Slots::count];
      Slots::evaluate(fields[n], directions[n], slots);
      const std::vector<float> y = harmonics(p, directions[n]);
      for (size_t o = 0; o < places.size(); ++o) {
        float sum = 0;
        for (int g : factors_of(p, places[o])) {
          const auto at = std::find(product.inputs.begin(), product.inputs.end(), p.g_from[g]);
          const float f = fields[n][product.inputs.size() == 1 ? 0 : 1 + (at - product.inputs.begin())];
          for (int k = p.g_first[g]; k < p.g_first[g + 1]; ++k)
            sum += f * p.nz_value[k] * (p.nz_harmonic[k] < 0 ? 1 : y[p.nz_harmonic[k]]);
        }
        theirs.push_back(sum);
        for (int slot = 0, component = 0; slot < Slots::count; ++slot)
          if (Slots::path(slot) == product.path && component++ == static_cast<int>(o)) ours.push_back(slots[slot]);
      }
    }
    float both = 0, own = 0;
    for (size_t k = 0; k < ours.size(); ++k) both += theirs[k] * ours[k], own += ours[k] * ours[k];
    product.ratio = both / own;
    for (size_t k = 0; k < ours.size(); ++k)
      if (!(std::abs(theirs[k] - product.ratio * ours[k]) <= 1e-5f)) return false;
    return true;
  }
};

}  // namespace implicit_steer
