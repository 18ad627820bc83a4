// The entry points for one kind of number: IST_REAL, in the table IST_TABLE. Compiled once for float, once for double.

#include "../packing.h"
#include "backward.cuh"
#include "edge_kernel.h"
#include "exact.h"
#include "forward.cuh"
#include "grid.h"
#include "hidden.cuh"
#include "library.h"
#include "statistics.cuh"
#include "vectors.cuh"
#include "wide_passes.h"

namespace implicit_steer::IST_ISA {

namespace {

using R = IST_REAL;

// Memory of a call for `n` numbers of every warp and `more`; at least one number.
R* partial_results(const ConvArgs<R>& args, const Shape& shape, int64_t n, int64_t more = 0) {
  return static_cast<R*>(args.scratch(std::max<int64_t>(n * shape.warps + more, 1) * sizeof(R)));
}

int64_t most_warps(const PlanView<R>& plan) { return most_warps_with<R>(plan.n_grad); }

// Which of them serve a plan, forward or backward, in the order of KernelKind's names.
enum class Kernels { kExact, kGrid, kTiled, kWide, kGeneric };
template <typename N>
Kernels kernels_of(const DevicePlan<R>& plan, bool backward) {
  if constexpr (std::is_same_v<N, float>) {
    if (has_exact_kernel(plan, backward)) return Kernels::kExact;
    if (backward ? has_grid_backward(plan) : plan.grid.fields > 0) return Kernels::kGrid;
  }
  if constexpr (std::is_same_v<R, float>)
    if (has_tile_kernels<N>(plan, backward)) return Kernels::kTiled;
  if (plan.wide.used) return Kernels::kWide;
  return Kernels::kGeneric;
}

// The launch of the plan's exact or grid kernel; `found`: whether one serves the call.
template <typename N>
Failure prepare_fused_forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, FieldLaunch& launch, bool& found) {
  if constexpr (std::is_same_v<N, float>) {
    const Kernels kernels = kernels_of<N>(plan, false);
    found = can_count(args) && (kernels == Kernels::kExact || kernels == Kernels::kGrid);
    if (found && kernels == Kernels::kExact) return prepare_exact_forward(plan, args, launch);
    if (found) return prepare_grid_forward(plan, args, launch);
  }
  return {};
}

// As CudaTable says.
int64_t node_sums_size(const DevicePlan<R>& plan, const ConvArgs<R>& args) {
  if constexpr (std::is_same_v<R, float>) {
    FieldLaunch fused{};
    bool found = false;
    if (args.n_edges == 0 || kernels_of<R>(plan, true) != kernels_of<R>(plan, false)) return 0;
    // What cannot be prepared fails once more where it is to run.
    if (prepare_fused_forward<R>(plan, args, fused, found).reason || !found) return 0;
    return kInFrontOfNodeSums + (args.n_dst + fused.call.shape.warps) * fused.node_sum;
  }
  return 0;
}

template <typename N>
Failure run_forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream, Call<R>& call) {
  EdgeKernel<N> edges{"conv_forward", conv_forward<N>, {}, 0};
  IST_TRY(edges.prepare(plan, args, {true, false}, forward_rest(plan), kAnyWarps));
  edges.call.partial = partial_results(args, edges.call.shape, 2 * plan.view.out_size);
  call = edges.call;
  return edges.run(stream);
}

template <typename N>
Failure forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, const MeanAndBias<R>& after, void* stream) {
  const bool tiled = can_count(args) && kernels_of<N>(plan, false) == Kernels::kTiled;
  if (tiled || plan.wide.used) return WidePass<N>(plan, args, after.mean, tiled, stream).forward(after);
  Call<Real<N>> call{};
  FieldLaunch fused{};
  bool found = false;
  IST_TRY(prepare_fused_forward<N>(plan, args, fused, found));
  if constexpr (std::is_same_v<N, float>) {
    if (found) fused.give_memory();
    call = fused.call;
  }
  IST_TRY(found ? fused.run(stream) : run_forward<N>(plan, args, stream, call));
  return launch_threads("mean_and_bias", mean_and_bias<R>, args.n_dst * plan.view.out_size, stream, call, after);
}
Failure forward_tangent(const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream) {
  return forward<Dual<R>>(plan, args, {}, stream);
}

// launch(tag of the indices' type)
template <typename Launch>
Failure with_index(const ConvArgs<R>& a, Launch launch) {
  return a.index64 ? launch(static_cast<int64_t*>(nullptr)) : launch(static_cast<int32_t*>(nullptr));
}

// Of the kernel of a backward pass: sums over its rows of gradients of the weights, [n_weights], 0 in the second layout
// of θ, over the edges' gradients of the features, and, into `of_nodes` unless that is null, over chunks of nodes.
constexpr int64_t kNodesPerChunk = 2048;
int64_t node_chunks(const ConvArgs<R>& a) { return (a.n_dst + kNodesPerChunk - 1) / kNodesPerChunk; }

Failure sum_results(const GradientRows<R>& rows, const DevicePlan<R>& plan, const ConvArgs<R>& a, R* of_nodes,
                    void* stream) {
  const int64_t width = plan.view.out_size;
  const RowSums<R, R> weights{rows.at,        rows.n,
                              rows.size,      std::max<int64_t>(rows.n, 1),
                              a.grad_weights, rows.size == plan.view.n_grad ? plan.view.n_weights : rows.size};
  const RowSums<R, R> nodes{a.grad_out, a.n_dst, width, kNodesPerChunk, of_nodes, width};
  const int64_t first = a.grad_weights ? weights.tiles() : 0, second = nodes.blocks();
  return with_index(a, [&](auto* tag) {
    using Index = std::remove_pointer_t<decltype(tag)>;
    const SourceSums<R, Index> features{a.grad_edge,
                                        static_cast<const Index*>(a.order_by_source),
                                        static_cast<const Index*>(a.colptr),
                                        a.n_src,
                                        plan.view.in_size,
                                        a.grad_x};
    const dim3 grid(static_cast<unsigned>(first + second + features.blocks())), block(kColumns, kRows);
    return launch("sum_gradients", sum_gradients<R, Index>, grid, block, 0, stream, weights, nodes, first, second,
                  features);
  });
}

// `more`: numbers of memory behind the rows of gradients, one of each warp.
template <typename N>
Failure run_backward(EdgeKernel<N>& edges, const DevicePlan<R>& plan, const ConvArgs<R>& args, Needs needs,
                     int64_t rest, int64_t more, void* stream, GradientRows<R>& rows) {
  const int64_t n_grad = args.grad_weights ? plan.view.n_grad : 0;
  IST_TRY(edges.prepare(plan, args, needs, rest, args.grad_weights ? most_warps(plan.view) : kAnyWarps));
  edges.call.partial = partial_results(args, edges.call.shape, n_grad, more);
  rows = {edges.call.partial, edges.call.shape.warps, plan.view.n_grad};
  return edges.run(stream);
}

// The kernel chosen as on the way forward; `mean` as in Call, `more` as above.
template <typename N>
Failure run_conv_backward(const DevicePlan<R>& plan, const ConvArgs<R>& args, bool mean, int64_t more, void* stream,
                          GradientRows<R>& rows) {
  if constexpr (std::is_same_v<N, float>) {
    const Kernels kernels = kernels_of<N>(plan, true);
    if (can_count(args) && kernels == Kernels::kExact) return run_exact_backward(plan, args, mean, more, stream, rows);
    if (can_count(args) && kernels == Kernels::kGrid) return run_grid_backward(plan, args, mean, more, stream, rows);
  }
  const bool tiled = can_count(args) && kernels_of<N>(plan, true) == Kernels::kTiled;
  if (tiled || plan.wide.used) return WidePass<N>(plan, args, mean, tiled, stream).backward(more, rows);
  EdgeKernel<N> edges{"conv_backward", conv_backward<N>, {}, 0};
  edges.call.mean = mean;
  return run_backward(edges, plan, args, {true, true}, backward_rest(plan), more, stream, rows);
}

template <typename N>
Failure backward(const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream) {
  GradientRows<R> rows{};
  IST_TRY(run_conv_backward<N>(plan, args, false, 0, stream, rows));
  return sum_results(rows, plan, args, nullptr, stream);
}

Failure unpack(const DevicePlan<R>& plan, const SparseMatrix<R>& transposed, const R* statistics, const R* grad_packed,
               const Pieces<R>& grad_parameters, const BiasGradient<R>& bias, void* stream) {
  return launch_threads("unpack_gradients", unpack_gradients<R>, transposed.n_rows + bias.n, stream, plan.view,
                        transposed, statistics, grad_packed, grad_parameters, bias);
}

Failure layer_backward(const DevicePlan<R>& plan, const ConvArgs<R>& args, const MeanAndBias<R>& after,
                       const SparseMatrix<R>& transposed, const R* statistics, const Pieces<R>& grad_parameters,
                       R* grad_bias, void* stream) {
  GradientRows<R> rows{};
  const int64_t chunks = node_chunks(args), width = plan.view.out_size, more = after.n > 0 ? chunks * width : 0;
  IST_TRY(run_conv_backward<R>(plan, args, after.mean, more, stream, rows));
  R* const of_nodes = more > 0 ? rows.at + (args.grad_weights ? rows.size * rows.n : 0) : nullptr;
  IST_TRY(sum_results(rows, plan, args, of_nodes, stream));
  SparseMatrix<R> used = transposed;
  if (!args.grad_weights) used.n_rows = 0;
  const BiasGradient<R> bias{after.expansion, of_nodes, chunks, width, after.n, grad_bias};
  return unpack(plan, used, statistics, args.grad_weights, grad_parameters, bias, stream);
}

template <typename N>
Failure hidden_forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream) {
  EdgeKernel<N> points{"conv_hidden", conv_hidden<N>, {}, 0};
  IST_TRY(points.prepare(plan, args, {false, false}, 0, kAnyWarps));
  return points.run(stream);
}

template <typename N>
Failure hidden_backward(const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream) {
  EdgeKernel<N> points{"conv_hidden_backward", conv_hidden_backward<N>, {}, 0};
  GradientRows<R> rows{};
  IST_TRY(run_backward(points, plan, args, {false, true}, 0, 0, stream, rows));
  return sum_results(rows, plan, args, nullptr, stream);
}

// Of one batch norm's input after another: sums, [2, size] in double, and what was subtracted, [size].
struct NormSums {
  EdgeKernel<R> points{"conv_statistics", conv_statistics<R>, {}, 0};
  int channels = 0, size = 0;
  double* sums = nullptr;
  R* shift = nullptr;

  Failure prepare(const DevicePlan<R>& plan, const ConvArgs<R>& args, const R* packed) {
    channels = norm_channels(plan.host), size = norm_input_size(plan.host);
    IST_TRY(points.prepare(plan, args, {false, false}, statistics_rest(plan), kAnyWarps));
    const int64_t warps = points.call.shape.warps, doubles = 2 * size * (sizeof(double) / sizeof(R));
    sums = reinterpret_cast<double*>(partial_results(args, points.call.shape, 2 * size, size + doubles));
    points.call.partial = reinterpret_cast<R*>(sums + 2 * size), shift = points.call.partial + 2 * size * warps;
    points.call.args.weights = packed;
    return {};
  }
  Failure run(int layer, void* stream) {
    points.call.args.layer = layer;
    IST_TRY(points.run(stream));
    const int64_t warps = points.call.shape.warps;
    const RowSums<R, double> over_warps{points.call.partial,         warps, 2 * size,
                                        std::max<int64_t>(warps, 1), sums,  2 * size};
    const dim3 grid(static_cast<unsigned>(over_warps.tiles())), block(kColumns, kRows);
    return launch("sum_rows", sum_rows<R, double>, grid, block, 0, stream, over_warps);
  }
};

Failure statistics(const DevicePlan<R>& plan, const ConvArgs<R>& args, const Pieces<const R>& parameters, R* packed,
                   R* statistics, void* stream) {
  NormSums found;
  IST_TRY(found.prepare(plan, args, packed));
  for (int n = 0; n < plan.view.n_layers; ++n) {
    IST_TRY(found.run(n, stream));
    IST_TRY(launch_threads("norm_statistics", norm_statistics<R>, found.channels, stream, plan.view, n, found.sums,
                           found.shift, static_cast<double>(args.n_edges), parameters, statistics, packed));
  }
  return {};
}

Failure moments(const DevicePlan<R>& plan, const ConvArgs<R>& args, R* moments, void* stream) {
  NormSums found;
  IST_TRY(found.prepare(plan, args, args.weights));
  IST_TRY(found.run(args.layer, stream));
  return launch_threads("norm_moments", norm_moments<R>, found.size, stream, plan.view, found.size, found.sums,
                        found.shift, static_cast<double>(args.n_edges), moments);
}

Failure run_pack(const DevicePlan<R>& plan, const SparseMatrix<R>& matrix, const Pieces<const R>& parameters,
                 const NormStatistics<R>& norms, R* packed, R* statistics, const NodeStart<R>& start, void* stream) {
  const int64_t more = (statistics ? plan.view.n_layers * statistics_size(plan.host) : 0) + start.size();
  return launch_threads("pack_weights", pack_weights<R>, matrix.n_rows + more, stream, plan.view, matrix, parameters,
                        norms, packed, statistics, start);
}
Failure pack(const DevicePlan<R>& plan, const SparseMatrix<R>& matrix, const Pieces<const R>& parameters,
             const NormStatistics<R>& norms, R* packed, R* statistics, void* stream) {
  return run_pack(plan, matrix, parameters, norms, packed, statistics, {}, stream);
}

template <typename N>
Failure layer_forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, const MeanAndBias<R>& after,
                      const SparseMatrix<R>& matrix, const Pieces<const R>& parameters, const NormStatistics<R>& norms,
                      R* packed, R* statistics, void* stream) {
  if constexpr (std::is_same_v<N, float>) {
    FieldLaunch edges{};
    bool found = false;
    if (args.n_edges > 0) IST_TRY(prepare_fused_forward<N>(plan, args, edges, found));
    if (found) {
      edges.give_memory();
      const int64_t warps = edges.call.shape.warps, width = plan.view.out_size;
      float* const bias = edges.call.partial + 2 * warps * width;
      edges.call.bias = bias, edges.call.arrivals = reinterpret_cast<int32_t*>(bias + width);
      edges.call.mean = after.mean;
      const NodeStart<N> start{after, bias, width, edges.call.arrivals, warps};
      IST_TRY(run_pack(plan, matrix, parameters, norms, packed, statistics, start, stream));
      return edges.run(stream);
    }
  }
  IST_TRY(pack(plan, matrix, parameters, norms, packed, statistics, stream));
  return forward<N>(plan, args, after, stream);
}

Failure pack_backward(const DevicePlan<R>& plan, const SparseMatrix<R>& transposed, const R* statistics,
                      const R* grad_packed, const Pieces<R>& grad_parameters, void* stream) {
  return unpack(plan, transposed, statistics, grad_packed, grad_parameters, {}, stream);
}

Failure pairs_of_weights(const DevicePlan<R>& plan, const R* weights, const R* tangent, R* pairs, void* stream) {
  return launch_threads("pair_weights", pair_weights<R>, plan.view.n_weights, stream, plan.view, weights, tangent,
                        pairs);
}

// A block has at least one warp, and that at least one edge.
template <typename N>
int64_t least_bytes(const DevicePlan<R>& plan, Needs needs, int64_t rest) {
  return kBlockBytes + static_cast<int64_t>(sizeof(N)) * shape_of<N>(plan.host, plan.extent, needs, rest, 32).warp_size;
}

int64_t shared_bytes(const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals) {
  DevicePlan<R> plan;
  if (!plan.read(ints, n_ints, reals, n_reals)) return -1;
  const int64_t statistics = least_bytes<R>(plan, {false, false}, statistics_rest(plan));
  const Needs needs{!plan.wide.used, true};
  const int64_t backward = least_bytes<Dual<R>>(plan, needs, plan.wide.used ? 0 : backward_rest(plan));
  const int64_t wide = plan.wide.used ? WidePass<Dual<R>>::backward_bytes(plan) : 0;
  return std::max({backward, statistics, wide});
}

KernelKind kernel_kind(const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals, Pass pass) {
  constexpr const char* names[] = {"exact", "grid", "tiled", "wide", "generic"};
  DevicePlan<R> plan;
  if (!plan.read(ints, n_ints, reals, n_reals)) return {nullptr, nullptr};
  const Kernels kernels =
      pass == Pass::kSecond ? kernels_of<Dual<R>>(plan, true) : kernels_of<R>(plan, pass == Pass::kBackward);
  KernelKind found{names[static_cast<int>(kernels)], ""};
  if (kernels == Kernels::kExact || kernels == Kernels::kGrid) return found;
  const FieldPlan& fields = plan.of_fields();
  found.why_not = fields.fields == 0 ? plan.why_not
                  : fields.reads_all ? "layers too large for the faster one"
                                     : "inputs that no product reads";
  return found;
}

}  // namespace

extern const CudaTable<R> IST_TABLE;
const CudaTable<R> IST_TABLE{plan_bytes<R>,
                             plan_create<R>,
                             plan_destroy<R>,
                             plan_view_of<R>,
                             shared_bytes,
                             forward<R>,
                             backward<R>,
                             layer_forward<R>,
                             layer_backward,
                             node_sums_size,
                             forward_tangent,
                             backward<Dual<R>>,
                             hidden_forward<R>,
                             hidden_backward<R>,
                             hidden_forward<Dual<R>>,
                             hidden_backward<Dual<R>>,
                             statistics,
                             moments,
                             pack,
                             pack_backward,
                             pairs_of_weights,
                             kernel_kind};

}  // namespace implicit_steer::IST_ISA
