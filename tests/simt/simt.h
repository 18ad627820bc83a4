// CUDA C++ on the processor, for tests: csrc/cuda/compat.cuh includes this where nvcc does not compile. Every CUDA
// thread is a fiber of one processor thread, and a kernel is compiled as it stands.
//
// What is checked: results under random schedules, with shared memory full of NaN at the start of every block; barriers
// that not all threads reach, deadlocks, lanes that meet at different instructions; with -fsanitize=address and bounds,
// memory errors; with -fsanitize=thread, whose hooks engine.cpp supplies itself, data races within a block and between
// blocks, accesses outside the registered arrays, and misaligned ones.
//
// Not modelled: what blocks that wait for each other would need (they run one after another), weakly ordered memory
// beyond what the race check sees, and time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
// The library's thread-local memory is the shared memory of the block that runs: nothing else in it may be
// thread_local.
#define __shared__ thread_local
#define SIMT_UNTRACED __attribute__((no_sanitize("thread")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

struct Thread {
  uint3 index;
  unsigned number, lane, warp;
  void *stack_pointer, *stack;
  void* fake_stack;  // AddressSanitizer's
};
extern Thread* self;
extern uint3 block_index;
extern dim3 block_size, grid_size;

// What a lane brings to an operation of its warp.
struct Operand {
  const void* in;
  void* out;
  int argument;
};
using WarpOperation = void (*)(Operand*, uint32_t mask, size_t bytes);

struct Site {
  const char* what;
  const char* file;
  int line;
};

void block_barrier(Site site);
void fence(Site site);
void warp_barrier(uint32_t mask, Site site);
void collective(uint32_t mask, Site site, Operand operand, size_t bytes, WarpOperation operation);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
enum Access { kRead, kWrite, kAtomic };
void trace(const void* address, size_t bytes, Access access, const void* instruction);
unsigned char* dynamic_shared();
void run(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel, void (*call)(void*), void* context,
         const char* name);

template <typename Kernel, typename F>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel* kernel, const char* name, F call) {
  run(
      grid, block, shared_bytes, reinterpret_cast<const void*>(kernel), [](void* f) { (*static_cast<F*>(f))(); }, &call,
      name);
}

SIMT_UNTRACED inline void shuffle(Operand* lanes, uint32_t mask, size_t bytes) {
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const int source = lanes[i].argument;
    if (!(mask >> source & 1)) fail("shuffle: lane %d reads lane %d, which takes no part", i, source);
    memcpy(lanes[i].out, lanes[source].in, bytes);
  }
}
SIMT_UNTRACED inline void ballot(Operand* lanes, uint32_t mask, size_t) {
  uint32_t set = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) set |= static_cast<uint32_t>(lanes[i].argument != 0) << i;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) *static_cast<uint32_t*>(lanes[i].out) = set;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  return memcpy(&bits, &x, 4), bits;
}
inline float float_of(uint32_t bits) {
  float x;
  return memcpy(&x, &bits, 4), x;
}
// A lane's fragments of a product, as csrc/cuda/mma.cuh lays them out.
struct Fragments {
  const uint32_t *a, *b;
  float* d;
};
// The sum of a row times a column is formed in double and rounded once; tensor cores lose a little more.
SIMT_UNTRACED inline void multiply_tf32(Operand* lanes, uint32_t, size_t) {
  const auto tf32 = [](uint32_t bits) { return float_of(bits & 0xffffe000u); };
  const auto of = [&](int lane) { return *static_cast<const Fragments*>(lanes[lane].in); };
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32(of(lane).a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32(of(lane).b[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      double sum = of(lane).d[i];
      for (int k = 0; k < 8; ++k) sum += static_cast<double>(a[g + 8 * (i / 2)][k]) * b[k][2 * t + i % 2];
      of(lane).d[i] = static_cast<float>(sum);
    }
  }
}
SIMT_UNTRACED inline void multiplied(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  const Fragments fragments{a, b, d};
  collective(0xffffffffu, site, {&fragments, nullptr, 0}, 0, multiply_tf32);
}
template <typename T>
SIMT_UNTRACED __attribute__((noinline)) T shuffled(uint32_t mask, T value, int source, Site site) {
  T result;
  collective(mask, site, {&value, &result, source}, sizeof value, shuffle);
  return result;
}
SIMT_UNTRACED inline uint32_t balloted(uint32_t mask, bool set, Site site) {
  uint32_t result;
  collective(mask, site, {nullptr, &result, set}, 0, ballot);
  return result;
}
template <typename T>
SIMT_UNTRACED __attribute__((noinline)) T atomic_add(T* address, T value) {
  trace(address, sizeof value, kAtomic, __builtin_return_address(0));
  const T old = *address;
  *address = old + value;
  return old;
}

}  // namespace simt

#define SIMT_SITE(what) (simt::Site{what, __FILE__, __LINE__})
#define threadIdx (simt::self->index)
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size
#define __syncthreads() simt::block_barrier(SIMT_SITE("__syncthreads"))
#define __syncwarp() simt::warp_barrier(0xffffffffu, SIMT_SITE("__syncwarp"))
#define __shfl_sync(mask, value, lane) simt::shuffled(mask, value, lane, SIMT_SITE("__shfl_sync"))
#define __shfl_xor_sync(mask, value, bits) \
  simt::shuffled(mask, value, static_cast<int>(simt::self->lane ^ (bits)), SIMT_SITE("__shfl_xor_sync"))
#define __threadfence() simt::fence(SIMT_SITE("__threadfence"))
#define __ballot_sync(mask, set) simt::balloted(mask, set, SIMT_SITE("__ballot_sync"))
#define mma_m16n8k8(d, a, b) simt::multiplied(d, a, b, SIMT_SITE("mma_m16n8k8"))
#define LAUNCH(kernel, grid, block, bytes, stream, ...) \
  (static_cast<void>(stream), simt::launch(grid, block, bytes, kernel, name, [&] { kernel(__VA_ARGS__); }))
#define SHARED_MEMORY(T, name) T* const name = reinterpret_cast<T*>(simt::dynamic_shared())

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int atomicAdd(int* address, int value) { return simt::atomic_add(address, value); }
inline float __uint_as_float(uint32_t bits) { return simt::float_of(bits); }
inline uint32_t __float_as_uint(float x) { return simt::bits_of(x); }
inline unsigned block_threads() { return blockDim.x; }
inline unsigned thread_of_block() { return threadIdx.x; }
inline float exp2_approximate(float x) { return exp2f(x); }
inline float reciprocal_approximate(float x) { return 1 / x; }
inline float inverse_root_approximate(float x) { return 1 / sqrtf(x); }
inline float min_or_nan(float x, float y) { return x < y || std::isnan(x) ? x : y; }
template <typename T>
T* opaque(T* pointer) {
  return pointer;
}
template <typename T>
T* global_memory(T* pointer) {
  return pointer;
}
inline const float* row_of(const float* rows, int row, int n) { return rows + int64_t{row} * n; }

// ---- the runtime, of the device that a test chose (engine.h)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDefault };
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, bytes), cudaSuccess;
}
struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return attributes->maxThreadsPerBlock = 1024, cudaSuccess;
}
namespace simt {
cudaError_t allow_shared(const void* kernel, int bytes);
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return simt::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
