// A plan and the arguments of one call as plain views. The numbers lie in two flat arrays that ops/native/arrays.py
// writes and plan_view() reads in the same order. No torch, nothing that depends on the instruction set.
#pragma once

#include <cstdint>
#include <vector>

// Functions that GPU kernels call, too.
#if defined(__CUDACC__)
#define IST_HOST_DEVICE __host__ __device__
#else
#define IST_HOST_DEVICE
#endif

namespace implicit_steer {

enum FrameKind : int32_t { kNone = 0, kZonal = 1, kPlanar = 2 };
// Rows of channels in the packed weights, and in what is multiplied with them, are padded to whole multiples of this.
constexpr int64_t kChannels = 8;
// Numbers of a row of n channels.
__attribute__((always_inline)) constexpr int64_t padded(int64_t n) {
  return (n + kChannels - 1) / kChannels * kChannels;
}

enum Function : int32_t { kElu = 0, kRelu = 1, kSilu = 2, kGelu = 3, kTanh = 4 };

// One hidden layer: z = W y + b, then per channel y = inverse · φ(samples · z), then, with batch norms, scale · y +
// shift.
//
// Pairs of samples differ only in the sign of the odd coefficients, in A as in A⁻. Of each pair one is kept: with E the
// even and O the odd part of its row's sum, the two samples are E + O and E − O. Samples without a partner follow. The
// even coefficients of a channel come first.
template <typename R>
struct LayerView {
  int32_t in, out;
  int32_t n_samples;               // S
  int32_t weight, bias;            // positions in the packed weights
  int32_t affine;                  // position of the batch norm's scale [W] and shift [W, n_trivial], or -1
  int32_t norm_weight, norm_bias;  // positions of the batch norm's parameters in the unpacked vector, or -1
  int32_t n_values;                // structural nonzeros of W
  int32_t n_pairs;
  int32_t in_even, in_odd;       // coefficients that z can have: the first of the even, the first of the odd ones
  int32_t out_even, out_odd;     // coefficients of the activation that anything reads
  int32_t n_groups;              // rows that share their columns; W is packed group by group, [row][column]
  const int32_t* groups;         // per group: n_rows, n_columns, rows, columns; every row is in one
  const R *samples, *inverse_t;  // [S, c] all of them, for edges near the origin
  const R *pair_samples, *pair_inverse;  // [n_pairs + singles, c]
};

// U x V x W fields that share intertwiners. Hidden features enter by rows: one coefficient of all W channels, or the
// constant one. A product is t[v] = Σ_g f[i_g, v] G_g, where G_g is a constant or Σ value · Y[m]. Slots (b, o) that
// read the same rows form a group; a block is one of these rows, with the products that it meets in the group's slots:
//   T[slot, w, v] += h[row, w] t[slot, v]
struct CouplingView {
  int32_t n_out, n_in, n_hidden, n_basis;  // U, V, W, n_b
  int32_t constant;                        // reads the constant one: W = 1
  int32_t n_slots, n_groups, n_blocks;
  int32_t theta, theta_forward;  // positions in the packed weights of θ [b][u][v, w] and [b][v][w][u]
  int32_t out_at;                // position of component 0 of the U outputs
  const int32_t* slots;          // [n_slots, 2] b, o
  const int32_t* groups;         // [n_groups, 4] first slot, slots, first block, blocks
  const int32_t* blocks;         // [n_blocks, 2] row (n_rows: the constant one), position of the products
  int32_t hidden_stride, in_stride, out_stride;  // rows of channels: whole kChannels; of the constant one: 1
  int64_t theta_size;                            // of θ[b, u], as [v, w]
  int64_t at_sums, at_slots;                     // positions in a worker's buffers; set by place_couplings()
};

// Numbers of T over all couplings: group by group [w][slot, v], and slot by slot [v][w]; rows are padded.
struct CouplingSizes {
  int64_t sums = 0, slots = 0;
};

template <typename R>
struct PlanView {
  int32_t kind, dim, n_attr, regular, n_inputs, in_size, out_size, n_layers, d, c, channels, order_zero, function;
  int32_t n_even;  // coefficients of a channel that come first, see LayerView
  int32_t n_couplings, n_rows, n_g, n_weights, n_grad, has_cutoff, shell, hidden_flat, has_norms, n_trivial,
      n_parameters;
  // Inputs and outputs are gathered by field type, component by component: all channels of one side by side, padded.
  int32_t n_gathered, n_mixed;  // places for inputs and outputs
  const int32_t* input;         // [n_gathered] number of the input, or -1: padding
  const int32_t* place;         // [C_out] place of the output, or -1: always 0

  R gamma, cutoff, eps;               // eps: of the batch norms
  const int32_t* coordinate;          // [d] coefficient that makes coordinate m of a hidden field
  const int32_t *trivial, *measured;  // [n_trivial] trivial coefficients; the same among the d coordinates of h
  // frame
  const int32_t* attribute_identity;  // [1]
  const R* attribute;                 // [A, A]
  int32_t n_harmonics, n_monomials, max_power;
  int32_t used_harmonics, used_monomials;       // those that the couplings read come first
  const int32_t *degree, *monomial, *harmonic;  // [d]; [n_monomials, 2] an earlier one and the coordinate that it is
                                                // multiplied with, the first is 1; [n_harmonics, 2] m and monomial
  const R* harmonic_value;
  const R *plane, *axis, *sign, *attribute_sign;  // [dim, 2], [dim, dim-2], [c], [A]
  const int32_t *order, *partner, *attribute_order, *attribute_partner;
  // rows: W channels' positions among the flat hidden coefficients; coupling structure
  const int32_t* row_start;  // [n_rows + 1]
  const int32_t* row;        // positions
  int32_t n_products, product_size;
  const int32_t* products;     // [n_products, 4] place in t, padded V, first g, one past the last
  const int32_t* g_from;       // [n_g] place of the input's component
  const int32_t* g_first;      // [n_g + 1] nonzeros of G_g
  const int32_t* nz_harmonic;  // [n_nz] m, -1 without a factor Y
  const R* nz_value;
  int32_t n_adjoint;       // rows of inputs
  const int32_t* adjoint;  // [n_adjoint, 4] place among the inputs, padded V, first term, one past the last
  const int32_t *adjoint_from, *adjoint_g;  // per term: place in t, g
  int32_t n_harmonic_terms;
  const int32_t* harmonic_terms;  // [n_harmonic_terms, 4] m, ascending; places of the input and in t; padded V
  const R* harmonic_term_value;
  const LayerView<R>* layers;
  CouplingView* couplings;
};

// With the memory of what it views beside the two flat arrays.
template <typename R>
struct Plan : PlanView<R> {
  std::vector<LayerView<R>> layer_storage;
  std::vector<CouplingView> coupling_storage;
};

// H: numbers of one edge's hidden features, the constant one included.
template <typename R>
IST_HOST_DEVICE int64_t hidden_size(const PlanView<R>& p) {
  return int64_t{p.hidden_flat} / p.c * p.d + 1;
}

// Whether the features of a node lie in memory as they are gathered.
template <typename R>
bool gathered_as_given(const PlanView<R>& p) {
  bool same = p.n_gathered == p.in_size;
  for (int32_t k = 0; k < p.n_gathered && same; ++k) same = p.input[k] == k;
  return same;
}

// Reads consecutive numbers. The pointers that it hands out lead into a copy of them, `copy`, for the views to be used
// where the numbers themselves cannot be read.
template <typename T>
struct Reader {
  const T* next;
  const T* end;
  const T* copy;
  bool valid = true;
  const T* take(int64_t n) {
    if (n < 0 || n > end - next) {
      valid = false;
      return nullptr;
    }
    const T* result = copy;
    next += n, copy += n;
    return result;
  }
  T one() { return take(1) ? next[-1] : T{}; }
};

template <typename R>
void read_frame(PlanView<R>& p, Reader<int32_t>& ints, Reader<R>& reals) {
  p.attribute_identity = ints.take(1);
  p.attribute = reals.take(int64_t{p.n_attr} * p.n_attr);
  if (p.kind == kZonal) {
    p.n_harmonics = ints.one(), p.n_monomials = ints.one();
    p.used_harmonics = ints.one(), p.used_monomials = ints.one();
    p.degree = ints.take(p.d);
    p.monomial = ints.take(int64_t{2} * p.n_monomials), p.harmonic = ints.take(int64_t{2} * p.n_harmonics);
    p.harmonic_value = reals.take(p.n_harmonics);
  } else if (p.kind == kPlanar) {
    p.max_power = ints.one();
    p.order = ints.take(p.c), p.partner = ints.take(p.c);
    p.attribute_order = ints.take(p.n_attr), p.attribute_partner = ints.take(p.n_attr);
    p.plane = reals.take(int64_t{2} * p.dim), p.axis = reals.take(int64_t{p.dim} * (p.dim - 2));
    p.sign = reals.take(p.c), p.attribute_sign = reals.take(p.n_attr);
  }
}

template <typename R>
void read_layer(Plan<R>& p, Reader<int32_t>& ints, Reader<R>& reals) {
  LayerView<R> layer{};
  int32_t* const header[] = {&layer.in,      &layer.out,         &layer.n_samples, &layer.weight,   &layer.bias,
                             &layer.affine,  &layer.norm_weight, &layer.norm_bias, &layer.n_values, &layer.n_pairs,
                             &layer.in_even, &layer.in_odd,      &layer.out_even,  &layer.out_odd,  &layer.n_groups};
  for (int32_t* field : header) *field = ints.one();
  layer.groups = ints.take(ints.one());
  layer.samples = reals.take(int64_t{layer.n_samples} * p.c);
  layer.inverse_t = reals.take(int64_t{layer.n_samples} * p.c);
  const int64_t rows = layer.n_samples - layer.n_pairs;
  layer.pair_samples = reals.take(rows * p.c), layer.pair_inverse = reals.take(rows * p.c);
  p.layer_storage.push_back(layer);
}

inline CouplingView read_coupling(Reader<int32_t>& ints) {
  CouplingView q{};
  q.n_out = ints.one(), q.n_in = ints.one(), q.n_hidden = ints.one(), q.n_basis = ints.one();
  q.constant = ints.one(), q.n_slots = ints.one(), q.n_groups = ints.one(), q.n_blocks = ints.one();
  q.theta = ints.one(), q.theta_forward = ints.one(), q.out_at = ints.one();
  q.slots = ints.take(int64_t{2} * q.n_slots), q.groups = ints.take(int64_t{4} * q.n_groups);
  q.blocks = ints.take(int64_t{2} * q.n_blocks);
  q.hidden_stride = q.constant ? 1 : static_cast<int32_t>(padded(q.n_hidden));
  q.in_stride = static_cast<int32_t>(padded(q.n_in)), q.out_stride = static_cast<int32_t>(padded(q.n_out));
  q.theta_size = padded(int64_t{q.n_in} * q.hidden_stride);
  return q;
}

template <typename R>
bool read_products(PlanView<R>& p, Reader<int32_t>& ints, Reader<R>& reals) {
  p.n_products = ints.one(), p.product_size = ints.one(), p.products = ints.take(int64_t{4} * p.n_products);
  p.g_from = ints.take(p.n_g), p.g_first = ints.take(p.n_g + 1);
  if (!ints.valid) return false;
  const int32_t n_nz = ints.next[-1];
  p.nz_harmonic = ints.take(n_nz), p.nz_value = reals.take(n_nz);
  p.n_adjoint = ints.one(), p.adjoint = ints.take(int64_t{4} * p.n_adjoint);
  if (!ints.valid) return false;
  const int32_t n_terms = p.n_adjoint ? ints.next[-1] : 0;
  p.adjoint_from = ints.take(n_terms), p.adjoint_g = ints.take(n_terms);
  p.n_harmonic_terms = ints.one(), p.harmonic_terms = ints.take(int64_t{4} * p.n_harmonic_terms);
  p.harmonic_term_value = reals.take(p.n_harmonic_terms);
  return ints.valid;
}

// The view of a plan whose numbers can be read at `ints` and `reals` now, and where it is used at the copies of these.
// False when the arrays are not what ops/native/arrays.py writes.
template <typename R>
bool plan_view(Plan<R>& p, const int32_t* ints_begin, int64_t n_ints, const R* reals_begin, int64_t n_reals,
               const int32_t* ints_copy, const R* reals_copy) {
  Reader<int32_t> ints{ints_begin, ints_begin + n_ints, ints_copy};
  Reader<R> reals{reals_begin, reals_begin + n_reals, reals_copy};
  int32_t* const header[] = {&p.kind,     &p.dim,         &p.n_attr,      &p.regular,   &p.n_inputs,  &p.in_size,
                             &p.out_size, &p.n_layers,    &p.d,           &p.c,         &p.channels,  &p.order_zero,
                             &p.function, &p.n_couplings, &p.n_rows,      &p.n_g,       &p.n_weights, &p.n_grad,
                             &p.shell,    &p.has_cutoff,  &p.hidden_flat, &p.has_norms, &p.n_trivial, &p.n_parameters,
                             &p.n_even,   &p.n_gathered,  &p.n_mixed};
  for (int32_t* field : header) *field = ints.one();
  p.gamma = reals.one(), p.cutoff = reals.one(), p.eps = reals.one();
  p.coordinate = ints.take(p.d);
  p.trivial = ints.take(p.n_trivial), p.measured = ints.take(p.n_trivial);
  p.input = ints.take(p.n_gathered), p.place = ints.take(p.out_size);
  read_frame(p, ints, reals);
  for (int n = 0; n < p.n_layers && ints.valid; ++n) read_layer(p, ints, reals);
  p.row_start = ints.take(p.n_rows + 1);
  if (!ints.valid) return false;
  p.row = ints.take(ints.next[-1]);
  if (!read_products(p, ints, reals)) return false;
  for (int q = 0; q < p.n_couplings && ints.valid; ++q) p.coupling_storage.push_back(read_coupling(ints));
  p.layers = p.layer_storage.data(), p.couplings = p.coupling_storage.data();
  return ints.valid && reals.valid && ints.next == ints.end && reals.next == reals.end;
}

template <typename R>
bool plan_view(Plan<R>& p, const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals) {
  return plan_view(p, ints, n_ints, reals, n_reals, ints, reals);
}

}  // namespace implicit_steer
