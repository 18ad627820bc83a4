// Hidden features alone, and their gradients: for kernels on a grid h_e = factor · (features of the last layer, 1); for
// layers with many fields what their last layer reads, the records of wide_plan.h.
#pragma once

#include "reverse.cuh"

namespace implicit_steer::IST_ISA {

template <typename N>
struct HiddenForward : Warp<N, false, false> {
  using Base = Warp<N, false, false>;
  using Base::a, Base::p, Base::e, Base::lanes, Base::sub, Base::active, Base::edge;
  const EdgeRecords<Real<N>>& records;

  __device__ __forceinline__ explicit HiddenForward(const Call<Real<N>>& call) : Base(call), records(call.records) {}

  __device__ __forceinline__ void write() const {
    Real<N>* const out = a.out + edge * hidden_size(p);
    const int channels = p.hidden_flat / p.c;
    IST_ROLLED for (int w = 0; w < channels; ++w) IST_ROLLED for (int m = sub; m < p.d; m += lanes) {
      N h = this->features[w * p.c + p.coordinate[m]] * e.factor;
      if (p.kind == kZonal) h *= e.first[m];
      out[w * p.d + m] = result(h);
    }
    if (sub == 0) out[channels * p.d] = result(e.factor);
  }

  __device__ __forceinline__ void write_record() const {
    N* const record = reinterpret_cast<N*>(records.at) + edge * records.size;
    IST_ROLLED for (int row = 0; row < p.n_rows; ++row) {
      const int32_t* const position = p.row + p.row_start[row];
      const int width = p.row_start[row + 1] - p.row_start[row];
      IST_ROLLED for (int w = sub; w < records.stride; w += lanes) record[row * records.stride + w] =
          w < width ? this->features[position[w]] : N{};
    }
    this->factors(record + records.g);
  }

  __device__ __forceinline__ void points() {
    for (int64_t at = this->first; at < this->last; at += this->tile) {
      this->load(at, this->last);
      this->enter_frame(false);
      this->hidden_features();
      if (active) records.at ? write_record() : write();
      __syncwarp();
    }
  }
};

template <typename N>
struct HiddenBackward : Reverse<N, false> {
  using R = Real<N>;
  using Base = Reverse<N, false>;
  using Base::a, Base::p, Base::e, Base::d_hidden, Base::lanes, Base::sub, Base::active, Base::edge;
  const EdgeRecords<R>& records;

  __device__ __forceinline__ explicit HiddenBackward(const Call<R>& call) : Base(call), records(call.records) {}

  // ∂L/∂h without the factor
  __device__ __forceinline__ N grad(int64_t k) const {
    return constant_number<N>(a.grad_out[edge * hidden_size(p) + k]);
  }

  // A lane has whole channels.
  __device__ __forceinline__ void of_channels() {
    const int channels = p.hidden_flat / p.c;
    IST_ROLLED for (int w = sub; w < channels; w += lanes) {
      IST_ROLLED for (int k = w * p.c; k < (w + 1) * p.c; ++k) d_hidden[k] = N{};
      IST_ROLLED for (int m = 0; m < p.d; ++m) {
        const int at = w * p.c + p.coordinate[m];
        N d = grad(w * p.d + m);
        if (p.kind == kZonal) d *= e.first[m];
        e.d_factor += d * this->features[at];
        d_hidden[at] += d * e.factor;
      }
    }
    if (sub == 0) e.d_factor += grad(channels * p.d);
  }

  __device__ __forceinline__ void of_harmonics() {
    IST_ROLLED for (int m = sub; m < p.d; m += lanes) {
      N sum{};
      IST_ROLLED for (int w = 0; w < p.hidden_flat / p.c && p.kind == kZonal; ++w) sum +=
          grad(w * p.d + m) * this->features[w * p.c + p.coordinate[m]];
      e.d_first[m] = sum * e.factor, e.d_second[m] = N{};
    }
  }

  __device__ __forceinline__ void of_field() {
    e.d_factor = N{};
    if (active) of_channels(), of_harmonics();
    e.d_factor = sum_lanes(e.d_factor, 1, lanes);
    __syncwarp();
  }

  __device__ __forceinline__ void of_record() {
    const N* const grad = reinterpret_cast<const N*>(records.grad) + edge * records.size;
    IST_ROLLED for (int k = sub; k < p.hidden_flat && active; k += lanes) d_hidden[k] = N{};
    IST_ROLLED for (int row = 0; row < p.n_rows; ++row) {
      __syncwarp();  // rows can share hidden features
      const int32_t* const position = p.row + p.row_start[row];
      const int width = p.row_start[row + 1] - p.row_start[row];
      IST_ROLLED for (int w = sub; w < width && active; w += lanes) d_hidden[position[w]] +=
          grad[row * records.stride + w];
    }
    this->factors_backward(grad + records.g);
  }

  __device__ __forceinline__ void points() {
    this->clear_gradients();
    for (int64_t at = this->first; at < this->last; at += this->tile) {
      this->load(at, this->last);
      this->enter_frame(false);
      this->hidden_features();
      e.d_radius = N{};
      records.grad ? of_record() : of_field();
      this->sweep();
    }
    this->write_shell();
  }
};

template <typename N>
__global__ void __launch_bounds__(kThreads, kResident<N>) conv_hidden(const __grid_constant__ Call<Real<N>> call) {
  HiddenForward<N> warp(call);
  if (warp.number < call.shape.warps) warp.points();
}

// Two blocks: with the registers that three leave to a thread, some of them would go to local memory.
template <typename N>
__global__ void __launch_bounds__(kThreads, 2) conv_hidden_backward(const __grid_constant__ Call<Real<N>> call) {
  HiddenBackward<N> warp(call);
  if (warp.number < call.shape.warps) warp.points();
}

}  // namespace implicit_steer::IST_ISA
