// A table in place of the kernel MLP (exact_mlp.cuh): one thread has an edge's coefficients c_l = u^l f_l(u) of every
// hidden channel, f_l = Σ_j B_j b_j from four rows of the splines' coefficients (plan/table.py). They multiply the
// harmonics of the direction, as those of the MLP do, and need no other formula near the origin.
#pragma once

#include "../spline_pieces.h"
#include "exact_mlp.cuh"

namespace implicit_steer::IST_ISA {

template <typename N>
struct ExactTable;

// What an exact kernel is compiled for, as Exact.
template <int kWidth, int kFields, bool kWithCross>
struct Tabulated {
  using Number = float;
  using Slots = ExactSlots<kWithCross>;
  using Mlp = ExactTable<float>;
  static constexpr int c = ExactPlan::kCoefficients, even = ExactPlan::kEven, width = kWidth, fields = kFields;
  static constexpr bool large = kFields > 8 || kWidth > 8;
  static_assert(kWidth % 8 == 0);  // a row has no padding
};

template <typename N>
struct ExactTable {
  static constexpr bool is_table = true;
  const PlanView<float>* p;
  const N* packed;  // whose part from table_at on is [types · splines per type, n_read, W]: n_read by degree
  template <int kValue>
  struct Same {
    __device__ __forceinline__ N operator[](int) const { return constant_number<N>(kValue); }
  };
  Same<1> scale;  // of θ: there is no batch norm
  Same<0> shift;

  template <typename S>
  static constexpr int size(const PlanView<float>&) {
    return 0;
  }
  static __device__ __forceinline__ int trivial(const FieldView&) { return 0; }

  template <typename S>
  __device__ __forceinline__ void place(N*, const PlanView<float>& plan) {
    p = &plan;
  }
  template <typename S>
  __device__ __forceinline__ void copy(const PlanView<float>&, const FieldView&, const N* weights) {
    packed = weights;
  }

  // An edge in the table: where the rows that count begin, u, its derivative by the radius.
  struct Cell {
    int first;
    N u, per_radius;
    SplinePieces<N> pieces;
  };
  template <typename S, typename Attribute>
  __device__ __forceinline__ Cell cell(N radius, Attribute attribute) const {
    const float per_square = p->per_length * p->per_length;
    const N squared = radius * radius;
    Cell here;
    N scale = constant_number<N>(p->per_length);  // u / radius, as compress() of edge_frame.h
    here.per_radius = scale;
    if (!p->bounded) {
      const N inverse = 1 / (1 + squared * per_square);
      scale *= lane_sqrt(lane_sqrt(inverse));
      here.per_radius = scale * (1 - 0.5f * squared * per_square * inverse);
    }
    here.u = radius * scale;
    const N position = spline_position(*p, here.u);
    const int at = spline_cell(*p, value_of(position)), type = p->n_attr ? spline_type(*p, value_of(attribute(0))) : 0;
    here.first = (type * static_cast<int>(splines_per_type(*p)) + at) * row_size<S>();
    here.pieces = spline_pieces(*p, here.u, position, static_cast<float>(at));
    return here;
  }
  template <typename S>
  __device__ __forceinline__ int row_size() const {
    return p->n_read * S::width;
  }
  // u^l, l <= 4, and its derivative
  static __device__ __forceinline__ N power(N u, int l) {
    const N square = u * u;
    return l == 0 ? constant_number<N>(1) : l == 1 ? u : (l == 2 ? square : l == 3 ? u * square : square * square);
  }
  static __device__ __forceinline__ N power_slope(N u, int l) {
    return l == 0 ? N{} : static_cast<float>(l) * power(u, l - 1);
  }

  // Σ factor times the row's number, of four channels from w on and the coefficients of degree l.
  template <typename S>
  __device__ __forceinline__ Neighbours<N, 4> blend(const N (&factors)[4], int first, int l, int w) const {
    Neighbours<N, 4> sum{};
    if (l >= p->n_read) return sum;
    const N* const rows = opaque(packed) + p->table_at;  // else loads ahead of their use spill registers
#pragma unroll
    for (int j = 0; j < 4; ++j)
      add_multiple(sum, factors[j], neighbours<4>(rows + first + j * row_size<S>() + l * S::width + w));
    return sum;
  }

  // As ExactMlp::evaluate; there are no layers to keep.
  template <typename S, typename Attribute, typename Keep>
  __device__ __forceinline__ void evaluate(N radius, Attribute attribute, Keep, N (&z)[S::width][S::c]) const {
    const Cell here = cell<S>(radius, attribute);
#pragma unroll
    for (int l = 0; l < S::Slots::degrees; ++l) {
      const N scaled = power(here.u, l);
#pragma unroll
      for (int w = 0; w < S::width; w += 4) {
        const auto four = blend<S>(here.pieces.weights, here.first, l, w);
#pragma unroll
        for (int j = 0; j < 4; ++j) z[w + j][place_of_degree<S>(l)] = scaled * four.at[j];
      }
    }
  }
};

}  // namespace implicit_steer::IST_ISA
