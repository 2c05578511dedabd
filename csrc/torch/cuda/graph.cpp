// _C.GatedGraph: checks and keeps the tensors of aep_ext/inference/cuda_graph_driver.py, and composes their graph.
#include "graph.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../prepare.h"
#include "graph_stream.h"
#include "kernels/cuda/graph.h"

namespace aep {
namespace {

namespace py = pybind11;
namespace cuda = kernels::cuda;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // it is reported here: the next call of somebody else must not report it again
  throw std::runtime_error(std::string("aep::GatedGraph: ") + what + ": " + cudaGetErrorString(error));
}

[[noreturn]] void refuse(const std::string& rule) { throw py::value_error("aep::GatedGraph: " + rule); }

kernels::GateCriterion criterion_of(const std::string& name) {
  if (name == "confidence") return kernels::GateCriterion::confidence;
  if (name == "entropy") return kernels::GateCriterion::entropy;
  if (name == "margin") return kernels::GateCriterion::margin;
  if (name == "patience") return kernels::GateCriterion::patience;
  if (name == "vote") return kernels::GateCriterion::vote;
  refuse("criterion must be built in, got '" + name + "'");
}

class GatedGraph {
 public:
  GatedGraph(py::dict tensors, const std::string& criterion, const std::string& criterion_on) : device_(at::kCUDA) {
    auto& p = base_;
    const Tensor exit = take(tensors, "exit", at::kLong), running = take(tensors, "running");
    device_ = exit.device();
    if (running.dim() != 2 || exit.dim() != 1 || running.size(0) != exit.size(0) || exit.size(0) < 1) {
      refuse("running and exit must have shapes [N, K] and [N] with N >= 1");
    }
    p.N = running.size(0), p.K = running.size(1);
    const Tensor temperatures = take(tensors, "temperatures", at::kDouble);
    p.E = temperatures.numel();
    const Tensor logits = take(tensors, "logits");
    type_ = logits.scalar_type();
    const Tensor state = take(tensors, "state", at::kLong), weights = take(tensors, "weights");
    const Tensor confidence = take(tensors, "confidence", at::kFloat), tally = take(tensors, "tally", at::kInt);
    const Tensor remaining = take(tensors, "remaining", at::kLong);
    p.criterion = criterion_of(criterion);
    p.S = p.criterion == kernels::GateCriterion::patience ? 2 : p.criterion == kernels::GateCriterion::vote ? p.K : 0;
    expect("logits", logits, p.N * p.K);
    expect("state", state, p.N * p.S);
    expect("weights", weights, p.E);
    expect("confidence", confidence, p.N);
    expect("tally", tally, p.E * 2);
    expect("remaining", remaining, p.E);
    if (running.scalar_type() != accumulate_type(type_)) refuse("running must have the accumulation dtype of logits");
    p.temperatures = temperatures.const_data_ptr<double>();
    const Tensor thresholds = take(tensors, "thresholds", at::kDouble), enabled = take(tensors, "enabled", at::kBool);
    expect("thresholds", thresholds, p.E - 1);
    expect("enabled", enabled, p.E - 1);
    p.thresholds = thresholds.const_data_ptr<double>();
    p.enabled = enabled.const_data_ptr<bool>();
    p.weights = weights.const_data_ptr();
    p.weights_dtype = kernel_type(weights.scalar_type());
    p.running = running.mutable_data_ptr();
    p.state = p.S ? state.mutable_data_ptr<int64_t>() : nullptr;
    p.exit = exit.mutable_data_ptr<int64_t>();
    p.logits = logits.mutable_data_ptr();
    p.confidence = confidence.mutable_data_ptr<float>();
    p.tally = reinterpret_cast<uint32_t*>(tally.mutable_data_ptr<int32_t>());
    p.remaining = remaining.mutable_data_ptr<int64_t>();
    p.dtype = kernel_type(type_);
    p.criterion_on = criterion_on == "exit" ? kernels::CriterionOn::exit : kernels::CriterionOn::ensemble;
  }

  // Adds a captured stage (the address of a cudaGraph_t) and its exit behind what is there: kernels::cuda::GatedGraph.
  void add(int64_t captured, int64_t e, const Tensor& exit_logits, bool may_leave, bool opens) {
    const c10::cuda::CUDAGuard guard(device_);
    check(graph_.add_stage(reinterpret_cast<cudaGraph_t>(captured)), "a stage cannot be a child graph");
    check(graph_.add_exit(params(e, exit_logits, may_leave), opens), "an exit cannot be added");
  }

  void instantiate() {
    const c10::cuda::CUDAGuard guard(device_);
    check(graph_.instantiate(), "the graph cannot be instantiated");
  }

  // The whole graph, on the device's current stream.
  void launch() const {
    const c10::cuda::CUDAGuard guard(device_);
    check(graph_.launch(c10::cuda::getCurrentCUDAStream()), "the graph cannot be launched");
  }

  // One exit alone, on the device's current stream.
  void run_exit(int64_t e, const Tensor& exit_logits, bool may_leave) {
    const c10::cuda::CUDAGuard guard(device_);
    check(cuda::launch_gated_exit(params(e, exit_logits, may_leave), c10::cuda::getCurrentCUDAStream()),
          "an exit cannot be launched");
  }

 private:
  Tensor take(const py::dict& tensors, const char* name, std::optional<at::ScalarType> type = std::nullopt) {
    if (!tensors.contains(name)) refuse(std::string("tensors must hold '") + name + "'");
    const auto tensor = tensors[name].cast<Tensor>();
    if (!tensor.is_cuda() || (!keep_.empty() && tensor.device() != keep_.front().device())) {
      refuse(std::string(name) + " must be on the CUDA device of the others, got " + tensor.device().str());
    }
    if (!tensor.is_contiguous()) refuse(std::string(name) + " must be contiguous");
    if (type ? tensor.scalar_type() != *type : !at::isFloatingType(tensor.scalar_type())) {
      refuse(std::string(name) + " has a wrong dtype: " + at::toString(tensor.scalar_type()));
    }
    keep_.push_back(tensor);
    return tensor;
  }

  static void expect(const char* name, const Tensor& tensor, int64_t count) {
    if (tensor.numel() == count) return;
    refuse(std::string(name) + " must have " + std::to_string(count) + " entries, got " +
           std::to_string(tensor.numel()));
  }

  cuda::GatedExitParams params(int64_t e, const Tensor& exit_logits, bool may_leave) {
    auto p = base_;
    if (e < 0 || e >= p.E) refuse("exit must be within 0.." + std::to_string(p.E - 1));
    if (exit_logits.dim() != 2 || exit_logits.size(0) != p.N || exit_logits.size(1) != p.K ||
        exit_logits.scalar_type() != type_ || exit_logits.device() != device_ ||
        (p.K > 1 && exit_logits.stride(1) != 1)) {
      refuse("exit_logits must have shape, dtype and device of the answers, and dense rows");
    }
    p.exit_logits = exit_logits.const_data_ptr();
    p.logits_stride_n = exit_logits.stride(0);
    p.e = e;
    p.may_leave = may_leave;
    return p;
  }

  at::Device device_;
  at::ScalarType type_ = at::kFloat;
  std::vector<Tensor> keep_;
  cuda::GatedExitParams base_{};
  cuda::GatedGraph graph_;
};

std::string refused(int64_t captured) {
  std::string name;
  check(cuda::refused_node(reinterpret_cast<cudaGraph_t>(captured), &name), "a captured graph cannot be read");
  return name;
}

}  // namespace

void register_gated_graph(py::module_& module) {
  register_capture_stream(module);
  py::class_<GatedGraph>(module, "GatedGraph", "One launch for a gated network: stages and exits in nested IF nodes.")
      .def(py::init<py::dict, const std::string&, const std::string&>(), py::arg("tensors"), py::arg("criterion"),
           py::arg("criterion_on"))
      .def("add", &GatedGraph::add, py::arg("captured"), py::arg("e"), py::arg("exit_logits"), py::arg("may_leave"),
           py::arg("opens"))
      .def("instantiate", &GatedGraph::instantiate)
      .def("launch", &GatedGraph::launch)
      .def("run_exit", &GatedGraph::run_exit, py::arg("e"), py::arg("exit_logits"), py::arg("may_leave"));
  module.def("refused_node", &refused, py::arg("captured"),
             "The kind of the first node that the body of an IF node cannot hold, or ''.");
}

}  // namespace aep
