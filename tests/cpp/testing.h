// A few lines in place of a test framework, and buffers that end where the process may no longer read.
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/cpu/api.h"
#include "kernels/cpu/kernel_table.h"
#ifdef AEP_TEST_CUDA  // the same tests on the CUDA kernels, emulated
#include "emulated_cuda/backend.h"
#else
namespace backend {
using aep::kernels::cpu::ensemble_backward_weights_finish;
using aep::kernels::cpu::find_bad_label;
using aep::kernels::cpu::gate_partition;
using aep::kernels::cpu::gate_scratch_bytes;
using aep::kernels::cpu::multi_exit_loss_reduce;
constexpr bool kCuda = false;
}  // namespace backend
#endif

namespace testing {

using namespace aep::kernels;
using aep::kernels::cpu::KernelTable;

inline int failures = 0, checks = 0;

inline void report(const char* file, int line, const std::string& what) {
  if (++failures <= 20) fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}
inline int finish(const char* name) {
  printf("%s: %d checks, %d failures\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}

#define CHECK(condition, ...)                                                                                          \
  do {                                                                                                                 \
    ++testing::checks;                                                                                                 \
    if (!(condition)) testing::report(__FILE__, __LINE__, std::string(#condition) + " " + testing::text(__VA_ARGS__)); \
  } while (0)

inline std::string text() { return ""; }
__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[400];
  va_list list;
  va_start(list, format);
  vsnprintf(buffer, sizeof(buffer), format, list);
  va_end(list);
  return buffer;
}

// Equal up to `tolerance` (relative above 1, absolute below), equal infinities, or both NaN.
inline bool near(double a, double b, double tolerance) {
  if (isnan(a) || isnan(b)) return isnan(a) && isnan(b);
  if (isinf(a) || isinf(b)) return a == b;
  return fabs(a - b) <= tolerance * fmax(1.0, fabs(b));
}
// The same bits, where every NaN counts as the same.
inline bool same(double a, double b) { return (isnan(a) && isnan(b)) || a == b; }

// xorshift64*: the same numbers everywhere.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Dull;
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double normal() { return sqrt(-2 * log(uniform() + 1e-300)) * cos(6.283185307179586 * uniform()); }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
};

class Guarded;
// All that live, in the order of their creation.
inline std::vector<Guarded*>& all_guarded() {
  static std::vector<Guarded*> list;
  return list;
}

// Memory whose last byte stands before a page that traps every access (masked vector loads are not seen by the
// sanitizers), with a known pattern in front of the first byte.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    length_ = (bytes + 64 + page - 1) / page * page + page;
    base_ =
        static_cast<unsigned char*>(mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + length_ - page, page, PROT_NONE) != 0) abort();
    data_ = base_ + length_ - page - bytes;
    memset(data_ - 64, 0xA5, 64);
    if (bytes) memset(data_, 0xFF, bytes);  // NaN: what is not written shows
    all_guarded().push_back(this);
  }
  ~Guarded() {
    all_guarded().erase(std::find(all_guarded().begin(), all_guarded().end(), this));
    for (int i = 1; i <= 64; ++i) {
      if (data_[-i] != 0xA5) {
        report(__FILE__, __LINE__, "write before the start of a buffer");
        break;
      }
    }
    munmap(base_, length_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* data() { return data_; }
  size_t size() const { return bytes_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }

 private:
  size_t bytes_, length_;
  unsigned char *base_, *data_;
};

inline size_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }
inline DType acc_of(DType d) { return d == DType::f64 ? DType::f64 : DType::f32; }
inline const char* name_of(DType d) {
  return d == DType::f32 ? "f32" : d == DType::f64 ? "f64" : d == DType::bf16 ? "bf16" : "f16";
}
constexpr DType kAllTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

// Unit roundoff of the storage type, and the tolerance for values that went through it.
inline double epsilon(DType d) {
  return d == DType::f64 ? 0x1p-53 : d == DType::f32 ? 0x1p-24 : d == DType::bf16 ? 0x1p-8 : 0x1p-11;
}

inline double load_value(DType d, const void* p, int64_t i) {
  if (d == DType::f64) return static_cast<const double*>(p)[i];
  if (d == DType::f32) return static_cast<double>(static_cast<const float*>(p)[i]);
  float f;
  cpu::kScalarTable.convert(static_cast<const uint16_t*>(p) + i, d, &f, DType::f32, 1);
  return static_cast<double>(f);
}
// Rounds as the kernels do: through the accumulation type.
inline void store_value(DType d, void* p, int64_t i, double x) {
  const float f = static_cast<float>(x);
  if (d == DType::f64) {
    static_cast<double*>(p)[i] = x;
  } else if (d == DType::f32) {
    static_cast<float*>(p)[i] = f;
  } else {
    cpu::kScalarTable.convert(&f, DType::f32, static_cast<uint16_t*>(p) + i, d, 1);
  }
}
inline double rounded(DType d, double x) {
  double buffer;
  store_value(d, &buffer, 0, x);
  return load_value(d, &buffer, 0);
}

// Values of any storage type.
struct Values {
  DType dtype;
  Guarded memory;
  Values(DType d, int64_t count) : dtype(d), memory(static_cast<size_t>(count) * size_of(d)) {}
  void* data() { return memory.data(); }
  int64_t size() const { return static_cast<int64_t>(memory.size() / size_of(dtype)); }
  void* at(int64_t i) { return static_cast<char*>(data()) + static_cast<size_t>(i) * size_of(dtype); }
  double get(int64_t i) { return load_value(dtype, data(), i); }
  void set(int64_t i, double x) { store_value(dtype, data(), i, x); }
  void fill_normal(Random& random, double scale = 1) {
    for (int64_t i = 0; i < size(); ++i) set(i, scale * random.normal());
  }
};

// (E, N, K) logits in one of several memory layouts.
struct Logits {
  int64_t E, N, K, stride_e, stride_n, stride_k, offset;
  Values values;
  enum Layout { dense, padded, class_first, kLayouts };
  Logits(DType d, int64_t E_, int64_t N_, int64_t K_, int layout)
      : E(E_),
        N(N_),
        K(K_),
        stride_e(layout == padded        ? N_ * (K_ + 3)
                 : layout == class_first ? 1
                                         : N_ * K_),
        stride_n(layout == padded        ? K_ + 3
                 : layout == class_first ? E_
                                         : K_),
        stride_k(layout == class_first ? E_ * N_ : 1),
        offset(layout == padded ? 1 : 0),
        values(d,
               E_ * N_ * K_ == 0 ? 0 : offset + (E_ - 1) * stride_e + (N_ - 1) * stride_n + (K_ - 1) * stride_k + 1) {}
  const void* data() { return static_cast<char*>(values.data()) + static_cast<size_t>(offset) * size_of(values.dtype); }
  int64_t at(int64_t e, int64_t n, int64_t k) const { return offset + e * stride_e + n * stride_n + k * stride_k; }
  double get(int64_t e, int64_t n, int64_t k) { return values.get(at(e, n, k)); }
  void set(int64_t e, int64_t n, int64_t k, double x) { values.set(at(e, n, k), x); }
  double row_get(int64_t row, int64_t k) { return get(row / N, row % N, k); }
};

// Whether to run the next case of this type: emulated, where every launch runs several times, all of float32 and a
// third of the others, evenly spread.
inline bool take(DType d) {
  static int next = 0;
  return !backend::kCuda || d == DType::f32 || ++next % 3 == 0;
}

inline std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> list;
#ifdef AEP_TEST_CUDA
  list.push_back(&backend::table());
  return list;
#endif
  for (const char* name : {"scalar", "avx2", "avx512", "neon"}) {
    if (const KernelTable* table = cpu::find_table(name)) list.push_back(table);
  }
  return list;
}

// product and sum rounded in the accumulation type of d, one after the other
inline double round_acc(DType d, double x) { return d == DType::f64 ? x : static_cast<double>(static_cast<float>(x)); }
inline double multiply_add(DType d, double sum, double w, double x) {
  const double product = round_acc(d, w * x);  // a product of two floats is exact in double, a sum rounds the same way
  return round_acc(d, sum + product);
}

}  // namespace testing
