// The end of an exact backward pass: a chunk's edges through the MLP backwards, from the gradients of their records to
// those of the weights, of positions and of attributes.
#pragma once

#include "exact_chunks.cuh"
#include "exact_mlp_backward.cuh"

namespace implicit_steer::IST_ISA {

constexpr int kReverseSize = 32 + 128 + 32;  // of a warp's memory, from `rest` on

// Warp: what makes a chunk's records (exact_chunks.cuh); Gradients: a warp's sums of the weights' gradients
// (layer_gradients.cuh).
template <typename S, typename Warp, typename Gradients>
struct ExactReverse : Warp {
  using Base = Warp;
  using Base::a, Base::p, Base::view, Base::lane, Base::group, Base::pair, Base::number, Base::records, Base::mlp;
  using typename Base::N, typename Base::Slots, typename Base::Memory;
  static constexpr int channels = S::width / 8;
  const bool need_weights;
  int32_t* edges;    // [32]
  N *moved, *along;  // [32, 4] gradients of the direction, P; [32] along the radius
  KeptLayers<S> kept;
  Gradients gradients;

  __device__ __forceinline__ ExactReverse(const FieldCall& call, int size)
      : Base(call, size), need_weights(a.grad_weights), gradients(reinterpret_cast<N*>(call.sums), number, p, view) {
    edges = reinterpret_cast<int32_t*>(this->rest());
    moved = this->rest() + 32, along = moved + 128;
  }

  // Asked of the call each time: kept, it would take a register.
  __device__ __forceinline__ bool need_geometry() const { return opaque(a.grad_delta) || opaque(a.grad_attr); }

  __device__ __forceinline__ void reverse(int n) {
    const ExactMlpBackward<S> back{mlp, kept};
    const bool there = lane < n;
    const int64_t edge = edges[lane];
    const auto g = this->geometry(edge);
    const bool is_near = there && g.radius < Limits<float>::near;
    const uint32_t near_edges = __ballot_sync(kWarp, is_near);
    N* const record = records + lane * Memory::record;
    const N factor = record[Slots::degrees * S::width + 3];
    const auto attribute = [&](int j) { return this->attribute(edge, j); };
    N d[S::width][S::c];
#pragma unroll
    for (int w = 0; w < S::width; w += 4) {
#pragma unroll
      for (int l = 0; l < Slots::degrees; ++l) {
        const auto four = neighbours<4>(record + l * S::width + w);
#pragma unroll
        for (int j = 0; j < 4; ++j) d[w + j][place_of_degree<S>(l)] = there ? four.at[j] * factor : N{};
      }
    }
    back.edge(g.radius, attribute, !is_near, d);
    if (!is_near) {
#pragma unroll
      for (int w = 0; w < S::width; w += 4) {
        neighbours<4>(record + w) = {d[w][0], d[w + 1][0], d[w + 2][0], d[w + 3][0]};
        neighbours<4>(record + S::width + w) = {d[w][S::even], d[w + 1][S::even], d[w + 2][S::even], d[w + 3][S::even]};
      }
    }
    __syncwarp();
    for (uint32_t left = near_edges; left != 0; left &= left - 1) near_edge_back(__ffs(left) - 1);
    if (need_weights) {
      for (int layer = 1; layer < p.n_layers; ++layer) add_weights(layer);
      add_first(is_near ? constant_number<N>(1) : g.radius, attribute);
    }
    if (there) geometry_back(edge, g, is_near);
  }

  // Of the edge `at` of the chunk, what ExactMlpBackward::edge() gives of others; `along` becomes the radius' gradient.
  __device__ __forceinline__ void near_edge_back(int at) {
    const ExactMlpBackward<S> back{mlp, kept};
    const int64_t edge = edges[at];
    const auto g = this->geometry(edge);
    N* const record = records + at * Memory::record;
    constexpr int lanes = 32 / S::width;
    const int w = lane / lanes;
    N d[S::c] = {};
#pragma unroll
    for (int l = 0; l < Slots::degrees; ++l)
      d[place_of_degree<S>(l)] = record[l * S::width + w] * record[Slots::degrees * S::width + 3] *
                                 (l == 0 ? constant_number<N>(1) : g.radius);
    const N d_radius =
        back.near(at, g.radius, [&](int j) { return this->attribute(edge, j); }, d) + along[at] * g.inverse;
    __syncwarp();
    if (lane % lanes == 0) record[w] = d[0], record[S::width + w] = d[S::even];
    if (lane == 0) along[at] = d_radius;
    __syncwarp();
  }

  // Σ d_z yᵀ and Σ d_z over the chunk's edges: row g, columns 2 t and 2 t + 1, of every coefficient and every pair of
  // blocks of 8.
  __device__ __forceinline__ void add_weights(int layer) const {
#pragma unroll 1
    for (int pass = 0; pass < channels * channels; ++pass) add_weights(layer, pass / channels, pass % channels);
  }
  __device__ __forceinline__ void add_weights(int layer, int rows, int columns) const {
    N bias{};
#pragma unroll
    for (int k0 = 0; k0 < S::c; k0 += 2) {
      auto& to = gradients.four(gradients.of_weights(layer, k0 / 2, rows, columns));
      Neighbours<N, 4> sum = to;
#pragma unroll
      for (int k = k0; k < k0 + 2; ++k) {
        StackedSum<N> d_w;
        const N *of_z[2], *of_y[2];  // of edges 2 t and 2 t + 1; every eighth one has its quads turned alike
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          of_z[i] = &kept.at(2 * pair + i, layer, kLayerSums, k, 8 * rows + group);
          of_y[i] = &kept.at(2 * pair + i, layer, kLayerInputs, k, 8 * columns + group);
        }
#pragma unroll
        for (int at = 0; at < 32; at += 8) {
          OfParts<Stacked, N> d_z;
          OfParts<Split<2>, N> y;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const N z = of_z[i][at * kept.of_edge];
            d_z.set(i, z), y.set(i, of_y[i][at * kept.of_edge]);
            if (k == 0) bias += z;
          }
          d_w.add(d_z, y);
        }
        sum.at[(k - k0) * 2] += d_w[0], sum.at[(k - k0) * 2 + 1] += d_w[1];
      }
      to = sum;
    }
    if (columns == 0) gradients.one(gradients.of_bias(layer) + 32 * rows) += bias;
  }

  // The first layer's bias and weights: Σ d_z times 1, `radial`, the attributes; row g, a quarter of the edges.
  template <typename Attribute>
  __device__ __forceinline__ void add_first(N radial, Attribute attribute) const {
    N* const input = this->near();
    const auto sum_of = [&](int n, int rows, auto factor) {
      const N* const d_z = records + (n == 1 ? S::width : 0) + 8 * rows + group;
      N sum{};
#pragma unroll
      for (int at = pair; at < 32; at += 4) sum += d_z[at * Memory::record] * factor(at);
      gradients.one(Gradients::first + 32 * (n * channels + rows)) += sum;
    };
#pragma unroll
    for (int rows = 0; rows < channels; ++rows) sum_of(0, rows, [](int) { return constant_number<N>(1); });
    for (int n = 1; n <= p.n_inputs; ++n) {
      input[lane] = n == 1 ? radial : attribute(n - 2);
      __syncwarp();
#pragma unroll
      for (int rows = 0; rows < channels; ++rows) sum_of(n, rows, [&](int at) { return input[at]; });
      __syncwarp();
    }
  }

  // From the gradients d_u of the direction, P = factor · d_factor and those in the record; `along` is of edges near
  // the origin the radius' gradient.
  template <typename Geometry>
  __device__ __forceinline__ void geometry_back(int64_t edge, const Geometry& g, bool is_near) {
    const N* const record = records + lane * Memory::record;
    const auto of_direction = this->of_direction();
    if (need_weights) gradients.one(Gradients::shell) += of_direction.at[3] * g.squared;
    if (!need_geometry()) return;
    N d_radius = is_near ? along[lane] : N{};
    const N* const weights = opaque(mlp.first) + S::width;
    if (!is_near) d_radius += of_input(record + S::width, weights);
    store_position(edge, g, of_direction, d_radius);
    for (int j = 0; j < p.n_attr && a.grad_attr; ++j) {
      const N sum = of_input(record, weights + (1 + j) * S::width);
      global_memory(a.grad_attr)[edge * p.n_attr + j] = result(sum);
    }
  }
  // The gradient of an input of the first layer, Σ_w d_z[w] W[w].
  static __device__ __forceinline__ N of_input(const N* d_z, const N* weights) {
    N sum{};
#pragma unroll
    for (int w = 0; w < S::width; w += 4) sum += dot(neighbours<4>(d_z + w), neighbours<4>(weights + w));
    return sum;
  }

  // Of this lane's edge: the gradient of the direction, and P.
  __device__ __forceinline__ Neighbours<N, 4> of_direction() const { return neighbours<4>(opaque(moved) + 4 * lane); }

  // The gradient of x by way of the direction, the radius and the radial factor.
  template <typename Geometry>
  __device__ __forceinline__ void store_position(int64_t edge, const Geometry& g, const Neighbours<N, 4>& direction,
                                                 N d_radius) const {
    N u[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) u[k] = g.x[k] * g.inverse, d_radius -= direction.at[k] * u[k] * g.inverse;
    const N slope = radial_slope(direction.at[3], g.squared);
#pragma unroll
    for (int k = 0; k < 3; ++k)
      if (a.grad_delta)
        global_memory(a.grad_delta)[3 * edge + k] =
            result(direction.at[k] * g.inverse + d_radius * u[k] + slope * g.x[k]);
  }

  // ∂L/∂(|x|²/2) by way of the radial factor, from P.
  __device__ __forceinline__ N radial_slope(N product, N squared) const {
    return product * (2 * kLn2 * *this->exponent) + cutoff_slope(product, squared);
  }
  // Of it that of the cutoff; where the factor is 0, so is its slope.
  __device__ __forceinline__ N cutoff_slope(N product, N squared) const {
    if (!p.has_cutoff) return N{};
    const auto cutoff = this->cutoff(squared);
    return cutoff.value > 1e-30f ? product / cutoff.value * cutoff.slope : N{};
  }
};

}  // namespace implicit_steer::IST_ISA
