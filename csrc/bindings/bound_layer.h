// A layer as its calls find it: plan, places of parameters and running statistics, and the graph stay bound under a
// number between calls, so that a call takes features and geometry alone. bound_ops.cpp has the operators.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "arguments.h"

namespace implicit_steer {

// The edges of a graph by target, [E], [E], [N_dst + 1]; and by source, [E], [N_src + 1], or empty.
struct BoundGraph {
  Tensor src, order, rowptr, order_by_source, colptr;
};

// The tensors of one call, and which gradients it wants.
struct LayerInputs {
  const Tensor &x, &delta, &attr;
};
struct LayerNeeds {
  bool x, delta, attr, parameters;
};

// A forward pass: `measured` at the statistics of its edges, else at those that the norms keep; `recorded`: a backward
// pass follows, or the statistics are wanted; `kept`: of the parameters, too, whose gradients sums over nodes may help.
struct LayerMode {
  bool measured, recorded, kept;
};
// The output, and what its backward pass wants: packed weights, the batch norms' statistics (n_layers, size), and
// ConvArgs.node_sums or nothing. The last three may be empty unless recorded.
using LayerOutput = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// The last three, as a backward pass gets them.
struct LayerRecord {
  const Tensor &packed, &statistics, &node_sums;
};
// The gradients of x, delta, attr, bias and the parameters; without rows, or none, where not needed.
using LayerGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

class Layer {
 public:
  virtual ~Layer() = default;
  virtual LayerOutput forward(const BoundGraph&, const LayerInputs&, LayerMode) = 0;
  virtual LayerGradients gradients(const BoundGraph&, const LayerInputs&, const LayerRecord&, const Tensor& grad_out,
                                   LayerNeeds) = 0;
};

// What a layer is bound to. Parameters, running statistics and bias are known by their places: whoever binds a layer
// binds it anew when one of these tensors lies elsewhere (ops/native/bound.py).
struct LayerTensors {
  const Tensor &ints, &reals, &rowptr, &column, &value;  // the plan and its packing matrix, CPU tensors
  const Tensor& trivial;                                 // [n_layers, n_trivial] columns of the means that are not 0
  const std::vector<Tensor>&learned, &running;           // running: means [W, d] and variances [W] of each batch norm
  const Tensor &expansion, &bias;                        // [C_out, n], [n]
  bool mean;
  int64_t isa;
};

// Numbers that lie in memory of the tensor `name`, checked once.
template <typename R>
struct Piece {
  const R* at;
  std::vector<int64_t> shape;
  int64_t size;

  Piece(const Tensor& t, const char* name) : at(data<R>(t)), shape(), size(t.numel()) {
    check(t, name, real_type<R>, size);
    for (int64_t k = 0; k < t.dim(); ++k) shape.push_back(t.size(k));
  }
};

using Shape = torch::headeronly::IntHeaderOnlyArrayRef;
template <typename R>
Shape shape_of(const Piece<R>& p) {
  return {p.shape.data(), p.shape.size()};
}
inline Shape shape_of(const Tensor& t) { return t.sizes(); }

template <typename R>
std::vector<Piece<R>> pieces_of(const std::vector<Tensor>& tensors, const char* name) {
  std::vector<Piece<R>> pieces;
  for (const Tensor& t : tensors) pieces.emplace_back(t, name);
  return pieces;
}

// Raises unless the running statistics are those of the plan's batch norms.
template <typename R>
void check_running(const PlanView<R>& plan, const LayerTensors& t, const std::vector<Piece<R>>& running) {
  const int64_t norms = plan.has_norms ? plan.n_layers : 0, channels = norm_channels(plan);
  check_size(2 * norms, static_cast<int64_t>(running.size()), "running");
  check(t.trivial, "trivial", ScalarType::Long, norms * plan.n_trivial);
  for (int64_t n = 0; n < norms; ++n) {
    check_size(channels, running[2 * n + 1].size, "running variances");
    for (int64_t k = 0; k < plan.n_trivial; ++k) {
      const int64_t column = data<int64_t>(t.trivial)[n * plan.n_trivial + k];
      STD_TORCH_CHECK(column >= 0 && column < running[2 * n].size / channels,
                      "trivial: expected columns of the means.");
    }
  }
}

// Objects by number; a call that runs keeps its objects alive.
template <typename T>
class Numbered {
 public:
  int64_t add(std::shared_ptr<T> made) {
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(++last_, std::move(made));
    return last_;
  }
  std::shared_ptr<T> get(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(number);
    STD_TORCH_CHECK(found != objects_.end(), "number: expected one that is bound, got ", number, ".");
    return found->second;
  }
  void remove(int64_t number) {
    std::shared_ptr<T> last;  // destroyed after the lock is given back
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = objects_.find(number); found != objects_.end()) {
      last = std::move(found->second);
      objects_.erase(found);
    }
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<T>> objects_;
  int64_t last_ = 0;
};

}  // namespace implicit_steer
