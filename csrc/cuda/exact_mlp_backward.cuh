// The reverse sweep of the kernel MLP of exact_mlp.cuh: one edge in the registers of one thread, an edge near the
// origin by all lanes of a warp.
//
// Of every layer n >= 1 its inputs y and z = W y + b are kept in the warp's shared memory on the way forward; on the
// way back the gradient d_z takes the place of z. Then the sums over edges d_W = Σ d_z yᵀ are products of matrices,
// which the warp's tensor cores form (mma.cuh).
#pragma once

#include "exact_mlp.cuh"
#include "mma.cuh"

namespace implicit_steer::IST_ISA {

// Layer by layer what LayerValue names of 32 edges, [2, 32, c, W]. So that the lanes meet in no bank, the quads of an
// edge are turned around by its number or, where they are no power of two, an edge has one more. `keep` of ExactMlp.
template <typename S, bool kTable = S::Mlp::is_table>
struct KeptLayers {
  using N = typename S::Number;
  N* memory;
  static constexpr bool turned = S::c * S::width % 32 == 0;
  static constexpr int of_edge = S::c * S::width + (turned ? 0 : 4), of_layer = 2 * 32 * of_edge;
  static_assert(turned || of_edge % 8 == 4);

  __device__ __forceinline__ N* quad(int edge, int layer, LayerValue what, int number) const {
    return memory + (layer - 1) * of_layer + (32 * what + edge) * of_edge + 4 * (turned ? number ^ (edge & 7) : number);
  }
  __device__ __forceinline__ N& at(int edge, int layer, LayerValue what, int k, int w) const {
    return quad(edge, layer, what, (k * S::width + w) / 4)[w % 4];
  }
  __device__ __forceinline__ void operator()(int layer, LayerValue what, const N (&z)[S::width][S::c]) const {
#pragma unroll
    for (int k = 0; k < S::c; ++k)
#pragma unroll
      for (int w = 0; w < S::width; w += 4)
        neighbours<4>(quad(threadIdx.x % 32, layer, what, (k * S::width + w) / 4)) = {z[w][k], z[w + 1][k], z[w + 2][k],
                                                                                      z[w + 3][k]};
  }
  __device__ __forceinline__ void put(int edge, int layer, LayerValue what, int k, int w, N value) const {
    at(edge, layer, what, k, w) = value;
  }
};

template <typename S>
struct ExactMlpBackward {
  using N = typename S::Number;
  const ExactMlp<N>& mlp;
  const KeptLayers<S>& kept;
  static constexpr int together = kActivated<S>;

  __device__ __forceinline__ const N* weights(int layer) const {
    return mlp.hidden + (layer - 1) * ExactMlp<N>::template layer_size<S> + S::width;
  }

  // ---- one thread's edge

  // d: from the gradient of c to that of the first layer's z, whose coefficients are 0 and `even`. `keep`: whether the
  // gradients of the other layers' z are kept.
  template <typename Attribute>
  __device__ __forceinline__ void edge(N radius, Attribute attribute, bool keep, N (&d)[S::width][S::c]) const {
    constexpr int odd = S::c - S::even;
    const auto of_sums = [&](int layer) {
      return [=](int first_channel, N(&z)[together][S::c]) {
        const KeptLayers<S> layers{opaque(kept.memory)};
#pragma unroll
        for (int k = 0; k < S::c; ++k) {
          const auto some = neighbours<together>(
              layers.quad(threadIdx.x % 32, layer, kLayerSums, (k * S::width + first_channel) / 4) + first_channel % 4);
#pragma unroll
          for (int w = 0; w < together; ++w) z[w][k] = some.at[w];
        }
      };
    };
    int n = mlp.n_layers - 1;
    if (n > 0) activation<S::even, odd, S::even, kOddRead<S>>(of_sums(n), d);
#pragma unroll 1
    for (; n > 0;) {
      if (keep) kept(n, kLayerSums, d);
      linear(weights(n), d);
      if (--n > 0) activation<S::even, odd, S::even, odd>(of_sums(n), d);
    }
    constexpr int at_once = kFewRegisters<S> ? together : S::width;
    N first[at_once][S::c];
    if constexpr (at_once == S::width) mlp.template first_layer<S>(radius, attribute, 0, first);
    const auto of_first = [&](int first_channel, N(&z)[together][S::c]) {
      if constexpr (at_once < S::width) mlp.template first_layer<S>(radius, attribute, first_channel, first);
#pragma unroll
      for (int w = 0; w < together; ++w) {
        const N(&of_channel)[S::c] = first[(first_channel + w) % at_once];
        z[w][0] = of_channel[0], z[w][S::even] = of_channel[S::even];
      }
    };
    if (mlp.n_layers == 1)
      activation<1, 1, S::even, kOddRead<S>>(of_first, d);
    else
      activation<1, 1, S::even, odd>(of_first, d);
  }

  // d_y = Wᵀ d_z in the place of d_z
  __device__ __forceinline__ static void linear(const N* weights, N (&d)[S::width][S::c]) {
#pragma unroll
    for (int k = 0; k < S::c; ++k) {
      N sum[S::width] = {};
#pragma unroll
      for (int r = 0; r < S::width; ++r)
#pragma unroll
        for (int i = 0; i < S::width; i += 4) {
          const auto four = neighbours<4>(weights + (k * S::width + r) * S::width + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i + j] += four.at[j] * d[r][k];
        }
#pragma unroll
      for (int i = 0; i < S::width; ++i) d[i][k] = sum[i];
    }
  }

  // d_z = Aᵀ (φ′(A z) · A⁻ᵀ d_y) in the place of d_y, of the first even and odd coefficients of either, as
  // ExactMlp::activation. z_of(w, z): z of `together` channels from w on.
  template <int kInEven, int kInOdd, int kOutEven, int kOutOdd, typename Z>
  __device__ __forceinline__ void activation(Z z_of, N (&d)[S::width][S::c]) const {
    const auto used = [](int k, int even, int odd) { return k < S::even ? k < even : k - S::even < odd; };
#pragma unroll
    for (int first_channel = 0; first_channel < S::width; first_channel += together) {
      N z[together][S::c], sum[together][S::c] = {};
      z_of(first_channel, z);
#pragma unroll 1
      for (int pair = 0; pair < mlp.pairs; ++pair) {
        const float* const row = mlp.samples + pair * 2 * S::c;
        const auto a = sample_row<S::c>(row), b = sample_row<S::c>(row + S::c);
#pragma unroll
        for (int w = 0; w < together; ++w) {
          N part[2] = {}, g[2] = {};  // even, odd
#pragma unroll
          for (int k = 0; k < S::c; ++k) {
            if (used(k, kInEven, kInOdd)) part[k >= S::even] += a.at[k] * z[w][k];
            if (used(k, kOutEven, kOutOdd)) g[k >= S::even] += b.at[k] * d[first_channel + w][k];
          }
          const N plus = (g[0] + g[1]) * scaled_slope<typename S::Function>(part[0] + part[1]);
          const N minus = (g[0] - g[1]) * scaled_slope<typename S::Function>(part[0] - part[1]);
          const N both[2] = {plus + minus, plus - minus};
#pragma unroll
          for (int k = 0; k < S::c; ++k)
            if (used(k, kInEven, kInOdd)) sum[w][k] += both[k >= S::even] * a.at[k];
        }
      }
#pragma unroll
      for (int w = 0; w < together; ++w)
#pragma unroll
        for (int k = 0; k < S::c; ++k) d[first_channel + w][k] = sum[w][k];
    }
  }

  // ---- near the origin: edge `at` by all lanes of the warp

  // As edge(), with coefficients of l >= 1 divided by the radius; d[k]: the gradient of coefficient k of the last
  // layer's activation, of this lane's channel, becomes that of the first layer's z. All lanes get the radius'
  // gradient.
  template <typename Attribute>
  __device__ __forceinline__ N near(int at, N radius, Attribute attribute, N (&d)[S::c]) const {
    constexpr int lanes = 32 / S::width;  // of a channel
    const int lane = threadIdx.x % 32, w = lane / lanes, share = lane % lanes;
    N d_radius{};
    for (int n = mlp.n_layers - 1;; --n) {
      N z[S::c] = {mlp.first[w]}, d_z[S::c];
      z[S::even] = mlp.first[S::width + w];
      for (int i = 1; i < mlp.n_inputs && n == 0; ++i) z[0] += mlp.first[(1 + i) * S::width + w] * attribute(i - 1);
#pragma unroll
      for (int k = 0; k < S::c; ++k)
        if (n > 0) z[k] = kept.at(at, n, kLayerSums, k, w);
      near_activation(radius, z, share, d, d_z, d_radius);
      if (n == 0) {
#pragma unroll
        for (int k = 0; k < S::c; ++k) d[k] = d_z[k];
        return sum_lanes(d_radius, 1, 32);
      }
      __syncwarp();
#pragma unroll
      for (int k = 0; k < S::c; ++k)
        if (share == 0) kept.put(at, n, kLayerSums, k, w, d_z[k]);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < S::c; ++k) {
        d[k] = N{};
        for (int r = 0; r < S::width; ++r)
          d[k] += weights(n)[(k * S::width + r) * S::width + w] * kept.at(at, n, kLayerSums, k, r);
      }
    }
  }

  // near_backward of edge_mlp.h; d_radius grows by this lane's share.
  __device__ __forceinline__ void near_activation(N radius, const N (&z)[S::c], int share, const N (&d_y)[S::c],
                                                  N (&d_z)[S::c], N& d_radius) const {
    using F = typename S::Function;
    constexpr int lanes = 32 / S::width;
#pragma unroll
    for (int k = 0; k < S::c; ++k) d_z[k] = N{};
    for (int pair = share; pair < mlp.pairs; pair += lanes) {
      const float *a = mlp.samples + pair * 2 * S::c, *b = a + S::c;
      const N at_zero = a[0] * z[0] * kLn2, g0 = d_y[0] * b[0] * kLog2e;
      N part[2] = {}, g[2] = {};  // even, odd
#pragma unroll
      for (int k = 1; k < S::c; ++k) {
        part[k >= S::even] += a[k] * z[k] * kLn2;
        g[k >= S::even] += b[k] * d_y[k] * kLog2e;
      }
      N sums[2] = {}, of_zero{};
      IST_ROLLED for (int sign = 1; sign >= -1; sign -= 2) {
        const float s = static_cast<float>(sign);
        const N w = part[0] + s * part[1];
        const Quotient<N> q = quotient<F, true>(at_zero, radius * w);
        const N d_d = radius * g0 + g[0] + s * g[1];
        d_radius += w * q.q * g0 + d_d * w * w * q.q_k;
        const N d_w = d_d * (q.q + radius * w * q.q_k);
        of_zero += F::prime(at_zero) * g0 + d_d * w * q.q_b, sums[0] += d_w, sums[1] += s * d_w;
      }
#pragma unroll
      for (int k = 0; k < S::c; ++k) d_z[k] += (k == 0 ? of_zero : sums[k >= S::even]) * a[k] * kLn2;
    }
#pragma unroll
    for (int k = 0; k < S::c; ++k) d_z[k] = sum_lanes(d_z[k], 1, lanes);
  }
};

}  // namespace implicit_steer::IST_ISA
