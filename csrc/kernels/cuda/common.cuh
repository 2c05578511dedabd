// Storage types, exact weighted sums, block reductions in a fixed order, and launch sizes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "api.h"

// A block's own memory. By macros, since tests/cpp/emulated_cuda has others: there it is allocated for each block.
#ifndef AEP_SHARED
#define AEP_SHARED(type, name, count) __shared__ type name[count]
#define AEP_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace aep::kernels::cuda {
namespace {

using BF16 = __nv_bfloat16;
using F16 = __half;

template <class S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class S>
using Acc = typename Accumulate<S>::type;

__device__ inline float value_of(float x) { return x; }
__device__ inline double value_of(double x) { return x; }
__device__ inline float value_of(BF16 x) { return __bfloat162float(x); }
__device__ inline float value_of(F16 x) { return __half2float(x); }
__device__ inline void put(float* p, float x) { *p = x; }
__device__ inline void put(double* p, double x) { *p = x; }
__device__ inline void put(BF16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ inline void put(F16* p, float x) { *p = __float2half_rn(x); }

// sum + w * x with both roundings: the compiler may not fuse these.
__device__ inline float product(float w, float x) { return __fmul_rn(w, x); }
__device__ inline double product(double w, double x) { return __dmul_rn(w, x); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline double quotient(double a, double b) { return __ddiv_rn(a, b); }

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
// For a sum to which e^0 = 1 belongs, d <= 0: where rounding d / ln 2 matters, e^d does not.
__device__ inline float exponential_of_difference(float d) { return exp2f(d * 1.4426950408889634f); }
__device__ inline double exponential_of_difference(double d) { return exp(d); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

template <class A>
__device__ inline A infinity() {
  return static_cast<A>(__longlong_as_double(0x7ff0000000000000ll));
}
template <class A>
__device__ inline A not_a_number() {
  return static_cast<A>(__longlong_as_double(0x7ff8000000000000ll));
}
template <class T>
__device__ inline T larger(T a, T b) {
  return a < b ? b : a;
}
template <class T>
__device__ inline T smaller(T a, T b) {
  return b < a ? b : a;
}
// Of numbers, in one instruction.
__device__ inline float maximum(float a, float b) { return fmaxf(a, b); }
__device__ inline double maximum(double a, double b) { return fmax(a, b); }
__device__ inline float minimum(float a, float b) { return fminf(a, b); }
__device__ inline double minimum(double a, double b) { return fmin(a, b); }
// Finite: neither NaN nor infinite.
template <class A>
__device__ inline bool finite(A x) {
  return x - x == A(0);
}

template <class A>
__device__ inline A read(Scalar s) {
  return s.ptr ? *static_cast<const A*>(s.ptr) : static_cast<A>(s.value);
}

// V values that lie beside each other: 16 bytes, or one value where rows do not begin at multiples of 16 bytes.
template <class S>
constexpr int kWide = static_cast<int>(16 / sizeof(S));

template <int V, class S>
struct Pack {
  S value[V];
};

// Loads that a thread has under way before it uses the first: a device needs some 40 KB of them on each multiprocessor
// to be held up by its memory alone. A branch or a use between two loads keeps the second one back, so what is read in
// a row is asked for in loops of their own.
constexpr int kBatch = 4;

// V values beside each other, with one load where kAligned: the address is a multiple of 16.
template <int V, bool kAligned, class S>
__device__ inline Pack<V, S> load_whole(const S* p) {
  Pack<V, S> pack;
  if constexpr (V > 1 && kAligned) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    memcpy(&pack, &raw, sizeof(raw));
  } else {
    for (int i = 0; i < V; ++i) pack.value[i] = p[i];
  }
  return pack;
}
template <int V, bool kAligned, class S>
__device__ inline void store_whole(S* p, const Pack<V, S>& pack) {
  if constexpr (V > 1 && kAligned) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(raw));
    __stcg(reinterpret_cast<uint4*>(p), raw);  // one store: the compiler takes a plain assignment apart now and then
  } else {
    for (int i = 0; i < V; ++i) p[i] = pack.value[i];
  }
}

// How a row is taken apart that begins `begin` values behind the tensor's first: whole packs, each a multiple of V
// behind that first value, and the few values in front of them and behind, its edges.
template <int V, class I = int64_t>
struct RowParts {
  I head, packs, edges;
  __device__ RowParts(int64_t begin, I count) {
    head = static_cast<I>((V - begin % V) % V);
    if (head > count) head = count;
    packs = (count - head) / V;
    edges = count - packs * V;
  }
  __device__ I count() const { return edges + packs * V; }
  __device__ I pack(I i) const { return head + i * V; }
  __device__ I edge(I i) const { return i < head ? i : i + packs * V; }
};

// `aligned`: the address is a multiple of 16. Which values make a pack depends on shape and strides alone, so that sums
// have the same order wherever a tensor begins.
template <int V, class S>
__device__ inline Pack<V, S> load_pack(const S* p, int64_t stride, int count, bool aligned) {
  Pack<V, S> pack{};
  if constexpr (V > 1) {
    if (aligned && count == V) {
      const uint4 raw = *reinterpret_cast<const uint4*>(p);
      memcpy(&pack, &raw, sizeof(raw));
      return pack;
    }
  }
  for (int i = 0; i < V; ++i) {
    if (i < count) pack.value[i] = p[i * stride];
  }
  return pack;
}
template <int V, class S>
__device__ inline void store_pack(S* p, int64_t stride, const Pack<V, S>& pack, int count, bool aligned) {
  if constexpr (V > 1) {
    if (aligned && count == V) {
      uint4 raw;
      memcpy(&raw, &pack, sizeof(raw));
      *reinterpret_cast<uint4*>(p) = raw;
      return;
    }
  }
  for (int i = 0; i < V; ++i) {
    if (i < count) p[i * stride] = pack.value[i];
  }
}
// Values of the pack that begins at k of K.
template <int V>
__device__ inline int pack_count(int64_t k, int64_t K) {
  return K - k < V ? static_cast<int>(K - k) : V;
}

inline bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

constexpr unsigned kWarpSize = 32, kAllLanes = 0xffffffffu;

constexpr int kMaxThreads = 256;
// Blocks of kMaxThreads that a multiprocessor shall hold, for kernels that wait for memory: 64 registers a thread. (In
// double fewer, which have as many bytes under way.)
template <class S>
constexpr int kBlocksAtOnce = sizeof(S) == 8 ? 2 : 4;

// The block's merged value, in every thread; a tree over the threads, so the order depends on blockDim only.
// `shared` holds blockDim.x values; blockDim.x is a power of two. Ends with a barrier: `shared` may be used again at
// once.
template <class T, class Merge>
__device__ T block_reduce(T value, T* shared, Merge merge) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] = merge(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  const T result = shared[0];
  __syncthreads();
  return result;
}

template <class A>
__device__ A block_sum(A value, A* shared) {
  return block_reduce(value, shared, [](A a, A b) { return a + b; });
}

// A power of two of threads for a row of `count` values, a few values a thread.
inline unsigned threads_for(int64_t count) {
  unsigned threads = 32;
  while (threads < kMaxThreads && static_cast<int64_t>(threads) * 4 < count) threads *= 2;
  return threads;
}

// Rows of `packs` packs are taken by warps, each a row, where that fills the device or a block would not be needed.
inline bool row_needs_block(int64_t rows, int64_t packs) { return packs > 256 || (packs > 32 && rows < 2048); }
constexpr int64_t kRowsOfBlock = kMaxThreads / kWarpSize;  // one row for each warp

// Blocks for `count` pieces of work; kernels loop over what lies beyond (grid stride), so that any int64 count is fine.
inline unsigned blocks_for(int64_t count) {
  constexpr int64_t most = 1 << 20;
  return static_cast<unsigned>(count < most ? count : most);
}
inline unsigned blocks_for_elements(int64_t count) { return blocks_for((count + kMaxThreads - 1) / kMaxThreads); }

// A launch as a function call: <<<>>> is no C++, and the kernels are also compiled by the host's compiler, for tests.
template <class... P, class... A>
inline cudaError_t enqueue(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                           A&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  if (error != cudaSuccess) (void)cudaGetLastError();  // forgets it: it is told here
  return error;
}

#define AEP_CUDA_BY_DTYPE(dtype, F, ...) \
  switch (dtype) {                       \
    case DType::f32:                     \
      return F<float>(__VA_ARGS__);      \
    case DType::f64:                     \
      return F<double>(__VA_ARGS__);     \
    case DType::bf16:                    \
      return F<BF16>(__VA_ARGS__);       \
    case DType::f16:                     \
      return F<F16>(__VA_ARGS__);        \
  }                                      \
  return cudaErrorInvalidValue

}  // namespace
}  // namespace aep::kernels::cuda
