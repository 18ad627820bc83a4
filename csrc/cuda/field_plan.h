// What the kernels of exact_forward.cuh and grid_forward.cuh need of a plan's last layer, whose fields are scalars and
// vectors: which products of exact_slots.cuh its intertwiners are, and where their numbers are.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "../plan.h"
#include "exact_slots.cuh"

namespace implicit_steer {

// W numbers of the packed weights from `at` on, times `ratio`; at -1: zeros.
struct FieldWeight {
  int32_t at;
  float ratio;
};

// Of the grid kernels: what of a hidden channel's coefficients [c], in the plan's order, has which meaning.
struct GridCoefficients {
  static constexpr int c = 16, n_even_forms = 7, n_forms = 10;
  int32_t constant;         // the one that is the same in all samples
  int32_t position[3];      // that the first layer adds x, y and z to
  float forms[n_forms][c];  // what a coupling reads: h, Q (xx, yy, zz, xy, xz, yz), then, of odd ones, d (x, y, z)
};

// The plan's numbers as the kernels read them, for V fields of inputs and of outputs.
struct FieldView {
  const FieldWeight* theta;        // [paths, V, V] of every path (exact_slots.cuh), output and input field
  const FieldWeight* constant;     // [2, V, V] of the constant hidden feature: scalars, vectors
  const int32_t* first;            // [n_inputs, W] place of the first layer's weight of every input and channel, or -1
  const int32_t *scalar, *vector;  // [V] number of the field's scalar and of its vector's x
  const int32_t* out;              // [V, 4] number of the output (scalar, x, y, z), or -1
  int n_scalars, n_vectors;
  bool quads;                    // a field is four numbers of the input from a multiple of four on
  const GridCoefficients* grid;  // of the grid kernels
};

class FieldPlan {
 public:
  static constexpr int kFields = 8, kManyFields = 16;  // that there are kernels for
  int fields = 0;                                      // V; 0: there is no such kernel for the plan
  bool cross = false;
  bool reads_all = false;    // of the inputs, every one: backward kernels write the gradients of those that they read
  const char* why_not = "";  // where there is none
  std::vector<int32_t> numbers;  // what FieldView points to

  FieldView view(const int32_t* begin) const {
    const int square = fields * fields, paths = n_paths();
    const auto* const weights = reinterpret_cast<const FieldWeight*>(begin);
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
            quads_,
            nullptr};
  }

 protected:
  // One product of a plan: θ of coupling q and basis element b, and which path it is, or of the constant one.
  struct Product {
    const CouplingView* q;
    int b, path;
    bool constant;
    float ratio;                       // to the path's formula
    std::vector<int> inputs, outputs;  // places of the components among the gathered; numbers o of the outputs'
  };
  bool quads_ = false;
  std::vector<int32_t> first_;
  std::vector<int> scalars_, vectors_, out_scalars_, out_vectors_;  // numbers of fields' first components
  std::vector<Product> products_;

  int n_paths() const { return cross ? IST_ISA::ExactSlots<true>::paths : IST_ISA::ExactSlots<false>::paths; }

  // Writes all lists for the first of the numbers of fields that is enough, if one is.
  void place(const Plan<float>& p, std::initializer_list<size_t> numbers_of_fields) {
    const size_t most = std::max({scalars_.size(), vectors_.size(), out_scalars_.size(), out_vectors_.size()});
    reads_all = scalars_.size() + 3 * vectors_.size() == static_cast<size_t>(p.in_size);
    const size_t n_out = out_scalars_.size() + 3 * out_vectors_.size();
    const auto* const enough =
        std::find_if(numbers_of_fields.begin(), numbers_of_fields.end(), [&](size_t n) { return n >= most; });
    if (p.in_size < 3) return refuse("fewer than 3 inputs");
    if (n_out != static_cast<size_t>(p.out_size)) return refuse("an output that no product adds to");
    if (enough == numbers_of_fields.end()) return refuse("too many scalars or vectors");
    const int n = static_cast<int>(*enough);
    if (!place_all(p, n)) return refuse("products that share a weight");
    fields = n;
  }
  void refuse(const char* reason) { why_not = reason; }

  // Whether f(row, column, columns of its group, place among the packed weights) holds for all weights of a layer.
  template <typename F>
  static bool for_weights(const LayerView<float>& layer, F f) {
    const int32_t* group = layer.groups;
    for (int n = 0, at = layer.weight; n < layer.n_groups; ++n) {
      const int n_rows = group[0], n_columns = group[1];
      const int32_t *rows = group + 2, *columns = rows + n_rows;
      for (int r = 0; r < n_rows; ++r)
        for (int i = 0; i < n_columns; ++i, ++at)
          if (!f(rows[r], columns[i], n_columns, at)) return false;
      group = columns + n_columns;
    }
    return true;
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

  // The number of the output at a place among the gathered ones.
  static int output_at(const Plan<float>& p, int place) {
    return static_cast<int>(std::find(p.mixed_place, p.mixed_place + p.out_size, place) - p.mixed_place);
  }
  static int output_of(const Plan<float>& p, const Product& product, int u, int component) {
    return output_at(p, product.q->out_at + product.outputs[component] * product.q->out_stride + u);
  }

  // Registers the product's input and output fields; false where a vector's components are not side by side.
  bool add_fields(const Plan<float>& p, const Product& product) {
    for (int v = 0; v < product.q->n_in; ++v) {
      const int number = p.gathered_from[product.inputs[0] + v];
      for (size_t k = 0; k < product.inputs.size(); ++k)
        if (p.gathered_from[product.inputs[k] + v] != number + static_cast<int>(k)) return false;
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
    std::vector<FieldWeight> weights((n_paths() + 2) * square, FieldWeight{-1, 0});
    for (const Product& product : products_) {
      const CouplingView& q = *product.q;
      auto& in = product.inputs.size() == 1 ? scalars_ : vectors_;
      auto& out = product.outputs.size() == 1 ? out_scalars_ : out_vectors_;
      for (int u = 0; u < q.n_out; ++u)
        for (int v = 0; v < q.n_in; ++v) {
          if (q.depthwise && u != v) continue;
          const int path = product.constant ? n_paths() + product.path : product.path;
          const int to = add(out, output_of(p, product, u, 0)), from = add(in, p.gathered_from[product.inputs[0] + v]);
          FieldWeight& weight = weights[path * square + to * n + from];
          if (weight.at >= 0) return false;
          const int64_t row = int64_t{product.b} * q.theta_rows + (q.depthwise ? 0 : u);
          weight = {static_cast<int32_t>(q.theta + row * q.theta_size + v * q.hidden_stride), product.ratio};
        }
    }
    numbers.resize(2 * weights.size());
    std::memcpy(numbers.data(), weights.data(), weights.size() * sizeof(FieldWeight));
    numbers.insert(numbers.end(), first_.begin(), first_.end());
    place_fields(p, n);
    return true;
  }

  // Fields that are not there read some input; nothing multiplies it but zeros.
  void place_fields(const Plan<float>& p, int n) {
    const auto filled = [&](std::vector<int> list) {
      list.resize(n, list.empty() ? 0 : list[0]);
      return list;
    };
    const std::vector<int> scalars = filled(scalars_), vectors = filled(vectors_);
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
