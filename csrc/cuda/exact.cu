// The exact kernels for all sizes that they are compiled for, and their launches.

#include "exact.h"
#include "exact_backward_kernel.cuh"
#include "exact_forward.cuh"
#include "field_passes.h"

namespace implicit_steer::IST_ISA {

namespace {

// Kind: Exact<φ, …> or Tabulated<…>, but for their sizes; run(sizes): those of the plan.
template <typename Kind, typename Run>
auto with_sizes_of(const ExactPlan& plan, Run run) {
  constexpr int few = ExactPlan::kFields, many = ExactPlan::kManyFields;
  const auto with_products = [&](auto cross) {
    constexpr bool kWithCross = decltype(cross)::value == 1;
    if (plan.fields == many) return run(typename Kind::template Sizes<8, many, kWithCross>{});
    if (plan.width == 16) return run(typename Kind::template Sizes < 16, few, kWithCross && Kind::kWideCross > {});
    return run(typename Kind::template Sizes<8, few, kWithCross>{});
  };
  return plan.cross ? with_products(Count<1>{}) : with_products(Count<0>{});
}
template <typename F>
struct OfMlp {
  static constexpr bool kWideCross = false;  // 16 channels with the path u × x: an MLP leaves too few registers
  template <int kWidth, int kFields, bool kWithCross>
  using Sizes = Exact<F, kWidth, kFields, kWithCross>;
};
struct OfTable {
  static constexpr bool kWideCross = true;
  template <int kWidth, int kFields, bool kWithCross>
  using Sizes = Tabulated<kWidth, kFields, kWithCross>;
};
template <typename Run>
auto with_exact_sizes(const DevicePlan<float>& plan, Run run) {
  if (plan.host.n_knots) return with_sizes_of<OfTable>(plan.exact, run);
  return plan.host.function == kElu ? with_sizes_of<OfMlp<Elu>>(plan.exact, run)
                                    : with_sizes_of<OfMlp<Silu>>(plan.exact, run);
}

}  // namespace

template <>
bool has_exact_kernel(const DevicePlan<float>& plan, bool backward) {
  if (plan.exact.fields == 0 || (backward && !plan.exact.reads_all)) return false;
  return with_exact_sizes(plan, [&](auto sizes) {
    using S = decltype(sizes);
    const int64_t of_warp = backward ? exact_backward_size<S>(plan.host) : kExactForwardSize<S>;
    return static_cast<int64_t>(sizeof(float)) * (front_of_warps<S>(plan.host) + of_warp) <= kLeastBlockBytes;
  });
}

template <>
Failure prepare_exact_forward(const DevicePlan<float>& plan, const ConvArgs<float>& args, FieldLaunch& launch) {
  return with_exact_sizes(plan, [&](auto sizes) {
    using S = decltype(sizes);
    return prepare_forward_of<S>("exact_forward", exact_forward<S>, plan, args, launch);
  });
}

template <>
Failure run_exact_backward(const DevicePlan<float>& plan, const ConvArgs<float>& args, bool mean, int64_t more,
                           void* stream, GradientRows<float>& rows) {
  return with_exact_sizes(plan, [&](auto sizes) -> Failure {
    using S = decltype(sizes);
    const FieldLaunch edges{"exact_backward",
                            exact_backward<S>,
                            {},
                            front_of_warps<S>(plan.host),
                            exact_backward_size<S>(plan.host),
                            0,
                            kExactBackwardThreads<S> / 32};
    return run_backward_of<S>(edges, 0, plan, args, mean, more, stream, rows);
  });
}

}  // namespace implicit_steer::IST_ISA
