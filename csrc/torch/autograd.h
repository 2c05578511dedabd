// Helpers of the autograd kernels.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>
#include <string>
#include <vector>

namespace aep {

// The operator's handle, looked up once per call site.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool needs_graph(std::initializer_list<const at::Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) {
    return false;
  }
  for (const at::Tensor* tensor : tensors) {
    if (tensor->defined() && tensor->requires_grad()) {
      return true;
    }
  }
  return false;
}

inline bool needs_graph(at::TensorList tensors) {
  return at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(tensors.vec());
}

// Forward-mode tangents would be dropped without a word: refuse them. Undefined tensors are allowed.
inline void no_tangents(const char* op, std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors) {
    TORCH_CHECK(!tensor->defined() || !tensor->_fw_grad(/*level=*/0).defined(), "aep::", op,
                ": forward-mode differentiation is not supported, got an argument with a tangent");
  }
}

// Tells autograd that the tensors were written.
inline void mark_written(std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors) {
    if (tensor->defined() && !tensor->is_inference()) {
      tensor->unsafeGetTensorImpl()->bump_version();
    }
  }
}

// Results of a backward that cannot be differentiated again: identity, whose own backward raises.
class OnceDifferentiable : public torch::autograd::Function<OnceDifferentiable> {
 public:
  // `sources`: what the results were computed from; the graph is attached through those that need one.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList sources,
                                                const std::vector<at::Tensor>* results, const char* op) {
    ctx->saved_data["op"] = std::string(op);
    torch::autograd::variable_list outputs;
    outputs.reserve(results->size());
    for (const at::Tensor& result : *results) {
      outputs.push_back(result.detach());
    }
    return outputs;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list) {
    TORCH_CHECK(false, "aep::", ctx->saved_data["op"].toStringRef(), ": double backward is not supported");
  }
};

// Marks `results` (undefined ones are left alone) as differentiable only once, if a graph is being recorded at all.
inline void differentiable_once(const char* op, at::TensorList sources, std::vector<at::Tensor>& results) {
  std::vector<at::Tensor> defined_sources;
  for (const at::Tensor& source : sources) {
    if (source.defined()) {
      defined_sources.push_back(source);
    }
  }
  if (!needs_graph(defined_sources)) {
    return;
  }
  std::vector<at::Tensor> defined;
  for (const at::Tensor& result : results) {
    if (result.defined()) {
      defined.push_back(result);
    }
  }
  const auto marked = OnceDifferentiable::apply(at::TensorList(defined_sources), &defined, op);
  size_t next = 0;
  for (at::Tensor& result : results) {
    if (result.defined()) {
      result = marked[next++];
    }
  }
}

}  // namespace aep
