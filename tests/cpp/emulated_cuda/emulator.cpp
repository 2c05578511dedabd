// Compiled without sanitizers, which see the kernels themselves: it only tells the address sanitizer of the stacks.
#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>

#include "cuda_runtime.h"

#if defined(AEP_FIBERS_UNDER_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(AEP_USE_UCONTEXT)
#define AEP_USE_UCONTEXT 1  // elsewhere: slower, the same otherwise
#endif
#if defined(AEP_USE_UCONTEXT)
#include <ucontext.h>
#endif

emulated::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

std::vector<Region> (*regions)() = nullptr;
Order order_without_regions = Order::forward;

namespace {

constexpr size_t kStack = 128 * 1024, kSharedLimit = 48 * 1024;
constexpr unsigned kWarp = 32, kMostThreads = 1024;

enum class State { ready, at_barrier, at_warp, done };

struct Thread {
  State state;
  Index index;
  char* stack;
#if !defined(AEP_USE_UCONTEXT)
  void* context;
#else
  ucontext_t context;
#endif
  void* fake_stack;
  const char* file;  // of the barrier
  int line;
  const char* operation;  // of the warp
  unsigned mask, parity;
  unsigned char value[2][16];
};

struct Shared {
  const void* site;
  size_t bytes;
  void* memory;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Shared> shared;
  size_t dynamic_bytes = 0;
  unsigned char garbage = 0xff;  // what shared memory holds at first
  Thread* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::string fault;
  int64_t launches = 0;
  uint64_t random = 0x9E3779B97F4A7C15ull;
#if !defined(AEP_USE_UCONTEXT)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
} machine;

void fail(const std::string& what) {
  if (machine.fault.empty()) machine.fault = what;
}

std::string name_of(const Thread& t) {
  char text[160];
  snprintf(text, sizeof(text), "thread (%u,%u,%u) of block (%u,%u,%u)", t.index.x, t.index.y, t.index.z, blockIdx.x,
           blockIdx.y, blockIdx.z);
  return text;
}

// --- switching between the scheduler and the fibers ---

#if !defined(AEP_USE_UCONTEXT)
extern "C" void aep_emulated_switch(void** save, void* load);
asm(R"(
.text
.type aep_emulated_switch, @function
aep_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size aep_emulated_switch, .-aep_emulated_switch
)");
#endif

void leave_fiber(bool for_good) {
  Thread& t = *machine.current;
#if defined(AEP_FIBERS_UNDER_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &t.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_size);
#endif
#if !defined(AEP_USE_UCONTEXT)
  aep_emulated_switch(&t.context, machine.scheduler);
#else
  swapcontext(&t.context, &machine.scheduler);
#endif
#if defined(AEP_FIBERS_UNDER_ASAN)
  __sanitizer_finish_switch_fiber(t.fake_stack, nullptr, nullptr);
#endif
  (void)for_good;
}

void fiber_main() {
#if defined(AEP_FIBERS_UNDER_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  (*machine.body)();
  machine.current->state = State::done;
  leave_fiber(true);
  abort();  // nobody resumes a thread that is done
}

void prepare(Thread& t) {
  if (!t.stack) {
    t.stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (t.stack == MAP_FAILED) abort();
  }
#if defined(AEP_FIBERS_UNDER_ASAN)
  // What an ended fiber leaves behind are the red zones of its first frames, an abandoned one those of all.
  const size_t used = t.state == State::done ? 8192 : kStack;
  __asan_unpoison_memory_region(t.stack + kStack - used, used);
#endif
  t.state = State::ready;
  t.fake_stack = nullptr;
  t.parity = 0;
#if !defined(AEP_USE_UCONTEXT)
  void** top = reinterpret_cast<void**>(t.stack + kStack);
  *--top = nullptr;  // where fiber_main would return to; keeps the alignment that a call leaves
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.context = top;
#else
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack;
  t.context.uc_stack.ss_size = kStack;
  t.context.uc_link = nullptr;
  makecontext(&t.context, fiber_main, 0);
#endif
}

void resume(Thread& t) {
  machine.current = &t;
  threadIdx = t.index;
#if defined(AEP_FIBERS_UNDER_ASAN)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, t.stack, kStack);
#endif
#if !defined(AEP_USE_UCONTEXT)
  aep_emulated_switch(&machine.scheduler, t.context);
#else
  swapcontext(&machine.scheduler, &t.context);
#endif
#if defined(AEP_FIBERS_UNDER_ASAN)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// --- orders ---

uint64_t next_random() {
  machine.random ^= machine.random >> 12;
  machine.random ^= machine.random << 25;
  machine.random ^= machine.random >> 27;
  return machine.random * 0x2545F4914F6CDD1Dull;
}

std::vector<size_t> sequence(size_t count, Order order) {
  std::vector<size_t> list(count);
  for (size_t i = 0; i < count; ++i) list[i] = order == Order::reverse ? count - 1 - i : i;
  if (order == Order::shuffled) {
    for (size_t i = count; i > 1; --i) std::swap(list[i - 1], list[next_random() % i]);
  }
  return list;
}

// --- one block ---

// Lets the lanes go on whose whole mask waits at the same operation.
bool release_warps(size_t threads) {
  bool released = false;
  for (size_t first = 0; first < threads; first += kWarp) {
    for (size_t i = first; i < std::min(first + kWarp, threads); ++i) {
      const Thread& t = machine.threads[i];
      if (t.state != State::at_warp) continue;
      bool all = true;
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(t.mask >> lane & 1u)) continue;
        const size_t other = first + lane;
        if (other >= threads || machine.threads[other].state == State::done) {
          fail(std::string(t.operation) + " of " + name_of(t) + " waits for a lane that has ended or does not exist");
          return false;
        }
        const Thread& o = machine.threads[other];
        if (o.state != State::at_warp) {
          all = false;
        } else if (o.mask != t.mask || (o.operation != t.operation && strcmp(o.operation, t.operation) != 0)) {
          fail("lanes of a warp meet at different operations: " + name_of(t) + " at " + t.operation + ", " +
               name_of(o) + " at " + o.operation);
          return false;
        }
      }
      if (!all) continue;
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (t.mask >> lane & 1u) machine.threads[first + lane].state = State::ready;
      }
      released = true;
    }
  }
  return released;
}

// All threads that have not ended wait: at one barrier, or never to be released.
bool release_block(size_t threads) {
  const Thread* first = nullptr;
  for (size_t i = 0; i < threads; ++i) {
    const Thread& t = machine.threads[i];
    if (t.state == State::at_warp) {
      fail(std::string(t.operation) + " of " + name_of(t) + " waits for lanes that are elsewhere");
      return false;
    }
    if (t.state == State::at_barrier && !first) first = &t;
  }
  for (size_t i = 0; i < threads; ++i) {
    const Thread& t = machine.threads[i];
    if (t.state == State::done) {
      fail("__syncthreads() at " + std::string(first->file) + ":" + std::to_string(first->line) +
           " is not reached by all: " + name_of(t) + " has ended");
      return false;
    }
    if (t.line != first->line || (t.file != first->file && strcmp(t.file, first->file) != 0)) {
      fail("threads wait at different __syncthreads(): " + name_of(*first) + " at line " +
           std::to_string(first->line) + ", " + name_of(t) + " at line " + std::to_string(t.line));
      return false;
    }
  }
  for (size_t i = 0; i < threads; ++i) machine.threads[i].state = State::ready;
  return true;
}

void run_block(size_t threads, Order order) {
  for (size_t i = 0; i < threads; ++i) {
    Thread& t = machine.threads[i];
    const unsigned at = static_cast<unsigned>(i);
    t.index = {at % blockDim.x, at / blockDim.x % blockDim.y, at / blockDim.x / blockDim.y};
    prepare(t);
  }
  std::vector<size_t> list = sequence(threads, order);
  while (machine.fault.empty()) {
    size_t done = 0;
    bool progress = false;
    for (size_t i : list) {
      Thread& t = machine.threads[i];
      if (t.state == State::ready) {
        resume(t);
        progress = true;
        if (!machine.fault.empty()) break;
      }
      done += t.state == State::done;
    }
    if (done == threads || !machine.fault.empty()) break;
    if (release_warps(threads) || progress) continue;
    if (machine.fault.empty()) release_block(threads);
  }
  size_t bytes = 0;
  for (const Shared& s : machine.shared) {
    bytes += s.bytes;
    free(s.memory);
  }
  machine.shared.clear();
  if (bytes > kSharedLimit) fail("a block uses " + std::to_string(bytes) + " bytes of shared memory");
}

void run_grid(const Index& grid, size_t threads, Order order) {
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  for (size_t b : sequence(blocks, order)) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(threads, order);
    if (!machine.fault.empty()) return;
  }
}

using Bytes = std::vector<std::unique_ptr<unsigned char[]>>;

Bytes copy_of(const std::vector<Region>& list) {
  Bytes bytes;
  for (const Region& r : list) {
    bytes.emplace_back(new unsigned char[r.size + 1]);
    if (r.size) memcpy(bytes.back().get(), r.data, r.size);
  }
  return bytes;
}

}  // namespace

const std::string& fault() { return machine.fault; }
void clear_fault() { machine.fault.clear(); }
int64_t launches() { return machine.launches; }

int run(const Index& grid, const Index& block, size_t shared_bytes, const std::function<void()>& thread) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > kSharedLimit) {
    return cudaErrorInvalidConfiguration;
  }
  static std::mutex one_launch;  // a process has one machine, whichever thread asks
  const std::lock_guard<std::mutex> lock(one_launch);
  ++machine.launches;
  if (machine.threads.size() < kMostThreads) machine.threads.resize(kMostThreads);
  machine.body = &thread;
  machine.dynamic_bytes = shared_bytes;
  blockDim = block, gridDim = grid;
  if (!regions) {
    machine.garbage = 0xff;
    run_grid(grid, threads, order_without_regions);
    return machine.fault.empty() ? cudaSuccess : cudaErrorLaunchFailure;
  }
  const std::vector<Region> list = regions();
  const Bytes before = copy_of(list);
  Bytes first;
  const bool large = size_t(grid.x) * grid.y * grid.z * threads > 8192;
  for (Order order : {Order::forward, Order::reverse, Order::shuffled}) {
    if (large && order == Order::shuffled) break;  // two orders, for the time it takes
    if (order != Order::forward) {
      for (size_t i = 0; i < list.size(); ++i) {
        if (list[i].size) memcpy(list[i].data, before[i].get(), list[i].size);
      }
    }
    machine.garbage = order == Order::forward ? 0xff : order == Order::reverse ? 0x00 : 0x5a;
    run_grid(grid, threads, order);
    if (!machine.fault.empty()) return cudaErrorLaunchFailure;
    if (order == Order::forward) first = copy_of(list);
    for (size_t i = 0; i < list.size(); ++i) {
      if (list[i].size && memcmp(list[i].data, first[i].get(), list[i].size) != 0) {
        fail("the result depends on the order in which threads run");
        return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

void barrier(const char* file, int line) {
  Thread& t = *machine.current;
  t.state = State::at_barrier;
  t.file = file, t.line = line;
  leave_fiber(false);
}

void* shared_memory(const void* site, size_t bytes, size_t alignment) {
  if (!site) bytes = machine.dynamic_bytes;
  for (const Shared& s : machine.shared) {
    if (s.site == site) return s.memory;
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) abort();
  memset(memory, machine.garbage, bytes);
  machine.shared.push_back({site, bytes, memory});
  return memory;
}

namespace {

size_t place_of(const Thread& t) { return static_cast<size_t>(&t - machine.threads.data()); }

}  // namespace

unsigned lane_of_thread() { return static_cast<unsigned>(place_of(*machine.current) % kWarp); }

void meet(unsigned mask, const char* operation, const void* value, size_t bytes) {
  Thread& t = *machine.current;
  if (!(mask >> lane_of_thread() & 1u)) fail(std::string(operation) + ": a lane that its mask does not name");
  if (bytes > sizeof(t.value[0])) abort();
  t.parity ^= 1u;
  if (bytes) memcpy(t.value[t.parity], value, bytes);
  t.mask = mask, t.operation = operation;
  t.state = State::at_warp;
  leave_fiber(false);
}

void lane_value(unsigned lane, void* value, size_t bytes) {
  Thread& t = *machine.current;
  if (!(t.mask >> lane & 1u)) {
    fail(std::string(t.operation) + ": reads a lane outside the mask");
    memset(value, 0x5a, bytes);
    return;
  }
  // A lane may be one operation ahead, not two: it waits there for this one.
  memcpy(value, machine.threads[place_of(t) / kWarp * kWarp + lane].value[t.parity], bytes);
}

}  // namespace emulated
