// An exit of the gated graph (graph.h). No torch types, and nothing of the runtime's graphs.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "../params.h"

namespace aep::kernels::cuda {

// One exit for N rows that keep their places: the step of GateParams for every row under way (the same formulas; sums
// in an order of their own), but nothing is moved: who leaves is answered, who stays is updated in place. Numbers are
// read when the kernel runs, so that they may be changed between replays; out of range (a temperature of 0, say) they
// are not checked.
//   exit[n] < 0: under way. Exit 0 starts all rows; the last exit answers all that are left. `running` keeps the plain
//   sums; an answer is the sum over the sum of the weights so far.
struct GatedExitParams {
  const void* exit_logits;     // dtype (N, K), class stride 1
  const double* thresholds;    // (E - 1)
  const double* temperatures;  // (E)
  const bool* enabled;         // (E - 1)
  const void* weights;         // weights_dtype (E)
  void* running;               // acc (N, K)
  int64_t* state;              // (N, S); may be null when S == 0
  int64_t* exit;               // (N): the exit taken
  void* logits;                // dtype (N, K): the answers, running / sum of weights
  float* confidence;           // (N)
  uint32_t* tally;             // (E, 2): 0 before and after every launch
  int64_t* remaining;          // (E): how many rows are under way after each exit
  DType dtype, weights_dtype;
  int64_t N, K, S;  // N >= 1
  int64_t logits_stride_n;
  int64_t e, E;
  GateCriterion criterion;
  CriterionOn criterion_on;
  bool may_leave;  // false: as if enabled[e] were false
  bool sets;       // whether `condition` is set to remaining[e] > 0
  unsigned long long condition;
};

cudaError_t launch_gated_exit(const GatedExitParams& p, cudaStream_t stream);

// The kernel itself, for a graph node.
struct GatedExitKernel {
  void (*function)(GatedExitParams);
  unsigned blocks, threads;
};
GatedExitKernel gated_exit_kernel(const GatedExitParams& p);

}  // namespace aep::kernels::cuda
