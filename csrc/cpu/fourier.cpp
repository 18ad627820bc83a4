// Fourier activations of node features, a field per lane. CMake compiles this file once for each instruction set.

#include "fourier.h"

#include "../edge_mlp.h"
#include "blocks.h"
#include "threads.h"

namespace implicit_steer::IST_ISA {

namespace {

// Fields first .. first + inside - 1, a lane each; where their coefficients are.
template <typename R>
struct Tile {
  int64_t d, stride, at[Lane<R>::L];
  int inside;

  Tile(const FourierArgs<R>& a, int64_t first, int64_t last) : d(a.d), stride(a.inner) {
    inside = static_cast<int>(last - first < Lane<R>::L ? last - first : Lane<R>::L);
    for (int l = 0; l < inside; ++l) at[l] = (first + l) / a.inner * a.inner * d + (first + l) % a.inner;
  }
  template <typename V>
  void load(const R* from, V* lanes) const {
    for (int64_t k = 0; k < d; ++k) {
      lanes[k] = V{};
      for (int l = 0; l < inside; ++l) lanes[k][l] = from[at[l] + k * stride];
    }
  }
  template <typename V>
  void store(const V* lanes, R* to) const {
    for (int64_t k = 0; k < d; ++k)
      for (int l = 0; l < inside; ++l) to[at[l] + k * stride] = lanes[k][l];
  }
};

template <typename F, typename R, typename V>
void tile_forward(const FourierArgs<R>& a, const V* x, V* y) {
  const int d = static_cast<int>(a.d);
  row_blocks<V>(0, a.n_samples, [&](auto n, int s) {
    constexpr int N = decltype(n)::value;
    V u[N];
    products<N>(a.samples + s * d, d, 0, d, x, u);
    apply<F, N>(u, static_cast<V*>(nullptr));
    add_products<N>(s == 0, a.inverse_t + s * d, d, 0, d, u, y);
  });
}

// The samples' slopes are evaluated again.
template <typename F, typename R, typename V>
void tile_backward(const FourierArgs<R>& a, const V* x, const V* d_y, V* d_x) {
  const int d = static_cast<int>(a.d);
  row_blocks<V>(0, a.n_samples, [&](auto n, int s) {
    constexpr int N = decltype(n)::value;
    V u[N], slopes[N], g[N];
    products<N>(a.samples + s * d, d, 0, d, x, u);
    apply<F, N>(u, slopes);
    products<N>(a.inverse_t + s * d, d, 0, d, d_y, g);
    for (int j = 0; j < N; ++j) g[j] *= slopes[j];
    add_products<N>(s == 0, a.samples + s * d, d, 0, d, g, d_x);
  });
}

template <bool BACKWARD, typename R>
void part(const FourierArgs<R>& a, int block) {
  using V = typename Lane<R>::V;
  V* x = reinterpret_cast<V*>(a.scratch + block * fourier_scratch<R>(a.d));
  V *out = x + a.d, *grad = out + a.d;
  const int64_t last = first_of_block(a.fields, block + 1, a.blocks);
  for (int64_t first = first_of_block(a.fields, block, a.blocks); first < last; first += Lane<R>::L) {
    const Tile<R> tile(a, first, last);
    tile.load(a.x, x);
    if constexpr (BACKWARD) tile.load(a.grad, grad);
    with_function<R>(a.function, [&](auto f) {
      if constexpr (BACKWARD)
        tile_backward<decltype(f)>(a, x, grad, out);
      else
        tile_forward<decltype(f)>(a, x, out);
    });
    tile.store(out, a.out);
  }
}

template <bool BACKWARD, typename R>
void run(const FourierArgs<R>& a) {
  for_blocks(a.threads, a.blocks, [&](int b) { part<BACKWARD>(a, b); });
}

}  // namespace

extern const FourierTable<float> kFourierFloat;
extern const FourierTable<double> kFourierDouble;
const FourierTable<float> kFourierFloat{run<false, float>, run<true, float>};
const FourierTable<double> kFourierDouble{run<false, double>, run<true, double>};

}  // namespace implicit_steer::IST_ISA
