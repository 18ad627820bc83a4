// A layer on CPU tensors: its weights are packed again only when a parameter or a running statistic holds other bytes
// than at the call before.
#pragma once

#include <algorithm>
#include <cstring>
#include <mutex>
#include <tuple>
#include <vector>

#include "bound_layer.h"
#include "conv_call.h"
#include "cpu_device.h"

namespace implicit_steer {

// The gradients of the sums over the edges, and of the bias [n]; see Cpu::forward(). expansion: [C_out, n].
template <typename R>
void mean_and_bias_backward(ConvArgs<R>& a, const R* expansion, int64_t n, bool mean, std::vector<R>& of_sums,
                            R* of_bias) {
  const int64_t width = a.plan->out_size;
  std::vector<R> total(width);
  if (mean) of_sums.resize(a.n_dst * width);
  for (int64_t i = 0; i < a.n_dst; ++i)
    for (int64_t k = 0; k < width; ++k) {
      const R g = a.grad_out[i * width + k];
      total[k] += g;
      if (mean) of_sums[i * width + k] = g / divisor(a, i);
    }
  if (mean) a.grad_out = of_sums.data();
  std::fill_n(of_bias, n, R{});
  for (int64_t k = 0; k < width * n; ++k) of_bias[k % n] += expansion[k] * total[k / n];
}

// The backward pass of a layer; `parameters` gives the shapes of their gradients.
template <typename R, typename Parameter>
LayerGradients layer_gradients(Call<Cpu<R>>& call, const Tensor& like, const SparseMatrix<R>& matrix,
                               const std::vector<Parameter>& parameters, const R* statistics, const R* expansion,
                               int64_t n_bias, bool mean, LayerNeeds needs) {
  const PlanView<R>& plan = call.plan;
  Gradients grads = call.gradients(like, {needs.x, needs.delta, needs.attr, needs.parameters});
  Tensor of_bias = new_empty(like, {n_bias});
  std::vector<R> of_sums;
  mean_and_bias_backward(call.args, expansion, n_bias, mean, of_sums, mutable_data<R>(of_bias));
  call.run(call.device.table().backward);
  std::vector<Tensor> of_parameters;
  if (needs.parameters) {
    std::vector<R> flat(plan.n_parameters);
    call.device.pack_backward(matrix, statistics, call.args.grad_weights, flat.data());
    of_parameters.reserve(parameters.size());
    const R* next = flat.data();
    for (const Parameter& p : parameters) {
      Tensor& made = of_parameters.emplace_back(new_empty(like, shape_of(p), dtype_of(like)));
      std::copy_n(next, made.numel(), mutable_data<R>(made));
      next += made.numel();
    }
  }
  return {grads.x, grads.delta, grads.attr, of_bias, of_parameters};
}

template <typename R>
class CpuLayer final : public Layer {
 public:
  explicit CpuLayer(const LayerTensors& t)
      : held_{t.ints, t.reals, t.rowptr, t.column, t.value, t.trivial, t.expansion},
        learned_(pieces_of<R>(t.learned, "parameters")),
        running_(pieces_of<R>(t.running, "running statistics")),
        expansion_(t.expansion, "expansion"),
        bias_(t.bias, "bias"),
        mean_(t.mean),
        isa_(t.isa) {
    read_plan(plan_, t.ints, t.reals);
    matrix_ = matrix_of(plan_, t.rowptr, t.column, t.value);
    int64_t n = 0;
    for (const Piece<R>& p : learned_) n += p.size;
    check_size(plan_.n_parameters, n, "parameters");
    check_size(plan_.out_size * bias_.size, expansion_.size, "expansion");
    check_running(plan_, t, running_);
    for (const Piece<R>& p : running_) n += p.size;
    copy_.resize(n);
  }

  LayerOutput forward(const BoundGraph& graph, const LayerInputs& in, LayerMode mode) override {
    Call<Cpu<R>> call(in.delta, in.attr, plan_, isa_);
    const Weights used = mode.measured ? measure(call, in.delta) : weights(call, mode.recorded);
    call.args.weights = data<R>(used.packed);
    call.graph(in.x, graph.src, graph.order, graph.rowptr);
    Tensor out = call.output(in.x, call.args.n_dst, plan_.out_size);
    call.device.forward(call.args, expansion_.at, bias_.at, bias_.size, mean_);
    return {out, used.packed, used.statistics, mode.recorded ? new_empty(in.delta, {0}) : out};
  }

  LayerGradients gradients(const BoundGraph& graph, const LayerInputs& in, const LayerRecord& record,
                           const Tensor& grad_out, LayerNeeds needs) override {
    Call<Cpu<R>> call(in.delta, in.attr, plan_, isa_);
    const Tensor& statistics = record.statistics;
    call.weights(record.packed), call.graph(in.x, graph.src, graph.order, graph.rowptr), call.grad_of_nodes(grad_out);
    if (needs.x) call.by_source(graph.order_by_source, graph.colptr);
    check(statistics, "statistics", real_type<R>, plan_.n_layers * statistics_size(plan_));
    return layer_gradients(call, in.x, matrix_, learned_, data<R>(statistics), expansion_.at, bias_.size, mean_, needs);
  }

 private:
  struct Weights {
    Tensor packed, statistics;
  };
  const std::vector<Tensor> held_;  // what plan_, matrix_ and expansion_ view
  Plan<R> plan_{};
  SparseMatrix<R> matrix_{};
  const std::vector<Piece<R>> learned_, running_;
  const Piece<R> expansion_, bias_;
  const bool mean_;
  const int64_t isa_;
  std::mutex mutex_;     // of what follows
  std::vector<R> copy_;  // the parameters, then the running statistics
  Weights weights_;      // at these
  bool is_packed_ = false, was_recorded_ = false;

  const Tensor& reals() const { return held_[1]; }

  Tensor empty_statistics() const {
    return new_empty(reals(), {plan_.has_norms ? plan_.n_layers : 0, statistics_size(plan_)});
  }

  // Calls f(piece, its place in copy_) until f returns false; whether it never did.
  template <typename F>
  bool for_pieces(F f) {
    R* next = copy_.data();
    for (const auto* pieces : {&learned_, &running_})
      for (const Piece<R>& p : *pieces) {
        if (p.size && !f(p, next)) return false;
        next += p.size;
      }
    return true;
  }

  // What a call in inference mode packed, a call that autograd records cannot keep: it packs again.
  Weights weights(const Call<Cpu<R>>& call, bool recorded) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto is_same = [](const Piece<R>& p, const R* copy) { return !std::memcmp(p.at, copy, p.size * sizeof(R)); };
    if (is_packed_ && (was_recorded_ || !recorded) && for_pieces(is_same)) return weights_;
    for_pieces([](const Piece<R>& p, R* copy) { return std::copy_n(p.at, p.size, copy), true; });
    weights_.statistics = empty_statistics(), weights_.packed = new_empty(reals(), {plan_.n_weights});
    R* out = mutable_data<R>(weights_.statistics);
    const R* running = copy_.data() + plan_.n_parameters;
    const int64_t channels = norm_channels(plan_);
    for (size_t n = 0; 2 * n < running_.size(); ++n) {
      const int64_t width = running_[2 * n].size / channels;
      const int64_t* column = data<int64_t>(held_[5]) + n * plan_.n_trivial;
      for (int64_t w = 0; w < channels; ++w)
        for (int64_t k = 0; k < plan_.n_trivial; ++k) *out++ = running[w * width + column[k]];
      out = std::copy_n(running + running_[2 * n].size, channels, out);
      running += running_[2 * n].size + channels;
    }
    call.device.pack(matrix_, copy_.data(), data<R>(weights_.statistics), mutable_data<R>(weights_.packed));
    is_packed_ = true, was_recorded_ = recorded;
    return weights_;
  }

  Weights measure(Call<Cpu<R>>& call, const Tensor& delta) {
    call.check_measurable();
    std::vector<R> parameters(plan_.n_parameters);
    R* next = parameters.data();
    for (const Piece<R>& p : learned_) next = std::copy_n(p.at, p.size, next);
    Weights found{new_empty(delta, {plan_.n_weights}), empty_statistics()};
    R* const statistics = mutable_data<R>(found.statistics);
    std::fill_n(statistics, found.statistics.numel(), R{});
    call.device.statistics(call.args, matrix_, parameters.data(), mutable_data<R>(found.packed), statistics);
    return found;
  }
};

}  // namespace implicit_steer
