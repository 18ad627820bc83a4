// The torch operators of cpu/fourier.h, through torch's stable ABI.

#include "../cpu/blocks.h"
#include "../cpu/fourier.h"
#include "arguments.h"

namespace {

using namespace implicit_steer;

constexpr int64_t kSamplesPerEdge = 64;  // evaluations of φ that take about as long as an edge of a convolution

template <typename R>
const FourierTable<R>& table(int64_t wanted) {
  [[maybe_unused]] const int isa = instruction_set(wanted);
  if constexpr (sizeof(R) == 4)
    return IST_TABLE(isa, kFourierFloat);
  else
    return IST_TABLE(isa, kFourierDouble);
}

// x [N, C d, ...], samples and inverse_t [S, d] -> A⁻ φ(A x) per field, or with `grad` the gradient of x; like x
Tensor run(const Tensor* grad, const Tensor& x, const Tensor& samples, const Tensor& inverse_t, int64_t function,
           int64_t isa) {
  Tensor out = torch::stable::empty_like(x);
  dispatch_real(x, "x", [&](auto* tag) {
    using R = std::remove_pointer_t<decltype(tag)>;
    FourierArgs<R> a{};
    STD_TORCH_CHECK(x.dim() >= 2 && samples.dim() == 2, "x, samples: expected (N, C d, ...) and (S, d).");
    const int64_t n_samples = samples.size(0);
    a.d = samples.size(1), a.inner = 1;
    STD_TORCH_CHECK(a.d > 0 && x.size(1) % a.d == 0, "x: expected fields of ", a.d, ", got ", x.size(1), " channels.");
    for (int64_t k = 2; k < x.dim(); ++k) a.inner *= x.size(k);
    a.fields = x.numel() / a.d;
    check(x, "x", x.scalar_type(), x.numel());
    check(samples, "samples", x.scalar_type(), n_samples * a.d);
    check(inverse_t, "inverse_t", x.scalar_type(), n_samples * a.d);
    if (grad) check(*grad, "grad", x.scalar_type(), x.numel());
    a.n_samples = static_cast<int>(n_samples), a.function = static_cast<int>(function);
    a.threads = static_cast<int>(torch::stable::get_num_threads());
    a.blocks = block_count(a.fields * n_samples / kSamplesPerEdge, 0);
    Tensor scratch = new_empty(x, {a.blocks, fourier_scratch<R>(a.d)});
    a.x = data<R>(x), a.samples = data<R>(samples), a.inverse_t = data<R>(inverse_t);
    a.out = mutable_data<R>(out), a.scratch = mutable_data<R>(scratch);
    if (grad) a.grad = data<R>(*grad);
    (grad ? table<R>(isa).backward : table<R>(isa).forward)(a);
  });
  return out;
}

Tensor fourier_forward(const Tensor& x, const Tensor& samples, const Tensor& inverse_t, int64_t function, int64_t isa) {
  return run(nullptr, x, samples, inverse_t, function, isa);
}

Tensor fourier_backward(const Tensor& grad, const Tensor& x, const Tensor& samples, const Tensor& inverse_t,
                        int64_t function, int64_t isa) {
  return run(&grad, x, samples, inverse_t, function, isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(implicit_steer, m) {
  m.def("fourier_forward(Tensor x, Tensor samples, Tensor inverse_t, int function, int isa) -> Tensor");
  m.def("fourier_backward(Tensor grad, Tensor x, Tensor samples, Tensor inverse_t, int function, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(implicit_steer, CPU, m) {
  m.impl("fourier_forward", TORCH_BOX(&fourier_forward));
  m.impl("fourier_backward", TORCH_BOX(&fourier_backward));
}
