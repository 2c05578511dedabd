// In place of the toolkit's header of this name: what is known inside kernels, and launches.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// Each block's own memory, the same in all of its threads.
#define AEP_SHARED(type, name, count) \
  static char name##_site;            \
  type* const name = emulated::shared_array<type>(&name##_site, count)
#define AEP_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulated::shared_memory(nullptr, 0, 16))

extern emulated::Index threadIdx, blockIdx, blockDim, gridDim;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "a kernel's parameters have 4 KiB");
  const std::tuple<P...> values(std::forward<A>(arguments)...);
  return static_cast<cudaError_t>(emulated::run({c->gridDim.x, c->gridDim.y, c->gridDim.z},
                                                {c->blockDim.x, c->blockDim.y, c->blockDim.z}, c->dynamicSmemBytes,
                                                [&] { std::apply(kernel, values); }));
}

#define __syncthreads() emulated::barrier(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::meet(mask, "__syncwarp", nullptr, 0); }

namespace emulated {

template <class T>
T exchange(const char* operation, unsigned mask, T value, int from, bool inside) {
  meet(mask, operation, &value, sizeof(T));
  if (inside) lane_value(static_cast<unsigned>(from), &value, sizeof(T));
  return value;
}

}  // namespace emulated

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int self = static_cast<int>(emulated::lane_of_thread()), first = self / width * width;
  return emulated::exchange("__shfl_sync", mask, value, first + (lane & (width - 1)), true);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int self = static_cast<int>(emulated::lane_of_thread()), from = self + static_cast<int>(delta);
  return emulated::exchange("__shfl_down_sync", mask, value, from, from < self / width * width + width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int self = static_cast<int>(emulated::lane_of_thread()), from = self - static_cast<int>(delta);
  return emulated::exchange("__shfl_up_sync", mask, value, from, from >= self / width * width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int self = static_cast<int>(emulated::lane_of_thread()), from = self ^ bits;
  return emulated::exchange("__shfl_xor_sync", mask, value, from, from < self / width * width + width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulated::meet(mask, "a vote", &predicate, sizeof(predicate));
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    int other = 0;
    if (mask >> lane & 1u) emulated::lane_value(lane, &other, sizeof(other));
    result |= (other ? 1u : 0u) << lane;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T, class V>
T atomicAdd(T* p, V value) {
  const T old = *p;
  *p = old + static_cast<T>(value);
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
inline void __threadfence() {}
// A test gives the address of an unsigned as the handle.
inline void cudaGraphSetConditional(unsigned long long handle, unsigned value) {
  *reinterpret_cast<unsigned*>(handle) = value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }

inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __ddiv_rn(double a, double b) { return a / b; }

inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
