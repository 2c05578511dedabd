// What one instruction set's translation unit offers. Each unit defines one constant table; dispatch.cpp chooses among
// them.
//
// Rule of these files: nothing with vague linkage (inline functions, templates, standard containers) may be shared
// between units that are compiled with different instruction-set flags: the linker keeps ONE copy, perhaps one that
// this CPU cannot run. Hence plain structs, C library calls and anonymous namespaces only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../params.h"

namespace aep::kernels::cpu {

struct KernelTable {
  const char* name;
  void (*global_avg_pool)(const GlobalAvgPoolParams&, int64_t, int64_t);
  void (*small_linear)(const SmallLinearParams&, int64_t, int64_t);
  void (*ensemble)(const EnsembleParams&, int64_t, int64_t);
  void (*ensemble_stats)(const EnsembleStatsParams&, int64_t, int64_t);
  void (*ensemble_backward_logits)(const EnsembleBackwardParams&, int64_t, int64_t);
  void (*ensemble_backward_weights)(const EnsembleBackwardParams&, int64_t, int64_t);
  void (*multi_exit_loss)(const MultiExitLossParams&, int64_t, int64_t);
  void (*multi_exit_loss_grad)(const MultiExitLossGradParams&, int64_t, int64_t);
  void (*loss_grad_scale)(const LossGradScaleParams&, int64_t, int64_t);
  void (*subset_correct)(const SubsetCorrectParams&, int64_t, int64_t, int64_t*);
  void (*gate_judge)(const GateParams&, int64_t, int64_t);
  void (*gate_scatter)(const GateParams&, int64_t, int64_t);
  void (*gate_one)(const GateOneParams&);
  // For the tests: the vector exponential and the conversions to and from half precision.
  void (*exp_f32)(const float*, float*, int64_t);
  void (*exp_f64)(const double*, double*, int64_t);
  void (*convert)(const void*, DType, void*, DType, int64_t);  // f32 -> bf16/f16 and back
};

extern const KernelTable kScalarTable;
#ifdef AEP_HAVE_AVX2
extern const KernelTable kAvx2Table;
#endif
#ifdef AEP_HAVE_AVX512
extern const KernelTable kAvx512Table;
#endif
#ifdef AEP_HAVE_NEON
extern const KernelTable kNeonTable;
#endif

// One row's place in GateParams::scratch.
struct GateRow {
  int64_t answer;  // argmax of running'
  int64_t judged;  // argmax of the judged values; -1: not judged (NaN)
  int64_t place;   // row of the outputs, set by gate_partition
  float stats[3];
  int32_t leaves;
};

// The table that isa_in_use() names, and any table by name (null: not built, or not supported here). For dispatch and
// tests.
const KernelTable& active_table();
const KernelTable* find_table(const char* name);

// 64-byte aligned memory, at least one cache line; throws std::bad_alloc. Compiled once, for the baseline.
void* allocate_scratch(size_t bytes);
void free_scratch(void* memory);
[[noreturn]] void throw_bad_alloc();

}  // namespace aep::kernels::cpu
