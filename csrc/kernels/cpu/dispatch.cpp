// Chooses the instruction set once, and forwards the calls of api.h to its table.
#include <stdlib.h>
#include <string.h>

#include <string>

#include "api.h"
#include "kernel_table.h"

namespace aep::kernels::cpu {
namespace {

struct Isa {
  const char* name;
  const KernelTable* table;  // null: not built
  bool supported;
};

// __builtin_cpu_supports looks at CPUID and, for the vector registers, at what the operating system saves (XGETBV).
bool cpu_has_avx2() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Advanced SIMD is part of the baseline that everything here is compiled for.
bool cpu_has_neon() {
#if defined(__aarch64__) || defined(_M_ARM64)
  return true;
#else
  return false;
#endif
}

const KernelTable* avx2_table() {
#ifdef AEP_HAVE_AVX2
  return &kAvx2Table;
#else
  return nullptr;
#endif
}

const KernelTable* avx512_table() {
#ifdef AEP_HAVE_AVX512
  return &kAvx512Table;
#else
  return nullptr;
#endif
}

const KernelTable* neon_table() {
#ifdef AEP_HAVE_NEON
  return &kNeonTable;
#else
  return nullptr;
#endif
}

struct Choice {
  Isa known[4] = {{"scalar", &kScalarTable, true},
                  {"avx2", avx2_table(), cpu_has_avx2()},
                  {"avx512", avx512_table(), cpu_has_avx512()},
                  {"neon", neon_table(), cpu_has_neon()}};
  const KernelTable* active = &kScalarTable;
  std::string notice, built, supported;

  Choice() {
    for (const Isa& isa : known) {
      if (isa.table) append(built, isa.name);
      if (isa.supported) append(supported, isa.name);
      if (isa.table && isa.supported) active = isa.table;
    }
    const char* wish = getenv("AEP_ISA");
    if (!wish || !*wish) return;
    if (const KernelTable* table = find(wish)) {
      active = table;
      return;
    }
    notice = std::string("AEP_ISA=") + wish + " is not available (built: " + built +
             "; supported by this CPU: " + supported + "): using " + active->name;
  }

  static void append(std::string& list, const char* name) {
    if (!list.empty()) list += ',';
    list += name;
  }

  const KernelTable* find(const char* name) const {
    for (const Isa& isa : known) {
      if (isa.table && isa.supported && strcmp(isa.name, name) == 0) return isa.table;
    }
    return nullptr;
  }
};

const Choice& choice() {
  static const Choice once;
  return once;
}

}  // namespace

const KernelTable& active_table() { return *choice().active; }
const KernelTable* find_table(const char* name) { return choice().find(name); }

const char* isa_in_use() { return active_table().name; }
const char* isa_notice() { return choice().notice.c_str(); }
const char* isa_built() { return choice().built.c_str(); }
const char* isa_supported() { return choice().supported.c_str(); }

void global_avg_pool(const GlobalAvgPoolParams& p, int64_t begin, int64_t end) {
  active_table().global_avg_pool(p, begin, end);
}
void small_linear(const SmallLinearParams& p, int64_t begin, int64_t end) {
  active_table().small_linear(p, begin, end);
}
void ensemble(const EnsembleParams& p, int64_t begin, int64_t end) { active_table().ensemble(p, begin, end); }
void ensemble_stats(const EnsembleStatsParams& p, int64_t begin, int64_t end) {
  active_table().ensemble_stats(p, begin, end);
}
void ensemble_backward_logits(const EnsembleBackwardParams& p, int64_t begin, int64_t end) {
  active_table().ensemble_backward_logits(p, begin, end);
}
void ensemble_backward_weights(const EnsembleBackwardParams& p, int64_t begin, int64_t end) {
  active_table().ensemble_backward_weights(p, begin, end);
}
void multi_exit_loss(const MultiExitLossParams& p, int64_t begin, int64_t end) {
  active_table().multi_exit_loss(p, begin, end);
}
void multi_exit_loss_grad(const MultiExitLossGradParams& p, int64_t begin, int64_t end) {
  active_table().multi_exit_loss_grad(p, begin, end);
}
void loss_grad_scale(const LossGradScaleParams& p, int64_t begin, int64_t end) {
  active_table().loss_grad_scale(p, begin, end);
}
void subset_correct(const SubsetCorrectParams& p, int64_t begin, int64_t end, int64_t* counts) {
  active_table().subset_correct(p, begin, end, counts);
}
void gate_judge(const GateParams& p, int64_t begin, int64_t end) { active_table().gate_judge(p, begin, end); }
void gate_scatter(const GateParams& p, int64_t begin, int64_t end) { active_table().gate_scatter(p, begin, end); }
void gate_one(const GateOneParams& p) { active_table().gate_one(p); }

}  // namespace aep::kernels::cpu
