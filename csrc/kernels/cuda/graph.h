// The gated CUDA graph: one launch for a network whose later stages stand in nested IF nodes. No torch types.
//
//   stage 0 -> exit 0 -> IF (rows under way) { stage 1 -> exit 1 -> IF (rows under way) { stage 2 -> ... } }
//
// A stage is a captured graph and becomes one child graph node, a copy: the bodies of conditional nodes may hold
// kernel, memcpy, memset, empty, child graph and conditional nodes, and a child graph all of these but the last. Copies
// must be between device memory or host memory that the device can reach. An exit is one kernel, which also sets the
// condition of the IF node behind it; so no body is empty, on which drivers before CUDA 12.8 hang. Needs CUDA 12.4.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "gated_exit.h"

namespace aep::kernels::cuda {

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
