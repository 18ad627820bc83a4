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
// Outputs that lie side by side in the forward pass's θ, so that what it reads together is one line of the cache or
// two.
constexpr int kPanel = 16;
// Numbers of a row of n channels.
IST_HOST_DEVICE __attribute__((always_inline)) constexpr int64_t padded(int64_t n) {
  return (n + kChannels - 1) / kChannels * kChannels;
}

enum Function : int32_t { kElu = 0, kRelu = 1, kSilu = 2, kGelu = 3, kTanh = 4 };

// ---- the scalars of a plan, of a hidden layer and of a coupling, in the order in which they stand in the array of
// integers. ops/native/headers.py has the same names in the same order, which tests/ops/test_headers.py compares.

#define IST_PLAN_HEADER(FIELD)                                                             \
  FIELD(kind)       /* FrameKind */                                                        \
  FIELD(dim)        /* of positions */                                                     \
  FIELD(n_attr)     /* A */                                                                \
  FIELD(regular)    /* near the origin coefficients are divided by the radius */           \
  FIELD(n_inputs)   /* of the MLP */                                                       \
  FIELD(in_size)    /* C_in */                                                             \
  FIELD(out_size)   /* C_out */                                                            \
  FIELD(n_layers)   /* hidden ones */                                                      \
  FIELD(d)          /* coordinates of a hidden field */                                    \
  FIELD(c)          /* coefficients of a channel */                                        \
  FIELD(channels)   /* W of the last hidden layer */                                       \
  FIELD(order_zero) /* coefficients of order 0, which come first */                        \
  FIELD(function)   /* Function */                                                         \
  FIELD(n_couplings)                                                                       \
  FIELD(n_rows)    /* of hidden features, see CouplingView */                              \
  FIELD(n_g)       /* factors G of all products */                                         \
  FIELD(n_weights) /* packed */                                                            \
  FIELD(n_grad)    /* the first ones, of which a backward pass gives the gradient */       \
  FIELD(shell_at)  /* position of the shell's width in the packed weights */               \
  FIELD(has_cutoff)                                                                        \
  FIELD(hidden_flat) /* coefficients of all channels of the last hidden layer */           \
  FIELD(has_norms)   /* a batch norm behind every hidden layer */                          \
  FIELD(n_trivial)   /* trivial coefficients of a channel */                               \
  FIELD(n_parameters)                                                                      \
  FIELD(n_even)             /* coefficients of a channel that come first, see LayerView */ \
  FIELD(n_gathered)         /* places for inputs, */                                       \
  FIELD(n_mixed)            /* and for outputs: by field type, component by component */   \
  FIELD(n_sums)             /* of a node's T: bundle by bundle as [w][slot, v], */         \
  FIELD(n_slot_sums)        /* and as [slot, v][w]; rows are padded */                     \
  FIELD(n_read)             /* first coefficients of a channel, all that couplings read */ \
  FIELD(n_knots)            /* of a table in place of the hidden layers, or 0 */           \
  FIELD(n_types)            /* rows of attributes that the table has splines for */        \
  FIELD(table_at)           /* position of the splines in the packed weights */            \
  FIELD(bounded)            /* u = r / length; else see edge_frame.h */                    \
  FIELD(even)               /* splines are even functions of u */                          \
  FIELD(attribute_identity) /* the frame leaves attributes as they are */                  \
  FIELD(n_harmonics)        /* zonal frames: terms of all Y, */                            \
  FIELD(n_monomials)        /* monomials in them; */                                       \
  FIELD(used_harmonics)     /* those that the couplings read come first */                 \
  FIELD(used_monomials)     /* likewise */                                                 \
  FIELD(max_power)          /* planar frames: the largest order */                         \
  FIELD(n_products)                                                                        \
  FIELD(product_size) /* numbers of all products t */                                      \
  FIELD(n_adjoint)    /* rows of inputs */                                                 \
  FIELD(n_harmonic_terms)

#define IST_LAYER_HEADER(FIELD)                                                          \
  FIELD(in_size)                                                                         \
  FIELD(out_size)                                                                        \
  FIELD(n_samples)   /* S */                                                             \
  FIELD(weight)      /* positions in the packed weights: of W, */                        \
  FIELD(bias)        /* of b, */                                                         \
  FIELD(affine)      /* of the batch norm's scale [W] and shift [W, n_trivial], or -1 */ \
  FIELD(norm_weight) /* positions of the batch norm's parameters in the unpacked */      \
  FIELD(norm_bias)   /* vector, or -1 */                                                 \
  FIELD(n_values)    /* structural nonzeros of W */                                      \
  FIELD(n_pairs)                                                                         \
  FIELD(in_even)  /* coefficients that z can have: the first of the even, */             \
  FIELD(in_odd)   /* the first of the odd ones */                                        \
  FIELD(out_even) /* coefficients of the activation that anything reads: likewise */     \
  FIELD(out_odd)                                                                         \
  FIELD(n_groups) /* rows of W that share their columns */

#define IST_COUPLING_HEADER(FIELD)                                                              \
  FIELD(n_out)     /* U */                                                                      \
  FIELD(n_in)      /* V */                                                                      \
  FIELD(n_hidden)  /* W */                                                                      \
  FIELD(n_basis)   /* n_b */                                                                    \
  FIELD(constant)  /* reads the constant one: W = 1 */                                          \
  FIELD(depthwise) /* output u reads input u alone: V = U */                                    \
  FIELD(n_slots)                                                                                \
  FIELD(n_groups)                                                                               \
  FIELD(n_blocks)                                                                               \
  FIELD(theta)         /* positions in the packed weights of θ [b][u][v, w] */                  \
  FIELD(theta_forward) /* and of θ [b][panel of u][v][w][u]; depthwise: [b][v, w], [b][w][u] */ \
  FIELD(out_at)        /* place of component 0 of the U outputs */

#define IST_MEMBER(name) int32_t name;

// One hidden layer: z = W y + b, then per channel y = inverse · φ(samples · z), then, with batch norms, scale · y +
// shift.
//
// Pairs of samples differ only in the sign of the odd coefficients, in A as in A⁻. Of each pair one is kept: with E the
// even and O the odd part of its row's sum, the two samples are E + O and E − O. Samples without a partner follow. The
// even coefficients of a channel come first.
template <typename R>
struct LayerView {
  IST_LAYER_HEADER(IST_MEMBER)
  const int32_t* groups;         // per group: n_rows, n_columns, rows, columns; W is packed so, [row][column] in each
  const R *samples, *inverse_t;  // [S, c] all of them, for edges near the origin
  const R *pair_samples, *pair_inverse;  // [n_pairs + singles, c]
};

// U x V x W fields that share intertwiners. Hidden features enter by rows: one coefficient of all W channels, or the
// constant one. A product is t[v] = Σ_g f[i_g, v] G_g, where G_g is a constant or Σ value · Y[m]. Slots (b, o) that
// read the same rows form a group; a block is one of these rows, with the products that it meets in the group's slots:
//   T[slot, w, v] += h[row, w] t[slot, v]
// Groups of several couplings that read the same rows form a bundle, whose products and T lie side by side.
struct CouplingView {
  IST_COUPLING_HEADER(IST_MEMBER)
  const int32_t* slots;                          // [n_slots, 2] b, o
  const int32_t* groups;                         // [n_groups, 4] first slot, slots, first block, blocks
  const int32_t* blocks;                         // [n_blocks, 2] row (n_rows: the constant one), place of the products
  const int32_t* places;                         // [n_groups, 4] place of T as [w][slot, v]; size of the bundle's rows
                                                 // [slot, v]; place of T as [slot, v][w]; whether it leads its bundle
  int32_t hidden_stride, in_stride, out_stride;  // from one row of channels to the next: padded, but 1 of the constant
  int64_t theta_size;                            // of θ[b, u], as [v, w]
  int32_t theta_rows;                            // of them for each b: U, or 1 where depthwise
  int64_t at_sums;                               // of GPU kernels: position of T, slot by slot; see device_plan.h

  // Place of a slot's outputs among those of a node.
  IST_HOST_DEVICE int64_t place_of_output(int slot) const { return out_at + int64_t{slots[2 * slot + 1]} * out_stride; }
  // θ[b] of the forward pass, not of a depthwise coupling: its size, the place of output u's first number (v = w = 0),
  // and from there to the next, the panel's width.
  IST_HOST_DEVICE int64_t forward_size() const { return int64_t{n_in} * n_hidden * out_stride; }
  IST_HOST_DEVICE int forward_place(int u) const { return (u & -kPanel) * n_in * n_hidden + (u & (kPanel - 1)); }
  IST_HOST_DEVICE int panel_width(int u) const {
    const int rest = out_stride - (u & -kPanel);
    return rest < kPanel ? rest : kPanel;
  }
};

template <typename R>
struct PlanView {
  IST_PLAN_HEADER(IST_MEMBER)
  // Inputs and outputs are gathered by field type, component by component: all channels of one side by side, padded.
  const int32_t* gathered_from;  // [n_gathered] number of the input, or -1: padding
  const int32_t* mixed_place;    // [C_out] place of the output, or -1: always 0

  R gamma, cutoff, eps;               // eps: of the batch norms
  R length, spacing;                  // of a table: the scale of radii; the distance of its knots in u
  R per_length, per_spacing;          // 1 / of these
  const int32_t* coordinate;          // [d] coefficient that makes coordinate m of a hidden field
  const int32_t *trivial, *measured;  // [n_trivial] trivial coefficients; the same among the d coordinates of h
  // frame
  const R* attribute;                           // [A, A]
  const int32_t *degree, *monomial, *harmonic;  // [d]; [n_monomials, 2] an earlier one and the coordinate that it is
                                                // multiplied with, the first is 1; [n_harmonics, 2] m and monomial
  const R* harmonic_value;
  const R *plane, *axis, *sign, *attribute_sign;  // [dim, 2], [dim, dim-2], [c], [A]
  const int32_t *order, *partner, *attribute_order, *attribute_partner;
  // rows: W channels' positions among the flat hidden coefficients; coupling structure
  const int32_t* row_start;    // [n_rows + 1]
  const int32_t* row;          // positions
  const int32_t* products;     // [n_products, 4] place in t, padded V, first g, one past the last
  const int32_t* g_from;       // [n_g] place of the input's component
  const int32_t* g_first;      // [n_g + 1] nonzeros of G_g
  const int32_t* nz_harmonic;  // [n_nz] m, -1 without a factor Y
  const R* nz_value;
  const int32_t* adjoint;  // [n_adjoint, 4] place among the inputs, padded V, first term, one past the last
  const int32_t *adjoint_from, *adjoint_g;  // per term: place in t, g
  const int32_t* harmonic_terms;  // [n_harmonic_terms, 4] m, ascending; places of the input and in t; padded V
  const R* harmonic_term_value;
  const LayerView<R>* layers;
  CouplingView* couplings;
};
#undef IST_MEMBER

// With the memory of what it views beside the two flat arrays.
template <typename R>
struct Plan : PlanView<R> {
  std::vector<LayerView<R>> layer_storage;
  std::vector<CouplingView> coupling_storage;
};

// Channels W of every batch norm, and so of every hidden layer; 0 without them.
template <typename R>
IST_HOST_DEVICE int norm_channels(const PlanView<R>& p) {
  return p.has_norms ? p.layers[0].out_size / p.c : 0;
}

// Coordinates [W, d] of the full hidden field that goes into a batch norm.
template <typename R>
IST_HOST_DEVICE int norm_input_size(const PlanView<R>& p) {
  return norm_channels(p) * p.d;
}

// H: numbers of one edge's hidden features, the constant one included.
template <typename R>
IST_HOST_DEVICE int64_t hidden_size(const PlanView<R>& p) {
  return int64_t{p.hidden_flat} / p.c * p.d + 1;
}

// Numbers of a table's row: of each coefficient that couplings read a row of channels.
template <typename R>
int64_t table_row(const PlanView<R>& p) {
  return p.n_read * padded(p.channels);
}

// Splines of a type, each of one coefficient of all hidden fields: what plan/table.py calls b_j, j = -2 .. G.
template <typename R>
IST_HOST_DEVICE int64_t splines_per_type(const PlanView<R>& p) {
  return int64_t{p.n_knots} + 3;
}

// Numbers of a row of the sums over edges that cpu/table_sums.h makes, and of all rows.
template <typename R>
int64_t table_sums_width(const PlanView<R>& p) {
  return p.d * (p.kind == kPlanar ? 2 : 1) + 4 * p.c;
}
template <typename R>
int64_t table_sums_size(const PlanView<R>& p) {
  return p.n_types * splines_per_type(p) * table_sums_width(p);
}

// Whether the features of a node lie in memory as they are gathered.
template <typename R>
bool gathered_as_given(const PlanView<R>& p) {
  bool same = p.n_gathered == p.in_size;
  for (int32_t k = 0; k < p.n_gathered && same; ++k) same = p.gathered_from[k] == k;
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

#define IST_READ(name) view.name = ints.one();
template <typename R>
void read_header(PlanView<R>& view, Reader<int32_t>& ints) {
  IST_PLAN_HEADER(IST_READ)
}
template <typename R>
void read_header(LayerView<R>& view, Reader<int32_t>& ints) {
  IST_LAYER_HEADER(IST_READ)
}
inline void read_header(CouplingView& view, Reader<int32_t>& ints) { IST_COUPLING_HEADER(IST_READ) }
#undef IST_READ

template <typename R>
void read_frame(PlanView<R>& p, Reader<int32_t>& ints, Reader<R>& reals) {
  p.attribute = reals.take(int64_t{p.n_attr} * p.n_attr);
  if (p.kind == kZonal) {
    p.degree = ints.take(p.d);
    p.monomial = ints.take(int64_t{2} * p.n_monomials), p.harmonic = ints.take(int64_t{2} * p.n_harmonics);
    p.harmonic_value = reals.take(p.n_harmonics);
  } else if (p.kind == kPlanar) {
    p.order = ints.take(p.c), p.partner = ints.take(p.c);
    p.attribute_order = ints.take(p.n_attr), p.attribute_partner = ints.take(p.n_attr);
    p.plane = reals.take(int64_t{2} * p.dim), p.axis = reals.take(int64_t{p.dim} * (p.dim - 2));
    p.sign = reals.take(p.c), p.attribute_sign = reals.take(p.n_attr);
  }
}

template <typename R>
void read_layer(Plan<R>& p, Reader<int32_t>& ints, Reader<R>& reals) {
  LayerView<R> layer{};
  read_header(layer, ints);
  layer.groups = ints.take(ints.one());
  layer.samples = reals.take(int64_t{layer.n_samples} * p.c);
  layer.inverse_t = reals.take(int64_t{layer.n_samples} * p.c);
  const int64_t rows = layer.n_samples - layer.n_pairs;
  layer.pair_samples = reals.take(rows * p.c), layer.pair_inverse = reals.take(rows * p.c);
  p.layer_storage.push_back(layer);
}

inline CouplingView read_coupling(Reader<int32_t>& ints) {
  CouplingView q{};
  read_header(q, ints);
  q.slots = ints.take(int64_t{2} * q.n_slots), q.groups = ints.take(int64_t{4} * q.n_groups);
  q.blocks = ints.take(int64_t{2} * q.n_blocks), q.places = ints.take(int64_t{4} * q.n_groups);
  q.hidden_stride = q.constant ? 1 : static_cast<int32_t>(padded(q.n_hidden));
  q.in_stride = static_cast<int32_t>(padded(q.n_in)), q.out_stride = static_cast<int32_t>(padded(q.n_out));
  q.theta_size = padded(int64_t{q.n_in} * q.hidden_stride);
  q.theta_rows = q.depthwise ? 1 : q.n_out;
  return q;
}

template <typename R>
bool read_products(PlanView<R>& p, Reader<int32_t>& ints, Reader<R>& reals) {
  p.products = ints.take(int64_t{4} * p.n_products);
  p.g_from = ints.take(p.n_g), p.g_first = ints.take(p.n_g + 1);
  if (!ints.valid) return false;
  const int32_t n_nz = ints.next[-1];
  p.nz_harmonic = ints.take(n_nz), p.nz_value = reals.take(n_nz);
  p.adjoint = ints.take(int64_t{4} * p.n_adjoint);
  if (!ints.valid) return false;
  const int32_t n_terms = p.n_adjoint ? ints.next[-1] : 0;
  p.adjoint_from = ints.take(n_terms), p.adjoint_g = ints.take(n_terms);
  p.harmonic_terms = ints.take(int64_t{4} * p.n_harmonic_terms);
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
  read_header(p, ints);
  p.gamma = reals.one(), p.cutoff = reals.one(), p.eps = reals.one();
  p.length = reals.one(), p.spacing = reals.one();
  p.per_length = 1 / p.length, p.per_spacing = 1 / p.spacing;
  p.coordinate = ints.take(p.d);
  p.trivial = ints.take(p.n_trivial), p.measured = ints.take(p.n_trivial);
  p.gathered_from = ints.take(p.n_gathered), p.mixed_place = ints.take(p.out_size);
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
