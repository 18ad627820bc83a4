// The reverse sweep of a tile: hidden features, MLP, frame. The gradients of weights are sums over the tile's edges,
// which lanes form for the entries that they own and add to the warp's row of partial sums.
#pragma once

#include "warp.cuh"

namespace implicit_steer::IST_ISA {

template <typename N, bool kFeatures>
struct Reverse : Warp<N, kFeatures, true> {
  using R = Real<N>;
  using Base = Warp<N, kFeatures, true>;
  using Function = ChosenFunction;
  using Base::a, Base::p, Base::terms, Base::weights, Base::e, Base::z, Base::y, Base::normed, Base::d_z, Base::d_y,
      Base::d_hidden;
  using Base::lane, Base::lanes, Base::sub, Base::active, Base::edge, Base::edge_size, Base::n_edges, Base::shell;
  const int64_t all_layers;
  const bool need_geometry, need_weights;
  R* const grad_weights;  // [n_grad] of this warp

  __device__ __forceinline__ explicit Reverse(const Call<R>& call)
      : Base(call),
        all_layers(call.extent.all_layers),
        need_geometry(a.grad_delta || a.grad_attr),
        need_weights(a.grad_weights),
        grad_weights(call.partial + this->number * p.n_grad) {}

  __device__ __forceinline__ void clear_gradients() {
    for (int64_t k = lane; need_weights && k < p.n_grad; k += 32) grad_weights[k] = R{};
  }

  // ---- sums over the tile's edges

  // Σ x_e y_e
  __device__ __forceinline__ R sum_of_products(const N* x, const N* y) const {
    x = this->of_edge(x, 0), y = this->of_edge(y, 0);
    N sum{};
#pragma unroll 2
    for (int l = 0; l < n_edges; ++l) sum += x[l * edge_size] * y[l * edge_size];
    return result(sum);
  }
  __device__ __forceinline__ R sum_of(const N* x) const {
    x = this->of_edge(x, 0);
    N sum{};
    for (int l = 0; l < n_edges; ++l) sum += x[l * edge_size];
    return result(sum);
  }

  // ---- one layer

  __device__ __forceinline__ void norm_gradients(const LayerView<R>& layer, const N* y_n) {
    const int channels = layer.out_size / p.c;
    R *const scale = grad_weights + layer.affine, *const shift = scale + channels;
    for (int w = lane; w < channels; w += 32) {
      R sum{};
      for (int k = w * p.c; k < (w + 1) * p.c; ++k) sum += sum_of_products(d_y + k, y_n + k);
      scale[w] += sum;
      for (int k = 0; k < p.n_trivial; ++k) shift[w * p.n_trivial + k] += sum_of(d_y + w * p.c + p.trivial[k]);
    }
  }

  __device__ __forceinline__ void linear_gradients(const LayerView<R>& layer, const N* in) {
    R *w = grad_weights + layer.weight, *const bias = grad_weights + layer.bias;
    for (int k = lane; k < layer.out_size; k += 32) bias[k] += sum_of(d_z + k);
    const int32_t* group = layer.groups;
    for (int n = 0; n < layer.n_groups; ++n) {
      const int n_rows = group[0], n_columns = group[1];
      const int32_t *rows = group + 2, *columns = rows + n_rows;
      for (int k = lane; k < n_rows * n_columns; k += 32)
        w[k] += sum_of_products(d_z + rows[k / n_columns], in + columns[k % n_columns]);
      w += n_rows * n_columns;
      group = columns + n_columns;
    }
  }

  // d_in = Wᵀ d_z
  __device__ __forceinline__ void linear_inputs(const LayerView<R>& layer, N* d_in) {
    for (int k = sub; k < layer.in_size && active; k += lanes) d_in[k] = N{};
    const N* w = weights + layer.weight;
    const int32_t* group = layer.groups;
    for (int n = 0; n < layer.n_groups; ++n) {
      __syncwarp();  // groups can share columns
      const int n_rows = group[0], n_columns = group[1];
      const int32_t *rows = group + 2, *columns = rows + n_rows;
      for (int i = sub; i < n_columns && active; i += lanes) {
        N sum = d_in[columns[i]];
#pragma unroll 2
        for (int r = 0; r < n_rows; ++r) sum += d_z[rows[r]] * w[r * n_columns + i];
        d_in[columns[i]] = sum;
      }
      w += n_rows * n_columns;
      group = columns + n_columns;
    }
  }

  // φ′ is computed again from the pre-activations: less than keeping it, for every sample of every channel.
  __device__ __forceinline__ void channel_backward(const LayerView<R>& layer, const N* z_w, const N* d_y_w, N* d_z_w) {
    const int c = p.c, rows = layer.n_samples - layer.n_pairs;
    if (e.near_origin) return near_backward<Function>(layer, c, p.order_zero, e.radius, z_w, d_y_w, d_z_w, e.d_radius);
    clear_unused(p, layer.in_even, layer.in_odd, d_z_w);
    row_blocks<N>(0, layer.n_pairs, [&](auto n, int row) {
      constexpr int kRows = decltype(n)::value;
      N x[2 * kRows], slopes[2 * kRows];
      pair_values<Function, kRows>(layer, row, c, p.n_even, z_w, x, slopes);
      pairs_backward<kRows>(layer, row, c, p.n_even, slopes, d_y_w, d_z_w);
    });
    row_blocks<N>(layer.n_pairs, rows, [&](auto n, int row) {
      constexpr int kRows = decltype(n)::value;
      N x[kRows], slopes[kRows];
      products<kRows>(layer.pair_samples + row * c, c, 0, c, z_w, x);
      apply<Function, kRows>(x, slopes);
      singles_backward<kRows>(layer, row, c, slopes, d_y_w, d_z_w);
    });
  }

  // ---- the whole MLP: from d_y that of the inputs, if need_inputs

  __device__ __forceinline__ void layers_backward(bool need_inputs) {
    const N *z_n = z + all_layers, *y_n = y + all_layers, *normed_n = normed + all_layers;
    for (int n = p.n_layers - 1; n >= 0; --n) {  // loop: reverse layers
      const LayerView<R> layer = this->layer_view(n);
      z_n -= layer.out_size, y_n -= layer.out_size, normed_n -= layer.out_size;
      __syncwarp();
      if (p.has_norms) {
        if (need_weights) norm_gradients(layer, y_n);
        __syncwarp();
      }
      if (active) {
        const N* scale = weights + layer.affine;
        for (int at = sub * p.c; at < layer.out_size; at += lanes * p.c) {
          for (int k = at; k < at + p.c && p.has_norms; ++k) d_y[k] *= scale[at / p.c];
          channel_backward(layer, z_n + at, d_y + at, d_z + at);
        }
      }
      __syncwarp();
      if (need_weights) linear_gradients(layer, n > 0 ? normed_n - p.layers[n - 1].out_size : e.inputs);
      if (n > 0 || need_inputs) linear_inputs(layer, n > 0 ? d_y : e.d_inputs);
    }
  }

  // ---- a table in place of the MLP: from d_y the gradients of the splines' coefficients and, if need_radius, of u

  __device__ __forceinline__ void splines_backward(bool need_radius) {
    __syncwarp();
    typename Base::Cell here{};
    if (active) here = this->cell();
    if (active && sub == 0)
      for (int k = 0; k < p.n_inputs; ++k) e.d_inputs[k] = N{};
    if (active && need_radius) {
      const N* const rows = weights + p.table_at + here.first;
      N sum{};
      this->for_coefficients(sub, lanes, [&](int from, int at) {
        if (at >= 0) sum += d_y[from] * this->blend(here.pieces.slopes, rows + at);
      });
      e.d_radius += sum;
    }
    for (int l = 0; l < n_edges && need_weights; ++l) {
      const int leader = l * lanes;
      R* const rows = grad_weights + p.table_at + from_lane(here.first, leader);
      N factors[SplinePieces<N>::n];
      for (int j = 0; j < SplinePieces<N>::n; ++j) factors[j] = from_lane(here.pieces.weights[j], leader);
      const N* const d = this->of_edge(d_y, l);
      this->for_coefficients(lane, 32, [&](int from, int at) {
        for (int j = 0; j < SplinePieces<N>::n && at >= 0; ++j)
          rows[at + j * this->table_row] += result(factors[j] * d[from]);
      });
    }
  }

  // The gradients of the factor and of the harmonics, which the lanes divide among them, from those of G.
  __device__ __forceinline__ void factors_backward(const N* d_g) {
    N d_factor{};
    IST_ROLLED for (int m = sub; m <= p.d && active; m += lanes) {
      const int begin = terms.harmonic[m], end = terms.harmonic[m + 1];
      N sum{};
#pragma unroll 2
      for (int n = begin; n < end; ++n) sum += d_g[terms.nonzero[2 * n]] * p.nz_value[terms.nonzero[2 * n + 1]];
      if (m == p.d) {
        d_factor += sum;
      } else {
        if (begin < end) d_factor += sum * e.first[m];  // others were not computed
        e.d_first[m] = sum * e.factor, e.d_second[m] = N{};
      }
    }
    e.d_factor = sum_lanes(d_factor, 1, lanes);
    __syncwarp();
  }

  // From d_hidden, and with the gradients of the way back and of the factor in place, everything before. The edge's
  // first lane has e.d_factor.
  __device__ __forceinline__ void sweep() {
    if (active && sub == 0 && p.kind == kPlanar) expand_backward(p, e, this->coefficients, d_hidden, d_y);
    this->has_table() ? splines_backward(need_geometry) : layers_backward(need_geometry);
    e.d_radius = sum_lanes(e.d_radius, 1, lanes);
    __syncwarp();
    if (!active || sub != 0) return;
    if (!need_geometry) {
      e.d_shell += e.d_factor * e.factor * e.squared;
      return;
    }
    frame_backward(p, shell, e);
    R *const grad_delta = global_memory(a.grad_delta), *const grad_attr = global_memory(a.grad_attr);
    for (int k = 0; k < p.dim && grad_delta; ++k) grad_delta[edge * p.dim + k] = result(e.d_delta[k]);
    for (int k = 0; k < p.n_attr && grad_attr; ++k) grad_attr[edge * p.n_attr + k] = result(e.d_attr[k]);
  }

  // After the last tile.
  __device__ __forceinline__ void write_shell() {
    const N sum = sum_lanes(e.d_shell, 1, 32);
    if (need_weights && lane == 0) grad_weights[p.shell_at] = result(sum / (shell * shell * shell));
  }
};

}  // namespace implicit_steer::IST_ISA
