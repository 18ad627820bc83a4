// The entry points of one instruction set. CMake compiles this file once for each, with IST_ISA and its flags.

#include "conv.h"

#include <cstdlib>

#include "backward.h"
#include "forward.h"
#include "hidden.h"
#include "peak.h"
#include "statistics.h"
#include "table_sums.h"
#include "threads.h"

namespace implicit_steer::IST_ISA {

namespace {

// Edges into the nodes first .. last-1
template <typename R>
int64_t own_edges(const ConvArgs<R>& a, int64_t first, int64_t last) {
  return a.index(a.rowptr, last) - a.index(a.rowptr, first);
}

// As aligned_alloc asks: bytes in whole blocks of 64.
size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Gathers x by field type into memory of its own, which lives as long as this; nothing where x lies so already.
// N: R, or dual numbers of R where there are tangents.
template <typename N, typename R>
struct Features {
  void* memory = nullptr;

  explicit Features(ConvArgs<R>& a) {
    const PlanView<R>& p = *a.plan;
    if (!is_dual<N> && gathered_as_given(p)) return;
    const size_t bytes = sizeof(N) * p.n_gathered * a.n_src;
    memory = aligned_alloc(64, whole_lines(bytes));
    if (bytes && !memory) abort();
    a.features = memory;
    in_threads(a.threads, [&](int t) {
      const int64_t first = a.n_src * t / a.threads, last = a.n_src * (t + 1) / a.threads;
      N* out = static_cast<N*>(memory) + first * p.n_gathered;
      for (int64_t j = first; j < last; ++j, out += p.n_gathered)
        for (int k = 0; k < p.n_gathered; ++k) {
          const int64_t at = j * p.in_size + p.input[k];
          if constexpr (is_dual<N>)
            out[k] = p.input[k] < 0 ? N{} : N{a.x[at], a.x_tangent[at]};
          else
            out[k] = p.input[k] < 0 ? N{} : a.x[at];
        }
    });
  }
  Features(const Features&) = delete;
  ~Features() { free(memory); }
};

// N: R, or dual numbers of R for derivatives along the tangents.
template <typename N, typename R>
void forward(const ConvArgs<R>& given) {
  ConvArgs<R> a = given;
  const CouplingSizes sizes = place_couplings(*a.plan);
  const Features<N, R> features(a);
  in_threads(a.threads, [&](int t) {
    const int64_t first = first_node(a, t), last = first_node(a, t + 1);
    if (first < last) Forward<N>(a, sizes, own_edges(a, first, last)).nodes(first, last);
  });
}

// sum[0 ..] = Σ rows[row(k), x ..] over k < count, M T wide
template <int M, typename T, typename R, typename Row>
IST_INLINE void sum_rows(const R* rows, int64_t stride, int64_t count, Row row, int64_t x, R* sum) {
  T total[M] = {};
  for (int64_t k = 0; k < count; ++k) {
    const R* in = rows + row(k) * stride + x;
    for (int m = 0; m < M; ++m) total[m] += load_numbers<T>(in + m * kWidth<T>);
  }
  for (int m = 0; m < M; ++m) store_numbers(sum + m * kWidth<T>, total[m]);
}

// grad_x[j] = Σ grad_edge[row(k)] over k < count; sum: [n_gathered]
template <typename R, typename Row>
void sum_into_node(const ConvArgs<R>& a, int64_t j, int64_t count, Row row, R* sum) {
  using V = typename Lane<R>::V;
  constexpr int L = Lane<R>::L;
  const PlanView<R>& p = *a.plan;
  const int64_t n = p.n_gathered;
  int64_t x = 0;
  for (; x + 2 * L <= n; x += 2 * L) sum_rows<2, V>(a.grad_edge, n, count, row, x, sum + x);
  for (; x + L <= n; x += L) sum_rows<1, V>(a.grad_edge, n, count, row, x, sum + x);
  for (; x < n; x += Lane<R>::QL) sum_rows<1, typename Lane<R>::Q>(a.grad_edge, n, count, row, x, sum + x);
  R* out = a.grad_x + j * p.in_size;
  for (int64_t k = 0; k < p.in_size; ++k) out[k] = 0;  // also of inputs that no coupling reads
  for (int64_t k = 0; k < n; ++k)
    if (p.input[k] >= 0) out[p.input[k]] += sum[k];
}

// grad_x of the nodes first .. last-1, from the edges out of each or from every thread's sums
template <typename R>
void sum_by_source(const ConvArgs<R>& a, int64_t first, int64_t last) {
  R* sum = static_cast<R*>(a.scratch(whole_lines(sizeof(R) * a.plan->n_gathered)));
  for (int64_t j = first; j < last; ++j) {
    if (a.grad_by_node) {
      sum_into_node(a, j, a.threads, [&](int64_t t) { return t * a.n_src + j; }, sum);
      continue;
    }
    const int64_t begin = a.index(a.colptr, j), count = a.index(a.colptr, j + 1) - begin;
    sum_into_node(a, j, count, [&](int64_t k) { return a.index(a.order_by_source, begin + k); }, sum);
  }
}

// The threads' gradients of the weights into those of the first.
template <typename R>
void sum_weights(const ConvArgs<R>& a) {
  const int64_t n = a.plan->n_grad;
  for (int t = 1; t < a.threads && a.grad_weights; ++t)
    for (int64_t k = 0; k < n; ++k) a.grad_weights[k] += a.grad_weights[t * n + k];
}

template <typename N, typename R>
void backward(const ConvArgs<R>& given) {
  ConvArgs<R> a = given;
  const CouplingSizes sizes = place_couplings(*a.plan);
  const Features<N, R> features(a);
  const int64_t n_grad = a.plan->n_grad, all = a.n_src * a.plan->n_gathered;
  a.grad_by_node = a.threads * a.n_src <= a.n_edges;
  in_threads(a.threads, [&](int t) {
    const int64_t first = first_node(a, t), last = first_node(a, t + 1);
    ConvArgs<R> own = a;
    if (a.grad_edge && a.grad_by_node) memset(own.grad_edge += t * all, 0, sizeof(R) * all);
    R* grad_weights = a.grad_weights ? a.grad_weights + t * n_grad : nullptr;
    if (first < last)
      Backward<N>(own, sizes, own_edges(a, first, last)).nodes(first, last, grad_weights);
    else if (grad_weights)
      memset(grad_weights, 0, sizeof(R) * n_grad);
  });
  sum_weights(a);
  if (a.grad_edge)
    in_threads(a.threads, [&](int t) { sum_by_source(a, a.n_src * t / a.threads, a.n_src * (t + 1) / a.threads); });
}

template <typename R>
void statistics(const ConvArgs<R>& a) {
  const int n = a.plan->layers[a.layer].out_size / a.plan->c * a.plan->d;
  in_threads(a.threads, [&](int t) {
    const int64_t begin = a.n_edges * t / a.threads, end = a.n_edges * (t + 1) / a.threads;
    Statistics<R>(a, n, end - begin).run(begin, end, a.sums + 2 * n * t);
  });
  for (int t = 1; t < a.threads; ++t)
    for (int64_t k = 0; k < 2 * n; ++k) a.sums[k] += a.sums[2 * n * t + k];
}

// out: [threads, types · splines per type, width]; the sum over threads lands in the first
template <typename R>
void table_sums(const ConvArgs<R>& a) {
  const int64_t n = int64_t{a.plan->n_types} * splines_per_type(*a.plan) * table_sums_width(*a.plan);
  in_threads(a.threads, [&](int t) {
    const int64_t begin = a.n_edges * t / a.threads, end = a.n_edges * (t + 1) / a.threads;
    TableSums<R>(a, end - begin).run(begin, end, a.out + t * n);
  });
  for (int t = 1; t < a.threads; ++t)
    for (int64_t k = 0; k < n; ++k) a.out[k] += a.out[t * n + k];
}

// Calls f(worker, first point, one past the last, thread) with the hidden features' worker of every thread.
template <typename N, typename R, typename F>
void hidden(const ConvArgs<R>& a, bool backward, F f) {
  in_threads(a.threads, [&](int t) {
    const int64_t begin = a.n_edges * t / a.threads, end = a.n_edges * (t + 1) / a.threads;
    Hidden<N> worker(a, backward, end - begin);
    f(worker, begin, end, t);
  });
}

template <typename N, typename R>
void hidden_forward(const ConvArgs<R>& a) {
  hidden<N>(a, false, [](Hidden<N>& worker, int64_t begin, int64_t end, int) { worker.forward(begin, end); });
}

template <typename N, typename R>
void hidden_backward(const ConvArgs<R>& a) {
  hidden<N>(a, true, [&](Hidden<N>& worker, int64_t begin, int64_t end, int t) {
    worker.backward(begin, end, a.grad_weights ? a.grad_weights + t * a.plan->n_grad : nullptr);
  });
  sum_weights(a);
}

template <typename R>
void function(int which, const R* x, R* y, int64_t n) {
  using V = typename Lane<R>::V;
  for (int64_t at = 0; at < n; at += Lane<R>::L) {
    V in{};
    const int64_t inside = n - at < Lane<R>::L ? n - at : Lane<R>::L;
    for (int64_t l = 0; l < inside; ++l) in[l] = x[at + l];
    V out{};
    if (which == 5)
      out = lane_exp(in);
    else if (which == 6)
      out = lane_erf(in);
    else
      with_function<R>(which, [&](auto f) { out = decltype(f)::value(in); });
    for (int64_t l = 0; l < inside; ++l) y[at + l] = out[l];
  }
}

// -> how many were made
template <typename R>
int64_t peak(int threads, int64_t rounds, R* sums) {
  in_threads(threads, [&](int t) { sums[t] = multiply_adds<R>(rounds); });
  return threads * rounds * kAccumulators * Lane<R>::L;
}

}  // namespace

template <typename R>
constexpr ConvTable<R> kTable{forward<R, R>,
                              backward<R, R>,
                              forward<Dual<R>, R>,
                              backward<Dual<R>, R>,
                              statistics<R>,
                              table_sums<R>,
                              hidden_forward<R, R>,
                              hidden_backward<R, R>,
                              hidden_forward<Dual<R>, R>,
                              hidden_backward<Dual<R>, R>,
                              function<R>,
                              peak<R>};

extern const ConvTable<float> kConvFloat;
extern const ConvTable<double> kConvDouble;
const ConvTable<float> kConvFloat = kTable<float>;
const ConvTable<double> kConvDouble = kTable<double>;

}  // namespace implicit_steer::IST_ISA
