// CPU tensors as conv_call.h asks for a device: the plan is read at every call, the loops of cpu/ run on torch's
// threads. The callers (ops/native/convolution.py) have validated shapes and indices; the checks here keep memory safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "../cpu/entry.h"
#include "../packing.h"
#include "arguments.h"

namespace implicit_steer {

// Memory of one thread that its calls share; only ever grows.
inline void* scratch(int64_t bytes) {
  struct Buffer {
    void* memory = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    std::free(buffer.memory);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.memory = std::aligned_alloc(64, buffer.size);
    if (!buffer.memory) std::abort();  // inside a parallel region: no exception can leave it
  }
  return buffer.memory;
}

// The number of edges into node i, at least 1.
template <typename R>
R divisor(const ConvArgs<R>& a, int64_t i) {
  return static_cast<R>(std::max<int64_t>(a.index(a.rowptr, i + 1) - a.index(a.rowptr, i), 1));
}

template <typename R>
void read_plan(Plan<R>& plan, const Tensor& ints, const Tensor& reals) {
  STD_TORCH_CHECK(ints.scalar_type() == ScalarType::Int && ints.is_contiguous(), "plan_ints: expected int32.");
  check(reals, "plan_reals", real_type<R>, reals.numel());
  const bool valid = plan_view(plan, data<int32_t>(ints), ints.numel(), data<R>(reals), reals.numel());
  STD_TORCH_CHECK(valid, "plan_ints, plan_reals: not what ops/native/arrays.py writes.");
}

// The sparse matrix from parameters to packed weights.
template <typename R>
SparseMatrix<R> matrix_of(const PlanView<R>& plan, const Tensor& rowptr, const Tensor& column, const Tensor& value) {
  check_packing<R>(plan, rowptr, column, value);
  return {plan.n_weights, data<int32_t>(rowptr), data<int32_t>(column), data<R>(value)};
}

template <typename R>
class Cpu {
 public:
  using Real = R;

  Cpu(const Tensor& ints, const Tensor& reals, const Tensor&, int64_t isa = 0) : isa_(isa) {
    read_plan(plan_, ints, reals);
  }
  // Of a plan that was read before and outlives it: its couplings are copied, the loops place them at every call.
  Cpu(const Plan<R>& plan, int64_t isa) : isa_(isa) {
    static_cast<PlanView<R>&>(plan_) = plan;
    plan_.coupling_storage = plan.coupling_storage, plan_.couplings = plan_.coupling_storage.data();
  }
  Cpu(const Cpu&) = delete;

  const PlanView<R>& plan() const { return plan_; }
  const ConvTable<R>& table() const { return conv_table<R>(instruction_set(isa_)); }
  template <typename Pass>
  void run(Pass pass, const ConvArgs<R>& a) const {
    pass(a);
  }

  void check(const Tensor& t, const char* name, ScalarType type, int64_t numel) const {
    implicit_steer::check(t, name, type, numel);
  }
  void prepare(ConvArgs<R>& a) {
    a.plan = &plan_, a.threads = static_cast<int>(torch::stable::get_num_threads()), a.scratch = scratch;
  }
  Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape) const {
    Tensor made = new_empty(like, shape);
    std::fill_n(mutable_data<R>(made), made.numel(), R{});
    return made;
  }

  // Weights and their tangents side by side, [n_weights, 2]. `tangent` holds every weight of θ in its first place only.
  const R* with_tangents(const Tensor&, const R* weights, const R* tangent) {
    pairs_.resize(2 * plan_.n_weights);
    for (int64_t k = 0; k < plan_.n_weights; ++k) pairs_[2 * k] = weights[k];
    for (int64_t k = 0; k < plan_.n_grad; ++k) pairs_[2 * k + 1] = tangent[k];
    for_theta(plan_, [&](int64_t from, int64_t to) { pairs_[2 * to + 1] = tangent[from]; });
    return pairs_.data();
  }

  // The sums over the edges, and what follows them: the mean over them if `mean`, then + expansion [C_out, n] · bias
  // [n].
  void forward(const ConvArgs<R>& a, const R* expansion, const R* bias, int64_t n, bool mean) const {
    table().forward(a);
    if (n == 0 && !mean) return;
    const int64_t width = plan_.out_size;
    std::vector<R> shift(width);
    for (int64_t k = 0; k < width * n; ++k) shift[k / n] += expansion[k] * bias[k % n];
    for (int64_t i = 0; i < a.n_dst; ++i) {
      const R edges = mean ? divisor(a, i) : R{1};
      for (int64_t k = 0; k < width; ++k) a.out[i * width + k] = a.out[i * width + k] / edges + shift[k];
    }
  }

  // Columns of the features' gradient edge by edge.
  int64_t edge_width() const { return plan_.n_gathered; }
  // Memory for the gradient of the packed weights, block by block.
  Tensor weight_gradient(const ConvArgs<R>& a, const Tensor& like, bool wanted) const {
    return new_empty(like, {wanted ? backward_blocks(a) : 0, plan_.n_grad});
  }
  // After the call: that of the packed weights, in which every weight of θ stands twice: the first holds the gradient,
  // the second 0.
  Tensor summed_weight_gradient(const Tensor& of_blocks) const {
    const bool wanted = of_blocks.numel() > 0;
    Tensor weights = new_empty(of_blocks, {wanted ? plan_.n_weights : 0});
    if (!wanted) return weights;
    R* out = mutable_data<R>(weights);
    std::copy_n(data<R>(of_blocks), plan_.n_grad, out);
    std::fill(out + plan_.n_grad, out + plan_.n_weights, R{});
    return weights;
  }

  // ---- packing

  // The parameters as one vector.
  const R* gathered(const std::vector<Tensor>& parameters) {
    check_size(plan_.n_parameters, count(parameters), "parameters");
    parameters_.reserve(plan_.n_parameters);
    for (const Tensor& t : parameters) {
      implicit_steer::check(t, "parameters", real_type<R>, t.numel());
      const R* values = data<R>(t);
      parameters_.insert(parameters_.end(), values, values + t.numel());
    }
    return parameters_.data();
  }
  SparseMatrix<R> matrix(const Tensor& rowptr, const Tensor& column, const Tensor& value) const {
    return matrix_of(plan_, rowptr, column, value);
  }
  void pack(const SparseMatrix<R>& matrix, const R* parameters, const R* statistics, R* packed) const {
    matrix.multiply(parameters, packed);
    for (int n = 0; n < plan_.n_layers && plan_.has_norms; ++n) pack_affine(plan_, n, parameters, statistics, packed);
  }
  void pack_backward(const SparseMatrix<R>& matrix, const R* statistics, const R* grad_packed, R* grad) const {
    std::fill_n(grad, plan_.n_parameters, R{});
    matrix.multiply_transposed(plan_.n_grad, grad_packed, grad);
    for (int n = 0; n < plan_.n_layers && plan_.has_norms; ++n)
      pack_affine_backward(plan_, n, statistics, grad_packed, grad);
  }

  // ---- statistics of batch norms

  void statistics(ConvArgs<R>& a, const SparseMatrix<R>& matrix, const R* parameters, R* packed, R* out) const {
    matrix.multiply(parameters, packed);
    a.weights = packed;
    batch_statistics(table(), a, parameters, packed, out);
  }
  void moments(ConvArgs<R>& a, int64_t size, R* out) const {
    const Sums found = batch_sums(table(), a, a.layer);
    for (int k = 0; k < size; ++k)
      coordinate_moments(plan_, static_cast<int>(size), k, found.sums.data(), found.shift.data(),
                         static_cast<double>(a.n_edges), out);
  }

 private:
  Plan<R> plan_{};
  const int64_t isa_;
  std::vector<R> pairs_, parameters_;
};

}  // namespace implicit_steer
