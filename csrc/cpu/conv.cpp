// The entry points of one instruction set. CMake compiles this file once for each, with IST_ISA and its flags.

#include "conv.h"

#include <cstdlib>

#include "backward.h"
#include "blocks.h"
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
    const int blocks = forward_blocks(a);
    for_blocks(a.threads, blocks, [&](int b) {
      const int64_t first = first_of_block(a.n_src, b, blocks), last = first_of_block(a.n_src, b + 1, blocks);
      N* out = static_cast<N*>(memory) + first * p.n_gathered;
      for (int64_t j = first; j < last; ++j, out += p.n_gathered)
        for (int k = 0; k < p.n_gathered; ++k) {
          const int64_t at = j * p.in_size + p.gathered_from[k];
          if constexpr (is_dual<N>)
            out[k] = p.gathered_from[k] < 0 ? N{} : N{a.x[at], a.x_tangent[at]};
          else
            out[k] = p.gathered_from[k] < 0 ? N{} : a.x[at];
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
  const Features<N, R> features(a);
  const int blocks = forward_blocks(a);
  for_blocks(a.threads, blocks, [&](int b) {
    const int64_t first = first_node(a, b, blocks), last = first_node(a, b + 1, blocks);
    if (first < last) Forward<N>(a, own_edges(a, first, last)).nodes(first, last);
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
    if (p.gathered_from[k] >= 0) out[p.gathered_from[k]] += sum[k];
}

// grad_x of the nodes first .. last-1, from the edges out of each or, by node, from the sums of every block
template <typename R>
void sum_by_source(const ConvArgs<R>& a, int64_t first, int64_t last, int blocks) {
  R* sum = static_cast<R*>(a.scratch(whole_lines(sizeof(R) * a.plan->n_gathered)));
  for (int64_t j = first; j < last; ++j) {
    if (a.grad_by_node) {
      sum_into_node(a, j, blocks, [&](int64_t b) { return b * a.n_src + j; }, sum);
      continue;
    }
    const int64_t begin = a.index(a.colptr, j), count = a.index(a.colptr, j + 1) - begin;
    sum_into_node(a, j, count, [&](int64_t k) { return a.index(a.order_by_source, begin + k); }, sum);
  }
}

// Adds the rows of n sums that all blocks but the first left to that of the first, in the blocks' order.
template <typename T>
void sum_blocks(int threads, int blocks, int64_t n, T* sums) {
  if (blocks == 1) return;
  constexpr int64_t kShare = 1 << 14;  // sums that one thread adds up at a time
  for_blocks(threads, static_cast<int>((n + kShare - 1) / kShare), [&](int share) {
    const int64_t first = share * kShare, last = n - first < kShare ? n : first + kShare;
    for (int b = 1; b < blocks; ++b)
      for (int64_t k = first; k < last; ++k) sums[k] += sums[b * n + k];
  });
}

template <typename N, typename R>
void backward(const ConvArgs<R>& given) {
  ConvArgs<R> a = given;
  const Features<N, R> features(a);
  const int64_t n_grad = a.plan->n_grad, all = a.n_src * a.plan->n_gathered;
  const int blocks = backward_blocks(a);
  a.grad_by_node = blocks * a.n_src <= a.n_edges;
  for_blocks(a.threads, blocks, [&](int b) {
    const int64_t first = first_node(a, b, blocks), last = first_node(a, b + 1, blocks);
    ConvArgs<R> own = a;
    if (a.grad_edge && a.grad_by_node) memset(own.grad_edge += b * all, 0, sizeof(R) * all);
    R* grad_weights = a.grad_weights ? a.grad_weights + b * n_grad : nullptr;
    if (first < last)
      Backward<N>(own, own_edges(a, first, last)).nodes(first, last, grad_weights);
    else if (grad_weights)
      memset(grad_weights, 0, sizeof(R) * n_grad);
  });
  if (a.grad_weights) sum_blocks(a.threads, blocks, n_grad, a.grad_weights);
  if (!a.grad_edge) return;
  for_blocks(a.threads, blocks, [&](int b) {
    sum_by_source(a, first_of_block(a.n_src, b, blocks), first_of_block(a.n_src, b + 1, blocks), blocks);
  });
}

template <typename R>
void statistics(const ConvArgs<R>& a) {
  const int n = norm_input_size(*a.plan), blocks = statistics_blocks(a);
  for_blocks(a.threads, blocks, [&](int b) {
    const int64_t begin = first_of_block(a.n_edges, b, blocks), end = first_of_block(a.n_edges, b + 1, blocks);
    Statistics<R>(a, n, end - begin).run(begin, end, a.sums + 2 * n * b);
  });
  sum_blocks(a.threads, blocks, 2 * n, a.sums);
}

// out: [table_blocks, types · splines per type, width]; the sum over blocks lands in the first
template <typename R>
void table_sums(const ConvArgs<R>& a) {
  const int64_t n = table_sums_size(*a.plan);
  const int blocks = table_blocks(a);
  for_blocks(a.threads, blocks, [&](int b) {
    const int64_t begin = first_of_block(a.n_edges, b, blocks), end = first_of_block(a.n_edges, b + 1, blocks);
    TableSums<R>(a, end - begin).run(begin, end, a.out + b * n);
  });
  sum_blocks(a.threads, blocks, n, a.out);
}

// Calls f(worker, first point, one past the last, block) with the hidden features' worker of every block.
template <typename N, typename R, typename F>
void hidden(const ConvArgs<R>& a, int blocks, bool backward, F f) {
  for_blocks(a.threads, blocks, [&](int b) {
    const int64_t begin = first_of_block(a.n_edges, b, blocks), end = first_of_block(a.n_edges, b + 1, blocks);
    Hidden<N> worker(a, backward, end - begin);
    f(worker, begin, end, b);
  });
}

template <typename N, typename R>
void hidden_forward(const ConvArgs<R>& a) {
  hidden<N>(a, forward_blocks(a), false,
            [](Hidden<N>& worker, int64_t begin, int64_t end, int) { worker.forward(begin, end); });
}

template <typename N, typename R>
void hidden_backward(const ConvArgs<R>& a) {
  const int blocks = backward_blocks(a);
  hidden<N>(a, blocks, true, [&](Hidden<N>& worker, int64_t begin, int64_t end, int b) {
    worker.backward(begin, end, a.grad_weights ? a.grad_weights + b * a.plan->n_grad : nullptr);
  });
  if (a.grad_weights) sum_blocks(a.threads, blocks, a.plan->n_grad, a.grad_weights);
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
  for_blocks(threads, threads, [&](int t) { sums[t] = multiply_adds<R>(rounds); });
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
