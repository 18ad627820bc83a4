// The torch operators of a layer that is bound under a number (bound_layer.h): one for a whole call, one for its
// backward pass. Tracing, torch.func and second derivatives take the operators on tensors of conv_ops.cpp and
// layer_ops.cpp.

#include <cstdint>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bound_layer.h"
#include "cpu_layer.h"
#include "cuda_layer.h"

namespace {

using namespace implicit_steer;

// Never destroyed: calls may outlive the end of the program's main function.
Numbered<Layer>& layers() {
  static auto* const all = new Numbered<Layer>;
  return *all;
}
Numbered<BoundGraph>& graphs() {
  static auto* const all = new Numbered<BoundGraph>;
  return *all;
}

// -> its number, or 0: the CUDA kernels cannot read from so many tensors
int64_t bind_layer(const Tensor& ints, const Tensor& reals, const Tensor& rowptr, const Tensor& column,
                   const Tensor& value, const Tensor& trivial, const std::vector<Tensor>& learned,
                   const std::vector<Tensor>& running, const Tensor& expansion, const Tensor& bias, bool mean,
                   int64_t isa, bool cuda) {
  const LayerTensors tensors{ints, reals, rowptr, column, value, trivial, learned, running, expansion, bias, mean, isa};
  std::shared_ptr<Layer> made;
  dispatch_real(reals, "plan_reals", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    if (!cuda)
      made = std::make_shared<CpuLayer<R>>(tensors);
    else if (CudaLayer<R>::takes(tensors))
      made = std::make_shared<CudaLayer<R>>(tensors);
  });
  return made ? layers().add(std::move(made)) : 0;
}
void release_layer(int64_t layer) { layers().remove(layer); }

int64_t bind_graph(const Tensor& src, const Tensor& order, const Tensor& rowptr, const Tensor& order_by_source,
                   const Tensor& colptr) {
  return graphs().add(std::make_shared<BoundGraph>(BoundGraph{src, order, rowptr, order_by_source, colptr}));
}
void release_graph(int64_t graph) { graphs().remove(graph); }

// -> (N_dst, C_out), from packed weights at the running statistics
Tensor layer_forward(int64_t layer, int64_t graph, const Tensor& x, const Tensor& delta, const Tensor& attr) {
  return std::get<0>(layers().get(layer)->forward(*graphs().get(graph), {x, delta, attr}, {false, false, false}));
}

// -> the same, packed weights, statistics, and what the gradients of the parameters want, if they are `kept`
LayerOutput layer_forward_recorded(int64_t layer, int64_t graph, const Tensor& x, const Tensor& delta,
                                   const Tensor& attr, bool measured, bool kept) {
  return layers().get(layer)->forward(*graphs().get(graph), {x, delta, attr}, {measured, true, kept});
}

// -> gradients of x, delta, attr, bias and parameters
LayerGradients layer_backward(int64_t layer, int64_t graph, const Tensor& x, const Tensor& delta, const Tensor& attr,
                              const Tensor& packed, const Tensor& statistics, const Tensor& node_sums,
                              const Tensor& grad_out, bool need_x, bool need_delta, bool need_attr,
                              bool need_parameters) {
  return layers().get(layer)->gradients(*graphs().get(graph), {x, delta, attr}, {packed, statistics, node_sums},
                                        grad_out, {need_x, need_delta, need_attr, need_parameters});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def("bind_layer(" IST_PLAN ", " IST_PACKING
        ", Tensor trivial, Tensor[] learned, Tensor[] running, Tensor expansion, Tensor bias, bool mean, int isa, "
        "bool cuda) -> int");
  m.def("release_layer(int layer) -> ()");
  m.def("bind_graph(Tensor src, Tensor order, Tensor rowptr, Tensor order_by_source, Tensor colptr) -> int");
  m.def("release_graph(int graph) -> ()");
  m.def("layer_forward(int layer, int graph, Tensor x, Tensor delta, Tensor attr) -> Tensor");
  m.def(
      "layer_forward_recorded(int layer, int graph, Tensor x, Tensor delta, Tensor attr, bool measured, bool kept) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_backward(int layer, int graph, Tensor x, Tensor delta, Tensor attr, Tensor packed, Tensor statistics, "
      "Tensor node_sums, Tensor grad_out, " IST_NEEDS
      ", bool need_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CompositeExplicitAutograd, m) {
  m.impl("bind_layer", TORCH_BOX(&bind_layer));
  m.impl("release_layer", TORCH_BOX(&release_layer));
  m.impl("bind_graph", TORCH_BOX(&bind_graph));
  m.impl("release_graph", TORCH_BOX(&release_graph));
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("layer_forward_recorded", TORCH_BOX(&layer_forward_recorded));
  m.impl("layer_backward", TORCH_BOX(&layer_backward));
}
