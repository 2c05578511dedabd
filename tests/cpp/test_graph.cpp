// How the gated graph is composed, on a runtime that records graphs and walks them in the place of a device: nesting,
// order, who sets which condition, what is refused, and that nothing is left behind.
#include <stdio.h>

#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/graph.h"

using aep::kernels::cuda::GatedExitKernel;
using aep::kernels::cuda::GatedExitParams;
using aep::kernels::cuda::GatedGraph;
using aep::kernels::cuda::refused_node;

struct MockNode {
  cudaGraphNodeType type;
  std::vector<MockNode*> behind;
  MockGraph* inner = nullptr;  // a child graph, or the body of an IF node
  GatedExitParams exit{};
  unsigned long long handle = 0;
};
struct MockGraph {
  std::string name;
  std::vector<std::unique_ptr<MockNode>> nodes;
  std::vector<unsigned long long> handles;
  std::vector<std::unique_ptr<MockGraph>> bodies;
};
struct MockExec {
  MockGraph* graph;
};

namespace {

int graphs_alive = 0, executables_alive = 0, calls_until_failure = -1, checks = 0, failures = 0;
unsigned long long last_handle = 0;
std::string walked;             // what a launch ran
int64_t leaves_at = 1000;       // the exit where all rows leave
unsigned conditions[100] = {};  // by handle

#define CHECK(condition)                                                                  \
  do {                                                                                    \
    ++checks;                                                                             \
    if (!(condition)) ++failures, fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
  } while (0)

bool fails() { return calls_until_failure >= 0 && calls_until_failure-- == 0; }

MockNode* add(cudaGraph_t graph, cudaGraphNodeType type, const cudaGraphNode_t* behind, size_t count) {
  graph->nodes.push_back(std::make_unique<MockNode>());
  MockNode* node = graph->nodes.back().get();
  node->type = type;
  node->behind.assign(behind, behind + count);
  return node;
}

// Nodes must form one chain: each behind the one added before.
void walk(const MockGraph& graph) {
  const MockNode* before = nullptr;
  for (const auto& node : graph.nodes) {
    CHECK(before ? node->behind.size() == 1 && node->behind[0] == before : node->behind.empty());
    before = node.get();
    if (node->type == cudaGraphNodeTypeGraph) walked += node->inner->name;
    if (node->type == cudaGraphNodeTypeKernel) {
      walked += "(" + std::to_string(node->exit.e) + ")";
      if (node->exit.sets) conditions[node->exit.condition] = node->exit.e < leaves_at;
    }
    if (node->type == cudaGraphNodeTypeConditional) {
      bool own = false;
      for (auto handle : graph.handles) own |= handle == node->handle;
      CHECK(own);  // made for the graph that the node stands in
      if (conditions[node->handle]) walk(*node->inner);
    }
  }
}

}  // namespace

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  if (fails()) return cudaErrorInvalidValue;
  *graph = new MockGraph;
  ++graphs_alive;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  --graphs_alive;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (fails()) return cudaErrorInvalidValue;
  if (nodes) {
    for (size_t i = 0; i < *count; ++i) nodes[i] = graph->nodes[i].get();
  }
  *count = graph->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  *type = node->type;
  return fails() ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* graph) {
  *graph = node->inner;
  return fails() ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* behind,
                                       size_t count, cudaGraph_t child) {
  if (fails()) return cudaErrorInvalidValue;
  *node = add(graph, cudaGraphNodeTypeGraph, behind, count);
  (*node)->inner = child;
  return cudaSuccess;
}
cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* behind,
                                   size_t count, const cudaKernelNodeParams* params) {
  if (fails()) return cudaErrorInvalidValue;
  *node = add(graph, cudaGraphNodeTypeKernel, behind, count);
  (*node)->exit = *static_cast<GatedExitParams*>(params->kernelParams[0]);
  CHECK(params->func && params->gridDim.x == 3 && params->blockDim.x == 64 && params->sharedMemBytes == 0);
  return cudaSuccess;
}
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* behind,
                             const cudaGraphEdgeData*, size_t count, cudaGraphNodeParams* params) {
  if (fails()) return cudaErrorInvalidValue;
  CHECK(params->type == cudaGraphNodeTypeConditional && params->conditional.size == 1);
  *node = add(graph, params->type, behind, count);
  graph->bodies.push_back(std::make_unique<MockGraph>());
  (*node)->inner = graph->bodies.back().get();
  (*node)->handle = params->conditional.handle;
  static cudaGraph_t out;
  out = (*node)->inner;
  params->conditional.phGraph_out = &out;
  return cudaSuccess;
}
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph, unsigned value,
                                             unsigned flags) {
  if (fails()) return cudaErrorInvalidValue;
  CHECK(value == 0 && flags == cudaGraphCondAssignDefault);
  *handle = ++last_handle % 100;
  graph->handles.push_back(*handle);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (fails()) return cudaErrorInvalidValue;
  *executable = new MockExec{graph};
  ++executables_alive;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  --executables_alive;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  walked.clear();
  for (unsigned& condition : conditions) condition = 0;
  walk(*executable->graph);
  return cudaSuccess;
}

namespace aep::kernels::cuda {
void some_kernel(GatedExitParams) {}
GatedExitKernel gated_exit_kernel(const GatedExitParams&) { return {some_kernel, 3, 64}; }
}  // namespace aep::kernels::cuda

namespace {

MockGraph stage(const char* name, std::vector<cudaGraphNodeType> types) {
  MockGraph graph;
  graph.name = name;
  for (auto type : types) add(&graph, type, nullptr, 0);
  return graph;
}

// `opens`: which exits hold the rest in an IF node. Returns the first error.
cudaError_t compose(GatedGraph& graph, std::vector<MockGraph>& stages, const std::vector<bool>& opens) {
  for (size_t e = 0; e < stages.size(); ++e) {
    GatedExitParams p{};
    p.e = static_cast<int64_t>(e), p.E = static_cast<int64_t>(stages.size());
    cudaError_t error = graph.add_stage(&stages[e]);
    if (error == cudaSuccess) error = graph.add_exit(p, opens[e]);
    if (error != cudaSuccess) return error;
  }
  return graph.instantiate();
}

std::string launched(const GatedGraph& graph, int64_t all_leave_at) {
  leaves_at = all_leave_at;
  CHECK(graph.launch(nullptr) == cudaSuccess);
  return walked;
}

void nesting(std::vector<MockGraph>& stages) {
  GatedGraph graph;
  CHECK(graph.launch(nullptr) == cudaErrorInvalidValue);  // not instantiated
  CHECK(compose(graph, stages, {true, true, true, false}) == cudaSuccess);
  CHECK(launched(graph, 0) == "a(0)");
  CHECK(launched(graph, 1) == "a(0)b(1)");
  CHECK(launched(graph, 2) == "a(0)b(1)c(2)");
  CHECK(launched(graph, 9) == "a(0)b(1)c(2)d(3)");
  GatedGraph some;
  CHECK(compose(some, stages, {false, true, false, false}) == cudaSuccess);
  CHECK(launched(some, 0) == "a(0)b(1)");  // exit 0 lets nobody go: its rest stands beside it
  CHECK(launched(some, 9) == "a(0)b(1)c(2)d(3)");
  CHECK(graphs_alive == 2 && executables_alive == 2);
  some.reset();
  CHECK(graphs_alive == 1 && executables_alive == 1);
  CHECK(compose(some, stages, {true, false, false, false}) == cudaSuccess);
  CHECK(launched(some, 0) == "a(0)" && launched(some, 9) == "a(0)b(1)c(2)d(3)");
}

void every_call_may_fail(std::vector<MockGraph>& stages) {
  int failed = 0;
  for (int call = 0;; ++call) {
    GatedGraph graph;
    calls_until_failure = call;
    const bool done = compose(graph, stages, {true, true, true, false}) == cudaSuccess;
    calls_until_failure = -1;
    if (done) break;
    ++failed;
  }
  CHECK(failed == 1 + 4 * 3 + 3 * 2 + 1);  // create, per exit count, child and kernel, per IF handle and node, instantiate
  CHECK(graphs_alive == 0 && executables_alive == 0);
}

void refusals() {
  std::string name;
  MockGraph fine = stage("", {cudaGraphNodeTypeKernel, cudaGraphNodeTypeMemset, cudaGraphNodeTypeMemcpy});
  CHECK(refused_node(&fine, &name) == cudaSuccess && name.empty());
  MockGraph empty = stage("", {});
  CHECK(refused_node(&empty, &name) == cudaSuccess && name.empty());
  const std::pair<cudaGraphNodeType, const char*> kinds[] = {
      {cudaGraphNodeTypeHost, "host function"},      {cudaGraphNodeTypeEventRecord, "event record"},
      {cudaGraphNodeTypeWaitEvent, "event wait"},    {cudaGraphNodeTypeMemAlloc, "memory allocation"},
      {cudaGraphNodeTypeMemFree, "memory free"},     {cudaGraphNodeTypeExtSemaphoreWait, "external semaphore"},
      {cudaGraphNodeTypeConditional, "conditional"}, {static_cast<cudaGraphNodeType>(77), "unknown"}};
  for (const auto& [type, word] : kinds) {
    MockGraph bad = stage("", {cudaGraphNodeTypeKernel, type});
    name.clear();
    CHECK(refused_node(&bad, &name) == cudaSuccess && name == word);
    MockGraph around = stage("", {cudaGraphNodeTypeGraph});
    around.nodes[0]->inner = &bad;
    name.clear();
    CHECK(refused_node(&around, &name) == cudaSuccess && name == word);  // in a child graph too
  }
}

}  // namespace

int main() {
  std::vector<MockGraph> stages;
  for (const char* name : {"a", "b", "c", "d"}) stages.push_back(stage(name, {cudaGraphNodeTypeKernel}));
  nesting(stages);
  CHECK(graphs_alive == 0 && executables_alive == 0);
  every_call_may_fail(stages);
  refusals();
  stages[1] = stage("b", {});  // a stage that does nothing has no node
  GatedGraph graph;
  CHECK(compose(graph, stages, {true, true, true, false}) == cudaSuccess && launched(graph, 9) == "a(0)(1)c(2)d(3)");
  printf("graph: %d checks, %d failures\n", checks, failures);
  return failures != 0;
}
