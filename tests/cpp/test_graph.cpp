// How the gated graph is composed, on a runtime that records graphs and walks them in the place of a device: nesting,
// order, who sets which condition, what is refused, and that nothing is left behind. It refuses what CUDA's runtime
// refuses by its documentation.
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
  MockGraph* in;
  std::vector<MockNode*> behind;
  MockGraph* inner = nullptr;  // a child graph, or the body of an IF node
  GatedExitParams exit{};
  unsigned long long handle = 0;
  cudaMemcpy3DParms copy{};
};
struct MockGraph {
  MockGraph() = default;
  MockGraph(MockGraph&&) = default;
  MockGraph& operator=(MockGraph&&) = default;
  ~MockGraph();  // its handles go with it
  std::string name;
  MockGraph* around = nullptr;  // the graph whose IF node this is the body of
  std::vector<std::unique_ptr<MockNode>> nodes;
  std::vector<std::unique_ptr<MockGraph>> owned;  // bodies and copies of child graphs
  bool instantiated = false;
};
struct MockExec {
  MockGraph* graph;
};

namespace {

struct Handle {
  const MockGraph* graph = nullptr;
  bool used = false;  // by a node
  int value = -1;     // -1: undefined
};

int graphs_alive = 0, executables_alive = 0, calls_until_failure = -1, checks = 0, failures = 0, errors_cleared = 0;
std::vector<Handle> handles;
std::string walked;        // what a launch ran
int64_t leaves_at = 1000;  // the exit where all rows leave

#define CHECK(condition)                                                                  \
  do {                                                                                    \
    ++checks;                                                                             \
    if (!(condition)) ++failures, fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
  } while (0)

bool fails() { return calls_until_failure >= 0 && calls_until_failure-- == 0; }

}  // namespace

MockGraph::~MockGraph() {
  for (Handle& handle : handles) {
    if (handle.graph == this) handle.graph = nullptr;
  }
}

namespace {

// The runtime's rules, as documented.

// A graph with conditional or memory nodes cannot be a child graph.
bool may_be_child(const MockGraph& graph) {
  for (const auto& node : graph.nodes) {
    if (node->type == cudaGraphNodeTypeConditional || node->type == cudaGraphNodeTypeMemAlloc ||
        node->type == cudaGraphNodeTypeMemFree || (node->inner && !may_be_child(*node->inner))) {
      return false;
    }
  }
  return true;
}

// What bodies may hold, child graphs included; none may be empty (drivers before 12.8 hang).
bool sound(const MockGraph& graph, bool in_body) {
  if (in_body && graph.nodes.empty()) return false;
  for (const auto& node : graph.nodes) {
    const auto type = node->type;
    const bool fine = type == cudaGraphNodeTypeKernel || type == cudaGraphNodeTypeMemcpy ||
                      type == cudaGraphNodeTypeMemset || type == cudaGraphNodeTypeEmpty ||
                      type == cudaGraphNodeTypeGraph || type == cudaGraphNodeTypeConditional;
    if (in_body && !fine) return false;
    if (node->inner && !sound(*node->inner, in_body || type == cudaGraphNodeTypeConditional)) return false;
  }
  return true;
}

// A handle belongs to one node, in its graph or in a graph within that.
bool within(const MockGraph* graph, const MockGraph* outer) {
  return graph && (graph == outer || within(graph->around, outer));
}
bool takes(unsigned long long handle, const MockGraph* graph) {
  if (handle == 0 || handle > handles.size()) return false;
  Handle& h = handles[handle - 1];
  if (h.used || !within(graph, h.graph)) return false;
  return h.used = true;
}

MockNode* add(cudaGraph_t graph, cudaGraphNodeType type, const cudaGraphNode_t* behind, size_t count) {
  for (size_t i = 0; i < count; ++i) CHECK(behind[i]->in == graph);
  graph->nodes.push_back(std::make_unique<MockNode>());
  MockNode* node = graph->nodes.back().get();
  node->type = type;
  node->in = graph;
  node->behind.assign(behind, behind + count);
  return node;
}

std::unique_ptr<MockGraph> copied(const MockGraph& graph) {
  auto copy = std::make_unique<MockGraph>();
  copy->name = graph.name;
  for (const auto& node : graph.nodes) {
    MockNode* own = add(copy.get(), node->type, nullptr, 0);
    if (!node->inner) continue;
    copy->owned.push_back(copied(*node->inner));
    own->inner = copy->owned.back().get();
  }
  return copy;
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
      if (node->exit.sets) handles[node->exit.condition - 1].value = node->exit.e < leaves_at;
    }
    if (node->type == cudaGraphNodeTypeConditional) {
      const int value = handles[node->handle - 1].value;
      CHECK(value >= 0);  // set in this launch, before the node looks
      if (value > 0) walk(*node->inner);
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
cudaError_t cudaGetLastError() {
  ++errors_cleared;
  return cudaSuccess;
}
// In place of addresses: the kinds of memory themselves; 3 stands for none at all.
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* at) {
  const auto kind = reinterpret_cast<uintptr_t>(at);
  if (kind > 2) return cudaErrorInvalidValue;
  attributes->type = static_cast<cudaMemoryType>(kind);
  return cudaSuccess;
}
cudaError_t cudaGraphMemcpyNodeGetParams(cudaGraphNode_t node, cudaMemcpy3DParms* params) {
  *params = node->copy;
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
  if (fails() || !may_be_child(*child)) return cudaErrorInvalidValue;
  *node = add(graph, cudaGraphNodeTypeGraph, behind, count);
  graph->owned.push_back(copied(*child));
  (*node)->inner = graph->owned.back().get();
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
  if (fails() || !takes(params->conditional.handle, graph)) return cudaErrorInvalidValue;
  CHECK(params->type == cudaGraphNodeTypeConditional && params->conditional.size == 1);
  *node = add(graph, params->type, behind, count);
  graph->owned.push_back(std::make_unique<MockGraph>());
  (*node)->inner = graph->owned.back().get();
  (*node)->inner->around = graph;
  (*node)->handle = params->conditional.handle;
  static cudaGraph_t out;
  out = (*node)->inner;
  params->conditional.phGraph_out = &out;
  return cudaSuccess;
}
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph, unsigned value,
                                             unsigned flags) {
  if (fails()) return cudaErrorInvalidValue;
  CHECK(value == 0 && flags == 0);
  handles.push_back({graph});
  *handle = handles.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (fails() || graph->instantiated || !sound(*graph, false)) return cudaErrorInvalidValue;
  for (const Handle& handle : handles) {
    if (within(handle.graph, graph) && !handle.used) return cudaErrorInvalidValue;
  }
  graph->instantiated = true;
  *executable = new MockExec{graph};
  ++executables_alive;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  executable->graph->instantiated = false;
  delete executable;
  --executables_alive;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  walked.clear();
  for (Handle& handle : handles) handle.value = -1;
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
  {
    std::vector<MockGraph> captured;  // copied: they may go
    for (const char* name : {"a", "b", "c", "d"}) captured.push_back(stage(name, {cudaGraphNodeTypeKernel}));
    CHECK(compose(graph, captured, {true, true, true, false}) == cudaSuccess);
  }
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
  // create; per exit count, child and kernel; per IF handle and node; instantiate
  CHECK(failed == 1 + 4 * 3 + 3 * 2 + 1);
  CHECK(graphs_alive == 0 && executables_alive == 0);
}

// What the runtime would refuse, and add_stage or instantiate then report.
void what_the_runtime_refuses(std::vector<MockGraph>& stages) {
  for (auto type : {cudaGraphNodeTypeConditional, cudaGraphNodeTypeMemAlloc}) {
    MockGraph bad = stage("", {cudaGraphNodeTypeKernel, type});
    GatedGraph graph;
    CHECK(graph.add_stage(&bad) == cudaErrorInvalidValue);
  }
  for (auto type : {cudaGraphNodeTypeHost, cudaGraphNodeTypeEventRecord, cudaGraphNodeTypeWaitEvent}) {
    std::vector<MockGraph> with;
    for (int e = 0; e < 2; ++e) with.push_back(stage("", {e ? type : cudaGraphNodeTypeKernel}));
    GatedGraph graph, beside;
    CHECK(compose(graph, with, {true, false}) == cudaErrorInvalidValue);
    CHECK(compose(beside, with, {false, false}) == cudaSuccess);  // in no body
  }
  GatedGraph twice;
  CHECK(compose(twice, stages, {true, true, true, false}) == cudaSuccess);
  CHECK(twice.instantiate() == cudaErrorInvalidValue && launched(twice, 1) == "a(0)b(1)");
}

void copies() {
  const auto at = [](int kind) { return cudaPitchedPtr{reinterpret_cast<void*>(static_cast<uintptr_t>(kind))}; };
  const auto array = reinterpret_cast<cudaArray_t>(uintptr_t{16});
  const std::pair<cudaMemcpy3DParms, const char*> kinds[] = {
      {{nullptr, at(2), nullptr, at(2)}, ""},
      {{nullptr, at(1), nullptr, at(2)}, ""},
      {{nullptr, at(0), nullptr, at(2)}, "memcpy of pageable host memory"},
      {{nullptr, at(2), nullptr, at(0)}, "memcpy of pageable host memory"},
      {{array, at(0), nullptr, at(2)}, "memcpy of a CUDA array"},
      {{nullptr, at(2), array, at(0)}, "memcpy of a CUDA array"},
      {{nullptr, at(3), nullptr, at(2)}, ""},  // the runtime does not tell
  };
  for (const auto& [copy, word] : kinds) {
    MockGraph graph = stage("", {cudaGraphNodeTypeKernel, cudaGraphNodeTypeMemcpy});
    graph.nodes[1]->copy = copy;
    std::string name;
    CHECK(refused_node(&graph, &name) == cudaSuccess && name == word);
  }
  CHECK(errors_cleared == 1);
}

void refusals() {
  std::string name;
  MockGraph fine = stage("", {cudaGraphNodeTypeKernel, cudaGraphNodeTypeMemset, cudaGraphNodeTypeEmpty});
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
  what_the_runtime_refuses(stages);
  CHECK(graphs_alive == 0 && executables_alive == 0);
  refusals();
  copies();
  stages[1] = stage("b", {});  // a stage that does nothing has no node
  GatedGraph graph;
  CHECK(compose(graph, stages, {true, true, true, false}) == cudaSuccess && launched(graph, 9) == "a(0)(1)c(2)d(3)");
  printf("graph: %d checks, %d failures\n", checks, failures);
  return failures != 0;
}
