// That the emulation finds what it is there for: kernels with one fault each, and the half-precision types.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/common.cuh"
#include "testing.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace testing;

namespace {

template <class... P, class... A>
cudaError_t start(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared_bytes, A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}

// A fault whose description holds `text`.
void expect_fault(cudaError_t error, const char* text, int line) {
  CHECK(error == cudaErrorLaunchFailure && emulated::fault().find(text) != std::string::npos,
        "line %d: error %d, \"%s\", want \"%s\"", line, int(error), emulated::fault().c_str(), text);
  emulated::clear_fault();
}
#define EXPECT_FAULT(error, text) expect_fault(error, text, __LINE__)

// --- sound kernels ---

__global__ void block_sum_kernel(const int* in, int* out) {
  AEP_SHARED(int, shared, 96);
  shared[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
    out[blockIdx.x] = sum;
  }
}

__global__ void warp_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int sum = lane;
  for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
  int group = lane;
  for (int half = 2; half > 0; half /= 2) group += __shfl_down_sync(0xffffffffu, group, half, 4);
  out[threadIdx.x * 4 + 0] = sum;
  out[threadIdx.x * 4 + 1] = __shfl_sync(0xffffffffu, group, 0, 4);
  out[threadIdx.x * 4 + 2] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  // Half a warp on its own, twice in a row.
  int up = lane;
  if (lane < 16) {
    up = __shfl_up_sync(0xffffu, up, 1);
    up = __shfl_up_sync(0xffffu, up, 1);
  }
  out[threadIdx.x * 4 + 3] = up;
}

__global__ void dynamic_kernel(unsigned char* out, size_t bytes) {
  AEP_DYNAMIC_SHARED(unsigned char, shared);
  out[threadIdx.x] = 0;
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) shared[i] = static_cast<unsigned char>(i);
  __syncthreads();
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) out[threadIdx.x] ^= shared[bytes - 1 - i];
#if defined(__SANITIZE_ADDRESS__)
  out[threadIdx.x] = __asan_address_is_poisoned(shared + bytes) && !__asan_address_is_poisoned(shared + bytes - 1);
#else
  out[threadIdx.x] = 1;
#endif
}

// --- one fault each ---

__global__ void without_barrier(int* out) {
  AEP_SHARED(int, shared, 64);
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = shared[63 - threadIdx.x];
}
__global__ void uninitialised(int* out) {
  AEP_SHARED(int, shared, 64);
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void between_blocks(int* out) {
  if (threadIdx.x == 0) *out = static_cast<int>(blockIdx.x);
}
__global__ void float_atomics(float* out) { atomicAdd(out, threadIdx.x == 0 ? 1e8f : 1.0f); }
__global__ void barrier_in_branch(int) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers(int) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void lane_missing(int* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}
__global__ void lane_elsewhere(int* out) {
  if (threadIdx.x == 5) __syncthreads();
  out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}
__global__ void outside_mask(int* out) {
  if (threadIdx.x < 4) out[threadIdx.x] = __shfl_sync(0xfu, 1, 7);
}
__global__ void not_in_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xfu, 1, 0); }
__global__ void other_operation(int* out) {
  out[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(0xffffffffu, 1, 0) : __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void much_shared(int* out) {
  AEP_SHARED(int, shared, 10000);
  AEP_DYNAMIC_SHARED(char, more);
  shared[threadIdx.x] = more[0] = 1;
  out[threadIdx.x] = 1;
}

void sound() {
  Guarded in(96 * 5 * 4), sums(5 * 4), warps(64 * 4 * 4), bytes(32);
  for (int i = 0; i < 96 * 5; ++i) in.as<int>()[i] = i;
  CHECK(start(block_sum_kernel, 5, 96, 0, in.as<int>(), sums.as<int>()) == cudaSuccess, "%s",
        emulated::fault().c_str());
  for (int b = 0; b < 5; ++b) CHECK(sums.as<int>()[b] == 96 * 96 * b + 95 * 48);
  CHECK(start(warp_kernel, 1, 64, 0, warps.as<int>()) == cudaSuccess, "%s", emulated::fault().c_str());
  for (int t = 0; t < 64; ++t) {
    const int* got = warps.as<int>() + 4 * t;
    const int lane = t % 32, first = lane / 4 * 4;
    CHECK(got[0] == 31 * 16 && got[1] == 4 * first + 6 && got[2] == 0x49249249);
    CHECK(got[3] == (lane >= 16 ? lane : lane < 2 ? lane == 1 ? 0 : 0 : lane - 2), "lane %d: %d", lane, got[3]);
  }
  CHECK(start(dynamic_kernel, 1, 32, 37, bytes.as<unsigned char>(), size_t(37)) == cudaSuccess);
  for (int i = 0; i < 32; ++i) CHECK(bytes.as<unsigned char>()[i] == 1);
}

void faults() {
  Guarded out(64 * 4);
  const char* order = "depends on the order";
  memset(out.data(), 0, out.size());
  EXPECT_FAULT(start(without_barrier, 1, 64, 0, out.as<int>()), order);
  EXPECT_FAULT(start(uninitialised, 1, 64, 0, out.as<int>()), order);
  EXPECT_FAULT(start(between_blocks, 3, 32, 0, out.as<int>()), order);
  *out.as<float>() = 0;
  EXPECT_FAULT(start(float_atomics, 1, 64, 0, out.as<float>()), order);
  EXPECT_FAULT(start(barrier_in_branch, 1, 64, 0, 0), "is not reached by all");
  EXPECT_FAULT(start(two_barriers, 1, 64, 0, 0), "different __syncthreads()");
  EXPECT_FAULT(start(lane_missing, 1, 32, 0, out.as<int>()), "has ended");
  EXPECT_FAULT(start(lane_missing, 1, 16, 0, out.as<int>()), "does not exist");
  EXPECT_FAULT(start(lane_elsewhere, 1, 32, 0, out.as<int>()), "waits for lanes that are elsewhere");
  EXPECT_FAULT(start(outside_mask, 1, 32, 0, out.as<int>()), "outside the mask");
  EXPECT_FAULT(start(not_in_mask, 1, 32, 0, out.as<int>()), "does not name");
  EXPECT_FAULT(start(other_operation, 1, 32, 0, out.as<int>()), "different operations");
  EXPECT_FAULT(start(much_shared, 1, 1, 16000, out.as<int>()), "shared memory");
  CHECK(start(barrier_in_branch, 1, 1025, 0, 0) == cudaErrorInvalidConfiguration);
  CHECK(start(barrier_in_branch, 0, 32, 0, 0) == cudaErrorInvalidConfiguration);
  CHECK(start(barrier_in_branch, 1, 32, 48 * 1024 + 1, 0) == cudaErrorInvalidConfiguration);
  // The kernels' own way to launch tells what was refused, whether or not the runtime still knows.
  CHECK(aep::kernels::cuda::enqueue(barrier_in_branch, 1, 1025, 0, nullptr, 0) == cudaErrorInvalidConfiguration);
  CHECK(start(barrier_in_branch, 1, 32, 0, 0) == cudaSuccess);  // all threads of this block reach it
}

void half_types() {
  const auto bits_of = [](auto x) {
    uint16_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
  };
  int wrong = 0;
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    __half h;
    __nv_bfloat16 b;
    memcpy(&h, &bits, 2), memcpy(&b, &bits, 2);
    wrong += !same(static_cast<double>(__half2float(h)), load_value(DType::f16, &bits, 0));
    wrong += !same(static_cast<double>(__bfloat162float(b)), load_value(DType::bf16, &bits, 0));
  }
  Random random(1);
  for (int i = 0; i < 200000; ++i) {
    uint32_t bits = static_cast<uint32_t>(random.next() >> 32);
    if (i % 2) bits = (bits & 0x80ffffffu) | (0x33000000u + static_cast<uint32_t>(random.below(22)) * 0x00800000u);
    if (i % 3 == 0) bits &= 0xfffff000u;  // halfway cases
    float x;
    memcpy(&x, &bits, sizeof(x));
    if (isnan(x)) continue;
    uint16_t f16, bf16;
    store_value(DType::f16, &f16, 0, static_cast<double>(x));
    store_value(DType::bf16, &bf16, 0, static_cast<double>(x));
    wrong += bits_of(__float2half_rn(x)) != f16;
    wrong += bits_of(__float2bfloat16_rn(x)) != bf16;
  }
  CHECK(wrong == 0, "%d conversions", wrong);
}

}  // namespace

int main() {
  CHECK(emulated::regions != nullptr && backend::table().name != nullptr);  // the emulation knows the buffers
  sound();
  faults();
  half_types();
  return finish("test_emulated_cuda");
}
