// The gated CUDA graph: one launch for a network whose later stages stand in nested IF nodes. No torch types.
//
//   stage 0 -> exit 0 -> IF (rows under way) { stage 1 -> exit 1 -> IF (rows under way) { stage 2 -> ... } }
//
// A stage is a captured graph and becomes one child graph node: the bodies of conditional nodes may hold kernel, memcpy,
// memset, empty, child graph and conditional nodes, and a child graph may hold all of these but the last. An exit is one
// kernel, which also sets the condition of the IF node behind it. Needs CUDA 12.4.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <string>

#include "../params.h"

namespace aep::kernels::cuda {

// One exit for N rows that keep their places: the step of GateParams for every row under way (same formulas, same
// reductions as gate.cu), but nothing is moved: who leaves is answered, who stays is updated in place. Numbers are read
// when the kernel runs, so that they may be changed between replays; out of range (a temperature of 0, say) they are not
// checked.
//   exit[n] < 0: under way. Exit 0 starts all rows; the last exit answers all that are left.
struct GatedExitParams {
  const void* exit_logits;     // dtype (N, K), class stride 1
  const double* thresholds;    // (E - 1)
  const double* temperatures;  // (E)
  const bool* enabled;         // (E - 1)
  const void* weights;         // weights_dtype (E)
  void* running;               // acc (N, K)
  int64_t* state;              // (N, S); may be null when S == 0
  int64_t* exit;               // (N): the exit taken
  void* logits;                // dtype (N, K): the answers
  float* confidence;           // (N)
  uint32_t* tally;             // (E, 2): 0 before and after every launch
  int64_t* remaining;          // (E): how many rows are under way after each exit
  DType dtype, weights_dtype;
  int64_t N, K, S;  // N >= 1
  int64_t logits_stride_n;
  int64_t e, E;
  GatePolicy policy;
  GateOn on;
  bool may_leave;  // false: as if enabled[e] were false
  bool sets;       // whether `condition` is set to remaining[e] > 0
  unsigned long long condition;
};

cudaError_t launch_gated_exit(const GatedExitParams& p, cudaStream_t stream);

// The kernel itself, for a graph node.
struct GatedExitKernel {
  const void* function;  // void (*)(GatedExitParams)
  unsigned blocks, threads;
};
GatedExitKernel gated_exit_kernel(const GatedExitParams& p);

// Builds the graph from the outside in, each part behind the one before. After an error: reset.
class GatedGraph {
 public:
  GatedGraph() = default;
  GatedGraph(const GatedGraph&) = delete;
  GatedGraph& operator=(const GatedGraph&) = delete;
  ~GatedGraph() { reset(); }

  // A copy of `captured`, which must hold nothing that refused_node() names.
  cudaError_t add_stage(cudaGraph_t captured);
  // `opens`: what is added from now on runs only where rows are under way after this exit.
  cudaError_t add_exit(GatedExitParams p, bool opens);
  cudaError_t instantiate();
  cudaError_t launch(cudaStream_t stream) const;
  void reset();

 private:
  cudaError_t begin();
  cudaGraph_t root_ = nullptr, body_ = nullptr;  // body_: where the next node goes; belongs to root_
  cudaGraphNode_t last_ = nullptr;               // the last node of body_, or null
  cudaGraphExec_t executable_ = nullptr;
};

// The name of the first node of `captured`, child graphs included, that the body of an IF node cannot hold; empty if
// there is none.
cudaError_t refused_node(cudaGraph_t captured, std::string* name);

}  // namespace aep::kernels::cuda
