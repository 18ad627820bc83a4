// Backward of a layer of scalars and vectors with exact sampling, in one kernel. A warp walks its edges as on the way
// forward (exact_warp.cuh), once more chunk by chunk:
//
//   chunk     the MLP of every edge, whose layers are kept (exact_mlp_backward.cuh)
//   node      dT[slot, v, w] = Σ_u θ[path, u, v, w] g[u] from the gradient g of the node's output
//   edges     8 at a time, by the tensor cores: d_c_l[w] = Σ_{slot, v} slot[v] dT[slot, v, w], which replaces c in the
//             edge's record, and d_slot[v] = Σ_w c_l[w] dT[slot, v, w], from which the gradients of features and
//             direction follow
//   T         as on the way forward; dθ[path, u, v, w] += Σ_slot g[u] T[slot, v, w] at the end of the node; where the
//             forward pass has kept T, from that, behind all chunks (exact_node_sums.cuh)
//   reverse   the MLP back from d_c, its weights' gradients, the gradients of positions and attributes
//
// Lane 4 g + t has edge g of a step, its fields and channels 2 t and 2 t + 1; of more than 8 fields or channels there
// are several such blocks, each pair of which goes through the node's edges. Gradients of the features go to memory
// edge by edge; those of the weights are sums of the warp's own (exact_gradients.cuh).
#pragma once

#include "exact_node_sums.cuh"
#include "exact_reverse.cuh"

namespace implicit_steer::IST_ISA {

// Of a warp's shared memory: what all kernels have, numbers of the edges, gradients of their geometry (direction, P)
// and along the radius, g, of the constant hidden feature [v, (scalar, x, y, z)], dT [slot, v, w], where there are
// several blocks of fields d_c so far [edge, l, w]; behind it its layers.
template <typename S>
constexpr int kUnfinished = ExactTiles<S>::blocks > 1 ? 32 * S::Slots::degrees * S::width : 0;
template <typename S>
constexpr int kExactBackwardSize =
    ExactMemory<S>::warp + kReverseSize + 8 * S::fields + S::Slots::count * S::fields * S::width + kUnfinished<S>;
template <typename S>
IST_HOST_DEVICE int exact_backward_size(const PlanView<float>& p) {
  return kExactBackwardSize<S> + (p.n_layers - 1) * KeptLayers<S>::of_layer;
}

// Warp: what makes a chunk's records and adds its edges to T.
template <typename S, typename Warp = ExactWarp<S>>
struct ExactBackward : ExactReverse<S, Warp, ExactGradients<S>> {
  using Base = ExactReverse<S, Warp, ExactGradients<S>>;
  using Base::a, Base::p, Base::view, Base::lane, Base::group, Base::pair, Base::number, Base::first, Base::last;
  using Base::edges, Base::moved, Base::along, Base::kept, Base::gradients, Base::need_weights;
  using Base::theta, Base::constant, Base::sums, Base::constant_sums, Base::records, Base::sources;
  using typename Base::Slots, typename Base::Tiles, typename Base::Memory;
  static constexpr int square = S::fields * S::width;
  const bool mean;
  float *grad, *of_constant, *d_t, *unfinished;

  __device__ __forceinline__ explicit ExactBackward(const FieldCall& call)
      : Base(call, exact_backward_size<S>(call.plan)), mean(call.mean) {
    grad = along + 32, of_constant = grad + 4 * S::fields;
    d_t = of_constant + 4 * S::fields, unfinished = d_t + Slots::count * square;
    kept = {records + kExactBackwardSize<S>};
  }

  // ---- a node

  // Behind it all lanes find g, dT and the gradient of the constant hidden feature's products in the warp's memory.
  __device__ __forceinline__ void start(int node) {
#pragma unroll
    for (int at = lane; at < 4 * S::fields; at += 32) {
      const int output = global_memory(view.out)[at];
      float g = output < 0 ? 0 : a.grad_out[int64_t{node} * p.out_size + output];
      if (mean) g /= static_cast<float>(this->index(a.rowptr, node + 1) - this->index(a.rowptr, node));
      grad[at] = g;
    }
    __syncwarp();
#pragma unroll 1
    for (int pass = 0; pass < Tiles::passes; ++pass) start_pass(pass / Tiles::channels, pass % Tiles::channels);
  }

  __device__ __forceinline__ void start_pass(int block, int channel) const {
    float d[Slots::count][2] = {}, d_constant = 0;
    const int v = 8 * block + group;
    const float* const of_lane = theta + Tiles::theta_of(0, block, channel) + 8 * group + 2 * pair;
#pragma unroll
    for (int u = 0; u < S::fields; ++u) {
      const auto of_field = neighbours<4>(grad + 4 * u);
#pragma unroll
      for (int path = 0; path < Slots::paths; ++path) {
        const auto two = neighbours<2>(of_lane + (path * S::fields + u) * square);
#pragma unroll
        for (int slot = 0; slot < Slots::count; ++slot)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (Slots::path(slot) == path) d[slot][j] += two.at[j] * of_field.at[Slots::component(slot)];
      }
      d_constant += constant[((pair > 0) * S::fields + u) * S::fields + v] * grad[4 * u + pair];
    }
    of_constant[4 * v + pair] = d_constant;
#pragma unroll
    for (int slot = 0; slot < Slots::count; ++slot)
      neighbours<2>(d_t + slot * square + v * S::width + 8 * channel + 2 * pair) = {d[slot][0], d[slot][1]};
  }

  // The sums' part of the edges so far of a node.
  __device__ __forceinline__ void add_theta() const {
#pragma unroll
    for (int block = 0; block < Tiles::blocks; ++block) {
#pragma unroll
      for (int channel = 0; channel < Tiles::channels; ++channel) add_theta(block, channel);
      add_constant(block);
    }
  }
  __device__ __forceinline__ void add_theta(int block, int channel) const {
    [[maybe_unused]] constexpr int together =
        S::large || S::c > ExactPlan::kCoefficients ? 1 : S::fields / 2;  // for want of registers
#pragma unroll(together)
    for (int two_fields = 0; two_fields < S::fields / 2; ++two_fields) {
      const Neighbours<float, 4> g[2] = {neighbours<4>(grad + 8 * two_fields),
                                         neighbours<4>(grad + 8 * two_fields + 4)};
#pragma unroll
      for (int path = 0; path < Slots::paths; ++path) {
        auto& to = gradients.four(ExactGradients<S>::of_theta(path, block, channel, two_fields));
        Neighbours<float, 4> sum = to;
#pragma unroll
        for (int slot = 0; slot < Slots::count; ++slot) {
          if (Slots::path(slot) != path) continue;
          const float* const t = &sums[Tiles::tile(slot, block, channel)][Tiles::row(slot, block) % 2 * 2];
#pragma unroll
          for (int i = 0; i < 4; ++i) sum.at[i] += g[i / 2].at[Slots::component(slot)] * t[i % 2];
        }
        to = sum;
      }
    }
  }
  __device__ __forceinline__ void add_constant(int block) const {
    float whole[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) whole[k] = sum_lanes(constant_sums[block][k], 1, 4);
#pragma unroll
    for (int out_block = 0; out_block < Tiles::blocks; ++out_block) {
      auto& to = gradients.four(ExactGradients<S>::of_constant(block, out_block));
      Neighbours<float, 4> sum = to;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto g = neighbours<4>(grad + 32 * out_block + 8 * pair + 4 * i);
        sum.at[2 * i] += g.at[0] * whole[0];
        sum.at[2 * i + 1] += g.at[1] * whole[1] + g.at[2] * whole[2] + g.at[3] * whole[3];
      }
      to = sum;
    }
  }

  // ---- its edges

  // dT of a block of fields and one of channels as fragments of B: [w, v] to multiply c with, [v, w] to multiply slots
  // with. A row's element t is w or v = 2 t, element t + 4 the next one.
  struct Fragments {
    // Those of further slots are loaded at every step, for want of registers.
    static constexpr int by_field_slots = S::large && Slots::count > 11 ? 8 : Slots::count;
    Split<2> by_channel[Slots::count], by_field[by_field_slots];
  };
  __device__ __forceinline__ void load(Fragments& b, int block, int channel) const {
#pragma unroll
    for (int slot = 0; slot < Slots::count; ++slot) {
      const float* const of_slot = d_t + slot * square + 8 * (block * S::width + channel);
      const auto two = neighbours<2>(of_slot + group * S::width + 2 * pair);
#pragma unroll
      for (int i = 0; i < 2; ++i) b.by_channel[slot].set(i, two.at[i]);
      if (slot < Fragments::by_field_slots) b.by_field[slot] = by_field(d_t, slot, block, channel);
    }
  }
  __device__ __forceinline__ Split<2> by_field(const float* d_t, int slot, int block, int channel) const {
    const float* const of_slot = d_t + slot * square + 8 * (block * S::width + channel);
    Split<2> b;
#pragma unroll
    for (int i = 0; i < 2; ++i) b.set(i, of_slot[(2 * pair + i) * S::width + group]);
    return b;
  }

  // Edges at .. of the chunk before `stop`, all into one node.
  __device__ __forceinline__ void edges_back(int at, int stop) {
#pragma unroll 1
    for (int pass = 0; pass < Tiles::passes; ++pass) {
      const int block = pass / Tiles::channels, channel = pass % Tiles::channels;
      Fragments fragments;
      load(fragments, block, channel);
#pragma unroll 1
      for (int step = at; step < stop; step += 8) step_back(step, stop, fragments, block, channel);  // loop: edges
    }
  }

  // The first 8 of them, and of these a block of fields and one of channels.
  __device__ __forceinline__ void step_back(int at, int stop, const Fragments& b, int block, int channel) {
    const bool first_fields = Tiles::blocks == 1 || block == 0, last_fields = block == Tiles::blocks - 1;
    const bool first_channels = Tiles::channels == 1 || channel == 0;
    const int mine = at + group, place = mine < stop ? mine : at;
    const bool there = mine < stop;
    float* const record = records + place * Memory::record;
    const auto geometry = neighbours<4>(record + Slots::degrees * S::width);
    const float u[3] = {geometry.at[0], geometry.at[1], geometry.at[2]};
    const float* const x = row_of(a.x, sources[place], p.in_size);
    float f[2][4], slots[2][Slots::count], d_u[3] = {}, parts[2] = {};  // parts: of l = 0 and of others
    typename Slots::Reverse back[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int v = 8 * block + 2 * pair + i;
      this->field(x + this->scalars[v], v, f[i]);
      Slots::evaluate(f[i], u, slots[i]);
    }
#pragma unroll
    for (int l = 0; l < Slots::degrees; ++l) {
      float* const of_degree = record + l * S::width + 8 * channel + 2 * pair;
      Neighbours<float, 2> c{};
      if (there) c = neighbours<2>(of_degree);
      Stacked by_channel;
      if constexpr (S::large)  // for want of registers
        by_channel.set(0, c.at[0]), by_channel.set(1, c.at[1]);
      else
        by_channel.place(0, c.at[0]), by_channel.place(1, c.at[1]);
      float d_c[4] = {};
#pragma unroll
      for (int slot = Slots::first(l); slot < Slots::first(l + 1); ++slot) {
        Stacked of_fields;
        of_fields.set(0, slots[0][slot]), of_fields.set(1, slots[1][slot]);
        if (slot < Fragments::by_field_slots)
          mma_stacked(d_c, of_fields, b.by_field[slot]);
        else
          mma_stacked(d_c, of_fields, by_field(opaque(d_t), slot, block, channel));
        float d[4] = {};
        mma_stacked(d, by_channel, b.by_channel[slot]);
#pragma unroll
        for (int i = 0; i < 2; ++i) back[i].add(slot, d[i] + d[2 + i], f[i], u, slots[i][4], d_u);
      }
      Neighbours<float, 2> of_block{d_c[0] + d_c[2], d_c[1] + d_c[3]};
      parts[l > 0 && !S::Mlp::is_table] += c.at[0] * of_block.at[0] + c.at[1] * of_block.at[1];
      float* const so_far = unfinished + (mine * Slots::degrees + l) * S::width + 8 * channel + 2 * pair;
      if (there && !first_fields) of_block = sum_of(neighbours<2>(so_far), of_block);
      if (there) neighbours<2>(last_fields ? of_degree : so_far) = of_block;
    }
    float of_factor = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      back[i].finish(f[i], u, d_u);
      const int v = 8 * block + 2 * pair + i;
      const auto d = neighbours<4>(of_constant + 4 * v);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float d_k = first_channels ? d.at[k] : 0;
        back[i].f[k] += d_k * geometry.at[3], of_factor += d_k * f[i][k];
      }
      if (there && a.grad_edge) store_field(edges[place], v, back[i].f, first_channels);
    }
    const float product = sum_lanes(parts[0] + parts[1] + geometry.at[3] * of_factor, 1, 4);
    float higher = 0;  // of edges near the origin, which tables do not treat apart
    if (!S::Mlp::is_table) higher = sum_lanes(parts[1], 1, 4);
#pragma unroll
    for (int k = 0; k < 3; ++k) d_u[k] = sum_lanes(d_u[k], 1, 4);
    if (!there || pair != 0) return;
    Neighbours<float, 4> sum{d_u[0], d_u[1], d_u[2], product};
    auto& to = neighbours<4>(moved + 4 * mine);
    const bool is_first = first_fields && first_channels;
    if (!S::Mlp::is_table) along[mine] = is_first ? higher : along[mine] + higher;
    to = is_first ? sum : sum_of(to, sum);
  }

  // `is_first`: in place of what is there, else added to it.
  __device__ __forceinline__ void store_field(int64_t edge, int v, const float (&d_f)[4], bool is_first) const {
    float* const row = a.grad_edge + edge * p.in_size;
    if (view.quads) {
      auto& to = neighbours<4>(row + this->scalars[v]);
      const Neighbours<float, 4> four{d_f[0], d_f[1], d_f[2], d_f[3]};
      if (v < view.n_scalars) to = is_first ? four : sum_of(to, four);
      return;
    }
    float &scalar = row[this->scalars[v]], *const vector = row + global_memory(view.vector)[v];
    if (v < view.n_scalars) scalar = is_first ? d_f[0] : scalar + d_f[0];
#pragma unroll
    for (int k = 0; k < 3; ++k)
      if (v < view.n_vectors) vector[k] = is_first ? d_f[1 + k] : vector[k] + d_f[1 + k];
  }

  // ---- the walk

  // Self: this kernel, or one derived from it with an edges_back() and a reverse() of its own.
  template <typename Self>
  __device__ __forceinline__ void walk(Self& self) {
    if (need_weights) gradients.clear();
    int node = this->target(first), end = this->index(a.rowptr, node + 1);
    bool goes_on = false;  // the node has edges in an earlier chunk
#pragma unroll 1
    for (int from = first; from < last; from += Base::of_chunk) {  // loop: chunks
      const int n = last - from < Base::of_chunk ? last - from : Base::of_chunk;
      edges[lane] = this->index(a.order, from + (lane < n ? lane : n - 1));
      if constexpr (S::large)  // for want of registers for a lane's places
        this->chunk(from, n, KeptLayers<S>{opaque(kept.memory)});
      else
        this->chunk(from, n, kept);
      for (int at = 0; at < n;) {  // loop: nodes
        const bool ends = end - from <= n;
        const int stop = ends ? end - from : n;
        if (!goes_on) start(node);
        if (need_weights && !a.node_sums) sum_edges(at, stop, goes_on, ends || from + n == last);
        __syncwarp();
        self.edges_back(at, stop);
        at = stop, goes_on = !ends;
        while (from + at < last && end == from + at) end = this->index(a.rowptr, ++node + 1);
      }
      __syncwarp();
      if (need_weights || this->need_geometry()) self.reverse(n);
    }
  }

  __device__ __forceinline__ void sum_edges(int at, int stop, bool goes_on, bool ends) {
    float* const aside = gradients.aside_of_lane();
    this->clear();
    if (goes_on) this->take_back(aside);
    add_edges(*this, at, stop);
    if (ends)
      add_theta();
    else
      this->put_aside(aside);
  }
};

// What a warp does with the sums that the forward pass kept. Of the kernel's numbers none is kept for it.
template <typename S>
__device__ __forceinline__ void add_node_sums(const FieldCall& call) {
  SHARED_MEMORY(float, memory);
  const int warp = thread_of_block() / 32, size = exact_backward_size<S>(call.plan);
  NodeSumGradients<S>(call, memory + ExactMemory<S>::warps_at + warp * size).add();
}

// A whole kernel; `warp`: an ExactBackward, or derived from one.
template <typename S, typename Warp>
__device__ __forceinline__ void run_warps(Warp& warp, const FieldCall& call) {
  if (warp.number < call.shape.warps) warp.walk(warp);
  if (!warp.need_weights) return;
  if (call.args.node_sums) add_node_sums<S>(call);
  const int warps = block_threads() / 32, begin = blockIdx.x * warps, left = call.shape.warps - begin;
  const ExactGradients<S> of_block(call.sums, begin, warp.p, warp.view);
  of_block.add_warps(left < warps ? left : warps);
  of_block.write(warp.view, warp.a.weights, warp.mlp, call.partial + int64_t{blockIdx.x} * warp.p.n_grad);
}

}  // namespace implicit_steer::IST_ISA
