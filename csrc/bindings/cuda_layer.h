// A layer on CUDA tensors: one launch packs its weights at every call, from where parameters and running statistics
// lie. To ask whether they hold the same bytes as before would be to wait for the device.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "bound_layer.h"
#include "conv_call.h"
#include "cuda_device.h"

namespace implicit_steer {

template <typename R>
class CudaLayer final : public Layer {
 public:
  static bool takes(const LayerTensors& t) {
    return std::max(t.learned.size(), t.running.size()) <= static_cast<size_t>(Pieces<R>::kMost);
  }

  explicit CudaLayer(const LayerTensors& t)
      : learned_(pieces_of<R>(t.learned, "parameters")), bias_(t.bias, "bias"), expansion_(t.expansion), mean_(t.mean) {
    const Context context(t.learned.front());
    plan_ = &device_plan<R>(context, t.ints, t.reals), view_ = kernels<R>().plan_view(plan_);
    matrix_ = &device_matrix<R>(context, *view_, t.rowptr, t.column, t.value);
    for (const Piece<R>& p : learned_) parameters_.add(p.at, p.size);
    check_size(view_->n_parameters, parameters_.first[parameters_.n], "parameters");
    check(expansion_, "expansion", real_type<R>, view_->out_size * bias_.size);
    const auto running = pieces_of<R>(t.running, "running statistics");
    check_running(*view_, t, running);
    for (const Piece<R>& p : running) norms_.running.add(p.at, p.size);
    norms_.trivial = device_columns(context, t.trivial);
  }

  LayerOutput forward(const BoundGraph& graph, const LayerInputs& in, LayerMode mode) override {
    const auto [measured, recorded, kept] = mode;
    Call<Cuda<R>> call(in.delta, in.attr, *plan_, in.delta);
    Tensor packed = new_empty(in.delta, {view_->n_weights}), statistics = packed;
    if (measured) {
      call.check_measurable();
      statistics = call.device.zeros(in.delta, {view_->n_layers, statistics_size(*view_)});
      call.device.statistics(call.args, *matrix_, parameters_, mutable_data<R>(packed), mutable_data<R>(statistics));
    } else if (recorded) {
      statistics = new_empty(in.delta, {view_->has_norms ? view_->n_layers : 0, statistics_size(*view_)});
    }
    call.weights(packed), call.graph(in.x, graph.src, graph.order, graph.rowptr);
    Tensor out = call.output(in.x, call.args.n_dst, view_->out_size), sums = out;
    if (recorded) {
      sums = new_empty(in.delta, {kept ? node_sums_size(call) : 0});
      call.args.node_sums = mutable_data<R>(sums);
    }
    if (measured)
      call.device.forward(call.args, data<R>(expansion_), bias_.at, bias_.size, mean_);
    else
      call.device.layer_forward(call.args, mean_and_bias(), *matrix_, parameters_, norms_, mutable_data<R>(packed),
                                recorded ? mutable_data<R>(statistics) : nullptr);
    return {out, packed, statistics, sums};
  }

  LayerGradients gradients(const BoundGraph& graph, const LayerInputs& in, const LayerRecord& record,
                           const Tensor& grad_out, LayerNeeds needs) override {
    Call<Cuda<R>> call(in.delta, in.attr, *plan_, in.delta);
    const Tensor &statistics = record.statistics, &sums = record.node_sums;
    call.weights(record.packed), call.graph(in.x, graph.src, graph.order, graph.rowptr), call.grad_of_nodes(grad_out);
    if (needs.x) call.by_source(graph.order_by_source, graph.colptr);
    call.device.check(statistics, "statistics", real_type<R>,
                      view_->has_norms ? view_->n_layers * statistics_size(*view_) : 0);
    if (sums.numel() > 0 && needs.parameters) {
      call.device.check(sums, "node_sums", real_type<R>, call.device.node_sums_size(call.args));
      call.args.node_sums = static_cast<R*>(sums.mutable_data_ptr());  // which is only read
    }
    const Gradients grads = call.gradients(in.x, {needs.x, needs.delta, needs.attr, needs.parameters});
    Tensor of_bias = new_empty(in.x, {bias_.size});
    std::vector<Tensor> of_parameters;
    Pieces<R> pieces{};
    for (const Piece<R>& p : learned_) {
      if (!needs.parameters) break;
      Tensor& made = of_parameters.emplace_back(new_empty(in.x, shape_of(p), dtype_of(in.x)));
      pieces.add(mutable_data<R>(made), p.size);
    }
    call.device.layer_backward(call.args, mean_and_bias(), *matrix_, data<R>(statistics), pieces,
                               mutable_data<R>(of_bias));
    return {grads.x, grads.delta, grads.attr, of_bias, of_parameters};
  }

 private:
  // A node's sums take the memory of some hundred numbers, which edges share: where each node has a few of them alone,
  // the backward pass forms the sums again.
  static constexpr int64_t kEdgesOfNode = 16;
  static int64_t node_sums_size(const Call<Cuda<R>>& call) {
    return call.args.n_edges < kEdgesOfNode * call.args.n_dst ? 0 : call.device.node_sums_size(call.args);
  }
  MeanAndBias<R> mean_and_bias() const { return {data<R>(expansion_), bias_.at, bias_.size, mean_}; }

  const std::vector<Piece<R>> learned_;
  const Piece<R> bias_;
  const Tensor expansion_;
  const bool mean_;
  const DevicePlan<R>* plan_;  // these three are kept for good
  const PlanView<R>* view_;
  const HeldMatrix<R>* matrix_;
  Pieces<const R> parameters_{};
  NormStatistics<R> norms_{};
};

}  // namespace implicit_steer
