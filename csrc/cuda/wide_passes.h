// The passes of a layer with many fields: the kernel MLP of every edge, then block by block of the nodes T, and its
// products with θ by a library.
#pragma once

#include <algorithm>

#include "edge_kernel.h"
#include "hidden.cuh"
#include "tile.h"
#include "wide_backward.cuh"
#include "wide_nodes.cuh"

namespace implicit_steer::IST_ISA {

// Of T, and of its gradient, of a block of nodes. Tests define fewer.
#ifndef IST_SUMS_BYTES
#define IST_SUMS_BYTES (int64_t{256} << 20)
#endif
constexpr int64_t kSumsBytes = IST_SUMS_BYTES;

// f(first node, nodes) for blocks of nodes, until one fails.
template <typename N, typename R, typename F>
Failure for_node_blocks(const DevicePlan<R>& plan, const ConvArgs<R>& args, F f) {
  const int64_t most = kSumsBytes / (static_cast<int64_t>(sizeof(N)) * plan.wide.sums);
  const int64_t size = std::max<int64_t>(std::min(most, args.n_dst), 1);
  for (int64_t first = 0; first < args.n_dst; first += size) IST_TRY(f(first, std::min(size, args.n_dst - first)));
  return {};
}

template <typename N>
class WidePass {
 public:
  using R = Real<N>;
  static constexpr int64_t kParts = sizeof(N) / sizeof(R);
  static constexpr bool kMayBeTiled = std::is_same_v<R, float>;

  // `tiled`: by the tile kernels, which are for float, with tangents or without.
  WidePass(const DevicePlan<R>& plan, const ConvArgs<R>& args, bool mean, bool tiled, void* stream)
      : plan_(plan), wide_(plan.wide), args_(args), tiled_(tiled), stream_(stream) {
    call_.args = args, call_.args.plan = nullptr, call_.plan = plan.view;
    call_.places = plan.places, call_.lists = plan.wide_view, call_.mean = mean;
  }

  Failure forward(const MeanAndBias<R>& after) {
    IST_TRY(tiled_ ? evaluate_rows() : evaluate());
    IST_TRY(place_features());
    if (args_.n_dst == 0) return {};
    const int64_t most = largest_block();
    call_.sums = take<R>(most * wide_.sums * kParts), call_.outputs = take<R>(most * wide_.outputs);
    return for_node_blocks<N>(plan_, args_, [&](int64_t first, int64_t n) -> Failure {
      call_.first_node = first, call_.n_nodes = n;
      IST_TRY(run_sums());
      for (const WidePlan::Matrices& m : wide_.matrices)
        if (!slot(m).depthwise)
          multiply({sums(m), theta(m), call_.outputs + slot(m).out_at * n, m.batch, rows(m), kParts * slot(m).size,
                    slot(m).n_out, false, true});
      return launch_threads("wide_outputs", wide_outputs<N>, n * plan_.view.out_size, stream_, call_, after);
    });
  }

  // Everything but two sums: over the rows of gradients, `rows`, of the weights before θ, and over the edges' gradients
  // of the features. `more`: numbers of memory behind the rows.
  Failure backward(int64_t more, GradientRows<R>& rows) {
    const bool need_hidden = args_.grad_delta || args_.grad_attr || args_.grad_weights;
    IST_TRY(tiled_ ? evaluate_rows() : evaluate());
    IST_TRY(place_features());
    const int64_t most = largest_block();
    R* const grad_outputs = take<R>(most * wide_.outputs);
    N* const grad_sums = take<N>(most * wide_.sums);
    call_.tangents_only = true, call_.grad_outputs = grad_outputs, call_.grad_sums = grad_sums;
    if (args_.grad_weights) call_.sums = take<R>(most * wide_.sums), theta_ = args_.grad_weights + wide_.theta;
    if (args_.grad_weights && most < args_.n_dst) theta_of_block_ = take<R>(n_theta());
    if (need_hidden && tiled_)
      grad_rows_ = take<N>(args_.n_edges * plan_.tile.record());
    else if (need_hidden)
      call_.grad_records = take<N>(args_.n_edges * wide_.record);
    IST_TRY(for_node_blocks<N>(plan_, args_, [&](int64_t first, int64_t n) -> Failure {
      call_.first_node = first, call_.n_nodes = n;
      IST_TRY(launch_threads("wide_grad_outputs", wide_grad_outputs<N>, n * wide_.outputs, stream_, call_,
                             wide_.outputs, grad_outputs));
      if (args_.grad_weights) IST_TRY(grad_theta(first > 0));
      IST_TRY(grad_of_sums(grad_sums));
      return run_backward();
    }));
    IST_TRY(clear_other_theta());
    if constexpr (kMayBeTiled)
      if (tiled_ && need_hidden) return run_tile_layers_backward(plan_, args_, grad_rows_, more, stream_, rows);
    return evaluate_backward(more, need_hidden, rows);
  }

  static int64_t backward_bytes(const DevicePlan<R>& plan) {
    return static_cast<int64_t>(sizeof(N)) * WideBackward<N>::size(plan.host);
  }

 private:
  const DevicePlan<R>& plan_;
  const WidePlan& wide_;
  const ConvArgs<R>& args_;
  const bool tiled_;
  void* const stream_;
  WideCall<N> call_{};
  R *theta_ = nullptr, *theta_of_block_ = nullptr;
  N *rows_ = nullptr, *grad_rows_ = nullptr;  // of the tile kernels

  template <typename T>
  T* take(int64_t n) const {
    return static_cast<T*>(args_.scratch(std::max<int64_t>(n, 1) * sizeof(T)));
  }
  int64_t largest_block() const {
    int64_t most = 0;
    for_node_blocks<N>(plan_, args_, [&](int64_t, int64_t n) { return most = std::max(most, n), Failure{}; });
    return most;
  }

  // ---- the kernel MLP, and the features by field type

  ConvArgs<R> points() const {
    ConvArgs<R> a = args_;
    a.x = a.x_tangent = nullptr, a.src = a.order = a.rowptr = a.order_by_source = a.colptr = nullptr;
    a.out = a.grad_x = a.grad_edge = nullptr, a.grad_out = nullptr;
    return a;
  }
  EdgeRecords<R> records() const { return {nullptr, nullptr, wide_.stride, wide_.g, wide_.record}; }

  Failure evaluate() {
    EdgeKernel<N> edges{"conv_hidden", conv_hidden<N>, {}, 0};
    IST_TRY(edges.prepare(plan_, points(), {false, false}, 0, kAnyWarps));
    N* const made = take<N>(args_.n_edges * wide_.record);
    edges.call.records = records(), edges.call.records.at = reinterpret_cast<R*>(made), call_.records = made;
    return edges.run(stream_);
  }

  // The same by the tile kernels
  Failure evaluate_rows() {
    if constexpr (kMayBeTiled) {
      rows_ = take<N>(args_.n_edges * plan_.tile.record());
      return run_tile_layers(plan_, args_, rows_, stream_);
    }
    return {};
  }

  Failure place_features() {
    if (!is_dual<N> && gathered_as_given(plan_.host)) return call_.x = reinterpret_cast<const N*>(args_.x), Failure{};
    N* const x = take<N>(args_.n_src * plan_.view.n_gathered);
    call_.x = x;
    return launch_threads("wide_features", wide_features<N>, args_.n_src * plan_.view.n_gathered, stream_, call_, x);
  }

  Failure evaluate_backward(int64_t more, bool needed, GradientRows<R>& rows) const {
    EdgeKernel<N> edges{"conv_hidden_backward", conv_hidden_backward<N>, {}, 0};
    const int64_t n_grad = args_.grad_weights ? wide_.theta : 0;
    const int64_t most = n_grad ? most_warps_with<R>(n_grad) : kAnyWarps;
    IST_TRY(edges.prepare(plan_, points(), {false, true}, 0, most));
    edges.call.plan.n_grad = wide_.theta;
    edges.call.partial = take<R>(n_grad * edges.call.shape.warps + more);
    rows = {edges.call.partial, needed ? edges.call.shape.warps : 0, n_grad};
    edges.call.records = records(), edges.call.records.grad = reinterpret_cast<const R*>(call_.grad_records);
    return needed ? edges.run(stream_) : Failure{};
  }

  // ---- T, and its products with θ

  const WideSlot& slot(const WidePlan::Matrices& m) const { return wide_.slots[m.first]; }
  int64_t rows(const WidePlan::Matrices& m) const { return (m.last - m.first) / m.batch * call_.n_nodes; }
  const R* theta(const WidePlan::Matrices& m) const { return args_.weights + kParts * slot(m).theta; }
  const R* sums(const WidePlan::Matrices& m) const {
    return call_.sums + (call_.tangents_only ? 1 : kParts) * slot(m).at * call_.n_nodes;
  }
  int64_t n_theta() const { return plan_.view.n_grad - wide_.theta; }
  void multiply(const MatrixProducts<R>& product) const { args_.multiply(product); }

  Failure run_sums() const {
    if constexpr (kMayBeTiled)
      if (tiled_) return run_tile_sums(plan_, call_, rows_, stream_);
    return launch_threads("wide_sums", wide_sums<N>, 32 * call_.n_nodes * call_.lists.n_slots, stream_, call_);
  }

  // dθ of a block of nodes; `added`: to that of the blocks before it.
  Failure grad_theta(bool added) {
    IST_TRY(run_sums());
    R* const into = added ? theta_of_block_ : theta_;
    for (const WidePlan::Matrices& m : wide_.matrices) {
      R* const out = into + (slot(m).theta - wide_.theta);
      const R* const grad = call_.grad_outputs + slot(m).out_at * call_.n_nodes;
      if (slot(m).depthwise) {
        const dim3 grid((slot(m).size + kGradColumns - 1) / kGradColumns), block(kGradColumns, kGradRows);
        IST_TRY(launch("wide_grad_theta_depthwise", wide_grad_theta_depthwise<N>, grid, block, 0, stream_, call_,
                       m.first, m.last, out));
      } else {
        multiply({grad, sums(m), out, m.batch, slot(m).n_out, rows(m), slot(m).size, true, false});
      }
    }
    return added ? launch_threads("add_numbers", add_numbers<R>, n_theta(), stream_, theta_, into, n_theta())
                 : Failure{};
  }

  // The gradient's numbers behind those of θ's first layout, and these, too, without a node.
  Failure clear_other_theta() const {
    if (!args_.grad_weights) return {};
    const int64_t first = args_.n_dst > 0 ? plan_.view.n_grad : wide_.theta, n = plan_.view.n_weights - first;
    return launch_threads("clear_numbers", clear_numbers<R>, n, stream_, args_.grad_weights + first, n);
  }

  Failure grad_of_sums(N* grad_sums) const {
    for (const WidePlan::Matrices& m : wide_.matrices) {
      const int64_t n = call_.n_nodes;
      for (int s = m.first; s < m.last && slot(m).depthwise; ++s)
        IST_TRY(launch_threads("wide_grad_sums_depthwise", wide_grad_sums_depthwise<N>, n * slot(m).size, stream_,
                               call_, s, grad_sums));
      if (!slot(m).depthwise)
        multiply({call_.grad_outputs + slot(m).out_at * n, theta(m), reinterpret_cast<R*>(grad_sums + slot(m).at * n),
                  m.batch, rows(m), slot(m).n_out, kParts * slot(m).size, false, false});
    }
    return {};
  }

  Failure run_backward() const {
    if constexpr (kMayBeTiled)
      if (tiled_) return run_tile_backward(plan_, call_, rows_, grad_rows_, stream_);
    constexpr const char* name = "wide_backward";
    const int64_t warp_bytes = backward_bytes(plan_);
    const auto kernel = wide_backward<N>;
    LaunchFacts found{};
    IST_TRY(plan_.prepare(reinterpret_cast<const void*>(kernel), found, [&]() -> Failure {
      Device device;
      IST_TRY(device.read());
      found.warps_per_block = static_cast<int>(std::min<int64_t>(kThreads / 32, device.block_bytes / warp_bytes));
      if (found.warps_per_block == 0) return {name, "a block's shared memory is too small for the plan"};
      return failure(name,
                     cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.block_bytes));
    }));
    const int64_t warps = (args_.n_edges + kEdgesPerWarp - 1) / kEdgesPerWarp, of_block = found.warps_per_block;
    const dim3 grid(static_cast<unsigned>((warps + of_block - 1) / of_block));
    return launch(name, kernel, grid, dim3(static_cast<unsigned>(32 * of_block)), of_block * warp_bytes, stream_,
                  call_);
  }
};

}  // namespace implicit_steer::IST_ISA
