// Composition of the gated graph with the runtime's graph functions.
#include "graph.h"

#include <vector>

#if CUDART_VERSION < 12040
#error "the gated graph needs CUDA 12.4 or later: conditional nodes"
#endif

namespace aep::kernels::cuda {
namespace {

#define AEP_TRY(call)                                  \
  do {                                                 \
    const cudaError_t aep_error = (call);              \
    if (aep_error != cudaSuccess) return aep_error;    \
  } while (false)

cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* behind,
                     cudaGraphNodeParams* params) {
  const size_t count = *behind ? 1 : 0;
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, behind, nullptr, count, params);
#else
  return cudaGraphAddNode(node, graph, behind, count, params);
#endif
}

// Null: the body of an IF node can hold this copy, as far as the runtime tells.
const char* refused_copy(cudaGraphNode_t node) {
  cudaMemcpy3DParms copy{};
  cudaError_t error = cudaGraphMemcpyNodeGetParams(node, &copy);
  if (error == cudaSuccess && (copy.srcArray || copy.dstArray)) return "memcpy of a CUDA array";
  for (const void* end : {copy.srcPtr.ptr, copy.dstPtr.ptr}) {
    cudaPointerAttributes attributes{};
    if (error == cudaSuccess) error = cudaPointerGetAttributes(&attributes, end);
    if (error == cudaSuccess && attributes.type == cudaMemoryTypeUnregistered) return "memcpy of pageable host memory";
  }
  if (error != cudaSuccess) (void)cudaGetLastError();  // no reason to refuse: instantiation will judge
  return nullptr;
}

// Null: the body of an IF node can hold it. Child graphs and copies are looked into by the caller.
const char* refusal(cudaGraphNodeType type) {
  switch (type) {
    case cudaGraphNodeTypeKernel:
    case cudaGraphNodeTypeMemcpy:
    case cudaGraphNodeTypeMemset:
    case cudaGraphNodeTypeEmpty:
    case cudaGraphNodeTypeGraph:
      return nullptr;
    case cudaGraphNodeTypeHost:
      return "host function";
    case cudaGraphNodeTypeWaitEvent:
      return "event wait";
    case cudaGraphNodeTypeEventRecord:
      return "event record";
    case cudaGraphNodeTypeExtSemaphoreSignal:
    case cudaGraphNodeTypeExtSemaphoreWait:
      return "external semaphore";
    case cudaGraphNodeTypeMemAlloc:
      return "memory allocation";
    case cudaGraphNodeTypeMemFree:
      return "memory free";
    case cudaGraphNodeTypeConditional:
      return "conditional";
    default:
      return "unknown";
  }
}

}  // namespace

cudaError_t refused_node(cudaGraph_t captured, std::string* name) {
  size_t count = 0;
  AEP_TRY(cudaGraphGetNodes(captured, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  if (count) AEP_TRY(cudaGraphGetNodes(captured, nodes.data(), &count));
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    AEP_TRY(cudaGraphNodeGetType(node, &type));
    const char* why = refusal(type);
    if (type == cudaGraphNodeTypeMemcpy) why = refused_copy(node);
    if (why) {
      *name = why;
      return cudaSuccess;
    }
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t inner;
      AEP_TRY(cudaGraphChildGraphNodeGetGraph(node, &inner));
      AEP_TRY(refused_node(inner, name));
      if (!name->empty()) return cudaSuccess;
    }
  }
  return cudaSuccess;
}

cudaError_t GatedGraph::begin() {
  if (root_) return cudaSuccess;
  AEP_TRY(cudaGraphCreate(&root_, 0));
  body_ = root_;
  return cudaSuccess;
}

cudaError_t GatedGraph::add_stage(cudaGraph_t captured) {
  AEP_TRY(begin());
  size_t count = 0;
  AEP_TRY(cudaGraphGetNodes(captured, nullptr, &count));
  if (!count) return cudaSuccess;  // a stage that does nothing
  cudaGraphNode_t node;
  AEP_TRY(cudaGraphAddChildGraphNode(&node, body_, &last_, last_ ? 1 : 0, captured));
  last_ = node;
  return cudaSuccess;
}

cudaError_t GatedGraph::add_exit(GatedExitParams p, bool opens) {
  AEP_TRY(begin());
  cudaGraphConditionalHandle condition{};
  if (opens) {
    // For the graph that holds the IF node. Without a default value: the exit in front always sets it.
    AEP_TRY(cudaGraphConditionalHandleCreate(&condition, body_, 0, 0));
  }
  p.sets = opens;
  p.condition = condition;
  const GatedExitKernel kernel = gated_exit_kernel(p);
  void* arguments[] = {&p};
  cudaKernelNodeParams launch{};
  launch.func = reinterpret_cast<void*>(kernel.function);
  launch.gridDim = dim3(kernel.blocks);
  launch.blockDim = dim3(kernel.threads);
  launch.kernelParams = arguments;  // copied by the call
  cudaGraphNode_t node;
  AEP_TRY(cudaGraphAddKernelNode(&node, body_, &last_, last_ ? 1 : 0, &launch));
  last_ = node;
  if (!opens) return cudaSuccess;
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = condition;
  params.conditional.type = cudaGraphCondTypeIf;
  params.conditional.size = 1;
  AEP_TRY(add_node(&node, body_, &last_, &params));
  body_ = params.conditional.phGraph_out[0];
  last_ = nullptr;
  return cudaSuccess;
}

cudaError_t GatedGraph::instantiate() {
  AEP_TRY(begin());
  return cudaGraphInstantiate(&executable_, root_, 0);
}

cudaError_t GatedGraph::launch(cudaStream_t stream) const {
  return executable_ ? cudaGraphLaunch(executable_, stream) : cudaErrorInvalidValue;
}

void GatedGraph::reset() {
  if (executable_) cudaGraphExecDestroy(executable_);
  if (root_) cudaGraphDestroy(root_);
  root_ = body_ = nullptr;
  last_ = nullptr;
  executable_ = nullptr;
}

}  // namespace aep::kernels::cuda
