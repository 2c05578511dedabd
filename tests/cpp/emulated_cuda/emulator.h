// An emulation of CUDA's execution model on the host, for tests: enough of it that csrc/kernels/cuda/*.cu compile with
// a C++ compiler and do what they would do on a device, one block after the other, every thread a fiber of its own.
//
// What it finds, and reports as cudaErrorLaunchFailure with a message in fault():
//   * __syncthreads() that not all threads of the block reach, or that they reach in different lines;
//   * warp operations whose lanes do not all arrive, arrive at different operations, or read a lane outside the mask;
//   * work that depends on the order in which threads and blocks run (a missing barrier, a race): every launch runs in
//     several orders (three, or two if it is large) from the same memory, whose bytes must be the same afterwards;
//     shared memory starts with other bytes each time, so that reading it before it was written shows too;
//   * sizes that a launch would refuse: threads, grid, shared memory, parameters.
// Shared memory is allocated for each block in its exact size, so that the address sanitizer sees what goes beyond.
//
// What it does not show: anything about time, memory models weaker than sequential (a missing fence), arithmetic that
// the device does otherwise (exp and log differ in their last bits), and races that come out the same in every order.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <string>
#include <vector>

namespace emulated {

struct Index {
  unsigned x, y, z;
};

enum class Order { forward, reverse, shuffled };

// Memory that a launch may change: compared between the orders. Set by the tests. Null: not known, so that a kernel
// cannot be run twice; it is run in one order.
struct Region {
  void* data;
  size_t size;
};
extern std::vector<Region> (*regions)();
extern Order order_without_regions;

// The first fault since the last call of clear_fault(); empty if there was none.
const std::string& fault();
void clear_fault();

// Kernels launched since the start (each counted once, whatever the number of orders).
int64_t launches();

// Called by the headers.
int run(const Index& grid, const Index& block, size_t shared_bytes, const std::function<void()>& thread);
void barrier(const char* file, int line);
void* shared_memory(const void* site, size_t bytes, size_t alignment);  // site null: the dynamic one
unsigned lane_of_thread();
// Waits for all lanes of `mask`; afterwards lane_value() reads what each gave.
void meet(unsigned mask, const char* operation, const void* value, size_t bytes);
void lane_value(unsigned lane, void* value, size_t bytes);

template <class T>
T* shared_array(const void* site, size_t count) {
  return static_cast<T*>(shared_memory(site, count * sizeof(T), alignof(T)));
}

}  // namespace emulated
