// Whether a plan's layer is what the exact kernels compute, and where they find its numbers. Fields are scalars and
// vectors, the frame is zonal, a channel has four coefficients.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "../plan.h"
#include "exact_slots.cuh"

namespace implicit_steer {

// W numbers of the packed weights from `at` on, times `ratio`; at -1: zeros.
struct ExactWeight {
  int32_t at;
  float ratio;
};

// The plan's numbers as the kernels read them, for V fields of inputs and of outputs.
struct ExactView {
  const ExactWeight* theta;        // [paths, V, V] of every path (exact_slots.cuh), output and input field
  const ExactWeight* constant;     // [2, V, V] of the constant hidden feature: scalars, vectors
  const int32_t* first;            // [n_inputs, W] place of the first layer's weight of every input and channel, or -1
  const int32_t *scalar, *vector;  // [V] number of the field's scalar and of its vector's x
  const int32_t* out;              // [V, 4] number of the output (scalar, x, y, z), or -1
  int n_scalars, n_vectors;
  bool quads;  // a field is four numbers of the input from a multiple of four on
};

class ExactPlan {
 public:
  static constexpr int kCoefficients = 4, kEven = 2, kMostFields = 8;
  static constexpr int kMostLayers = 8;  // of which a backward pass keeps 8 KB each for a warp, in 99 KB of a block
  int fields = 0;                        // V; 0: there is no exact kernel for the plan
  bool cross = false;
  bool reads_all = false;  // of the inputs, every one: the backward kernel writes the gradients of those that it reads
  std::vector<int32_t> numbers;  // what ExactView points to

  // Of a plan whose hidden layers are those of Specialised kernels of `width` channels (device_plan.h).
  void make(const Plan<float>& p, int width) {
    *this = ExactPlan();
    width_ = width;
    if (p.c != kCoefficients || p.n_even != kEven || p.order_zero != 1 || !p.regular || p.n_trivial > 1 ||
        p.n_layers > kMostLayers)
      return;
    if (!*p.attribute_identity || !read_first_layer(p)) return;
    for (const CouplingView& q : p.coupling_storage)
      if (!read_coupling(p, q)) return;
    const size_t most = std::max({scalars_.size(), vectors_.size(), out_scalars_.size(), out_vectors_.size()});
    const size_t n_out = out_scalars_.size() + 3 * out_vectors_.size();
    if (p.in_size < 3 || most > kMostFields || n_out != static_cast<size_t>(p.out_size)) return;
    reads_all = scalars_.size() + 3 * vectors_.size() == static_cast<size_t>(p.in_size);
    if (place_all(p, kMostFields)) fields = kMostFields;
  }

  ExactView view(const int32_t* begin) const {
    const int square = fields * fields, paths = n_paths();
    const auto* const weights = reinterpret_cast<const ExactWeight*>(begin);
    const int32_t* const lists = begin + 2 * (paths + 2) * square;
    const int32_t* const of_inputs = lists + static_cast<int64_t>(first_.size());
    return {weights,
            weights + paths * square,
            lists,
            of_inputs,
            of_inputs + fields,
            of_inputs + 2 * fields,
            static_cast<int>(scalars_.size()),
            static_cast<int>(vectors_.size()),
            quads_};
  }

 private:
  // One product of a plan: θ of coupling q and basis element b, and which path it is, or of the constant one.
  struct Product {
    const CouplingView* q;
    int b, path;
    bool constant;
    float ratio;                       // to the path's formula
    std::vector<int> inputs, outputs;  // places of the components among the gathered; numbers o of the outputs'
  };
  int width_ = 0;
  bool quads_ = false;
  std::vector<int32_t> first_;
  std::vector<int> scalars_, vectors_, out_scalars_, out_vectors_;  // numbers of fields' first components
  std::vector<Product> products_;

  int n_paths() const { return cross ? IST_ISA::ExactSlots<true>::paths : IST_ISA::ExactSlots<false>::paths; }

  // The radius is a vector in the frame: it goes into coefficients of degree 1, the scalar attributes into those of 0.
  bool read_first_layer(const Plan<float>& p) {
    const LayerView<float>& layer = p.layers[0];
    first_.assign(int64_t{p.n_inputs} * width_, -1);
    const int32_t* group = layer.groups;
    for (int n = 0, at = layer.weight; n < layer.n_groups; ++n) {
      const int n_rows = group[0], n_columns = group[1];
      const int32_t *rows = group + 2, *columns = rows + n_rows;
      for (int r = 0; r < n_rows; ++r)
        for (int i = 0; i < n_columns; ++i, ++at) {
          if (rows[r] % p.c != (columns[i] == 0 ? kEven : 0)) return false;
          first_[columns[i] * width_ + rows[r] / p.c] = at;
        }
      group = columns + n_columns;
    }
    return true;
  }

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
          degree = found.constant ? 0 : degree_of(p.row[p.row_start[block[0]]]);
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

  static int degree_of(int coefficient) {
    return coefficient == 0 ? 0 : coefficient == kEven ? 1 : coefficient == 1 ? 2 : -1;
  }

  static int path_of(size_t n_inputs, size_t n_outputs, int degree) {
    using namespace IST_ISA;
    if (n_inputs == 1 && n_outputs == 1 && degree == 0) return kScalarScalar;
    if (n_inputs == 3 && n_outputs == 1 && degree == 1) return kVectorScalar;
    if (n_inputs == 1 && n_outputs == 3 && degree == 1) return kScalarVector;
    if (n_inputs != 3 || n_outputs != 3) return -1;
    return degree == 0 ? kVectorVector : degree == 1 ? kCross : degree == 2 ? kTraceless : -1;
  }

  static std::vector<int> factors_of(const Plan<float>& p, int place) {
    std::vector<int> found;
    for (int n = 0; n < p.n_products; ++n)
      if (p.products[4 * n] == place)
        for (int g = p.products[4 * n + 2]; g < p.products[4 * n + 3]; ++g) found.push_back(g);
    return found;
  }

  // Adds x unless it is there; its number.
  static int add(std::vector<int>& list, int x) {
    const auto at = std::find(list.begin(), list.end(), x);
    const int number = static_cast<int>(at - list.begin());
    if (at == list.end()) list.push_back(x);
    return number;
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

  // The number of the output at a place among the gathered ones.
  static int output_at(const Plan<float>& p, int place) {
    return static_cast<int>(std::find(p.place, p.place + p.out_size, place) - p.place);
  }
  static int output_of(const Plan<float>& p, const Product& product, int u, int component) {
    return output_at(p, product.q->out_at + product.outputs[component] * product.q->out_stride + u);
  }

  // Registers the product's input and output fields; false where a vector's components are not side by side.
  bool add_fields(const Plan<float>& p, const Product& product) {
    for (int v = 0; v < product.q->n_in; ++v) {
      const int number = p.input[product.inputs[0] + v];
      for (size_t k = 0; k < product.inputs.size(); ++k)
        if (p.input[product.inputs[k] + v] != number + static_cast<int>(k)) return false;
      add(product.inputs.size() == 1 ? scalars_ : vectors_, number);
    }
    for (int u = 0; u < product.q->n_out; ++u) {
      const int number = output_of(p, product, u, 0);
      for (size_t o = 0; o < product.outputs.size(); ++o)
        if (output_of(p, product, u, static_cast<int>(o)) != number + static_cast<int>(o)) return false;
      add(product.outputs.size() == 1 ? out_scalars_ : out_vectors_, number);
    }
    return true;
  }

  // Writes all lists for so many fields; false where two products would share a weight's place.
  bool place_all(const Plan<float>& p, int n) {
    const int square = n * n;
    std::vector<ExactWeight> weights((n_paths() + 2) * square, ExactWeight{-1, 0});
    for (const Product& product : products_) {
      const CouplingView& q = *product.q;
      auto& in = product.inputs.size() == 1 ? scalars_ : vectors_;
      auto& out = product.outputs.size() == 1 ? out_scalars_ : out_vectors_;
      for (int u = 0; u < q.n_out; ++u)
        for (int v = 0; v < q.n_in; ++v) {
          if (q.depthwise && u != v) continue;
          const int path = product.constant ? n_paths() + product.path : product.path;
          const int to = add(out, output_of(p, product, u, 0)), from = add(in, p.input[product.inputs[0] + v]);
          ExactWeight& weight = weights[path * square + to * n + from];
          if (weight.at >= 0) return false;
          const int64_t row = int64_t{product.b} * q.theta_rows + (q.depthwise ? 0 : u);
          weight = {static_cast<int32_t>(q.theta + row * q.theta_size + v * q.hidden_stride), product.ratio};
        }
    }
    numbers.resize(2 * weights.size());
    std::memcpy(numbers.data(), weights.data(), weights.size() * sizeof(ExactWeight));
    numbers.insert(numbers.end(), first_.begin(), first_.end());
    place_fields(p, n);
    return true;
  }

  // Fields that are not there read some input; nothing multiplies it but zeros.
  void place_fields(const Plan<float>& p, int n) {
    const auto padded = [&](std::vector<int> list) {
      list.resize(n, list.empty() ? 0 : list[0]);
      return list;
    };
    const std::vector<int> scalars = padded(scalars_), vectors = padded(vectors_);
    quads_ = p.in_size % 4 == 0 && scalars_.size() == vectors_.size();
    for (int v = 0; v < n; ++v) quads_ = quads_ && scalars[v] % 4 == 0 && vectors[v] == scalars[v] + 1;
    std::vector<int32_t> out(4 * n, -1);
    for (size_t u = 0; u < out_scalars_.size(); ++u) out[4 * u] = out_scalars_[u];
    for (size_t u = 0; u < out_vectors_.size(); ++u)
      for (int k = 0; k < 3; ++k) out[4 * u + 1 + k] = out_vectors_[u] + k;
    numbers.insert(numbers.end(), scalars.begin(), scalars.end());
    numbers.insert(numbers.end(), vectors.begin(), vectors.end());
    numbers.insert(numbers.end(), out.begin(), out.end());
  }
};

}  // namespace implicit_steer
