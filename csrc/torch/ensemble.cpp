// ensemble and ensemble_stats: common part of the backends, autograd. Autocast leaves them alone: the sum is formed in
// float32 in any case, and the result keeps the dtype of the logits.
#include <torch/library.h>

#include "autograd.h"
#include "prepare.h"

namespace aep {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using StatsResult = std::tuple<Tensor, Tensor, Tensor>;

namespace {

EnsembleCall ensemble_call(const Tensor& exit_logits, const Tensor& weights) {
  const auto type = exit_logits.scalar_type();
  EnsembleCall call;
  call.output = fresh(exit_logits.sizes().slice(1), type, exit_logits);
  call.weights = accumulated(weights, type);
  auto& p = call.params;
  p.logits = exit_logits.const_data_ptr();
  p.weights = call.weights.const_data_ptr();
  p.output = call.output.mutable_data_ptr();
  p.dtype = kernel_type(type);
  p.E = exit_logits.size(0), p.N = exit_logits.size(1), p.K = exit_logits.size(2);
  p.stride_e = exit_logits.stride(0), p.stride_n = exit_logits.stride(1), p.stride_k = exit_logits.stride(2);
  p.out_stride_n = p.K;
  return call;
}

}  // namespace

EnsembleCall prepare_ensemble(const Tensor& exit_logits, const Tensor& weights) {
  check_ensemble("ensemble", exit_logits, weights);
  return ensemble_call(exit_logits, weights);
}

EnsembleStatsCall prepare_ensemble_stats(const Tensor& exit_logits, const Tensor& weights, double normalizer,
                                         double temperature, const OptionalTensor& normalizer_tensor,
                                         const OptionalTensor& temperature_tensor) {
  constexpr const char* op = "ensemble_stats";
  check_ensemble(op, exit_logits, weights);
  check_scalar(op, "normalizer", normalizer_tensor, normalizer, exit_logits.device(), true);
  check_scalar(op, "temperature", temperature_tensor, temperature, exit_logits.device(), true);
  EnsembleStatsCall call;
  call.ensemble = ensemble_call(exit_logits, weights);
  const int64_t rows = exit_logits.size(1);
  call.stats = fresh({rows, 3}, at::kFloat, exit_logits);
  call.argmax = fresh({rows}, at::kLong, exit_logits);
  auto& p = call.params;
  p.ensemble = call.ensemble.params;
  p.normalizer = kernel_scalar(normalizer_tensor, normalizer, exit_logits.scalar_type(), call.keep[0]);
  p.temperature = kernel_scalar(temperature_tensor, temperature, exit_logits.scalar_type(), call.keep[1]);
  p.stats = call.stats.mutable_data_ptr<float>();
  p.argmax = call.argmax.mutable_data_ptr<int64_t>();
  return call;
}

EnsembleBackwardCall prepare_ensemble_backward_logits(const Tensor& grad, const Tensor& weights) {
  constexpr const char* op = "ensemble_backward_logits";
  check_floating(op, "grad", grad);
  TORCH_CHECK_VALUE(grad.dim() == 2, "aep::", op, ": grad must have 2 dimensions (N, K), got shape ", grad.sizes());
  TORCH_CHECK_VALUE(weights.dim() == 1, "aep::", op, ": weights must have 1 dimension (E,), got shape ",
                    weights.sizes());
  check_vector(op, "weights", weights, weights.size(0), grad.device());
  EnsembleBackwardCall call;
  call.grad = grad;
  call.operand = accumulated(weights, grad.scalar_type());
  auto& p = call.params;
  p.dtype = kernel_type(grad.scalar_type());
  p.E = weights.size(0), p.N = grad.size(0), p.K = grad.size(1);
  call.output = fresh({p.E, p.N, p.K}, grad.scalar_type(), grad);
  p.grad = grad.const_data_ptr();
  p.weights = call.operand.const_data_ptr();
  p.grad_logits = call.output.mutable_data_ptr();
  p.grad_stride_n = grad.stride(0), p.grad_stride_k = grad.stride(1);
  p.out_stride_e = p.N * p.K, p.out_stride_n = p.K;
  return call;
}

EnsembleBackwardCall prepare_ensemble_backward_weights(const Tensor& grad, const Tensor& exit_logits) {
  constexpr const char* op = "ensemble_backward_weights";
  check_floating(op, "exit_logits", exit_logits);
  TORCH_CHECK_VALUE(exit_logits.dim() == 3, "aep::", op, ": exit_logits must have 3 dimensions (E, N, K), got shape ",
                    exit_logits.sizes());
  check_dtype(op, "grad", grad, exit_logits.scalar_type());
  check_shape(op, "grad", grad, exit_logits.sizes().slice(1));
  check_device(op, "grad", grad, exit_logits.device());
  EnsembleBackwardCall call;
  call.grad = grad;
  call.operand = exit_logits;
  auto& p = call.params;
  p.dtype = kernel_type(grad.scalar_type());
  p.E = exit_logits.size(0), p.N = exit_logits.size(1), p.K = exit_logits.size(2);
  const auto wide = accumulate_type(grad.scalar_type());
  call.output = fresh({p.E}, wide, grad);
  call.partials = fresh({kernels::ensemble_backward_partials(p.E, p.N, p.K)}, wide, grad);
  p.grad = grad.const_data_ptr();
  p.logits = exit_logits.const_data_ptr();
  p.partials = call.partials.mutable_data_ptr();
  p.grad_weights = call.output.mutable_data_ptr();
  p.grad_stride_n = grad.stride(0), p.grad_stride_k = grad.stride(1);
  p.stride_e = exit_logits.stride(0), p.stride_n = exit_logits.stride(1), p.stride_k = exit_logits.stride(2);
  return call;
}

namespace {

Tensor dispatch_ensemble(const Tensor& exit_logits, const Tensor& weights) {
  static auto op = find_operator<Tensor(const Tensor&, const Tensor&)>("aep::ensemble");
  return op.call(exit_logits, weights);
}

Tensor dispatch_backward_logits(const Tensor& grad, const Tensor& weights) {
  static auto op = find_operator<Tensor(const Tensor&, const Tensor&)>("aep::ensemble_backward_logits");
  return op.call(grad, weights);
}

Tensor dispatch_backward_weights(const Tensor& grad, const Tensor& exit_logits) {
  static auto op = find_operator<Tensor(const Tensor&, const Tensor&)>("aep::ensemble_backward_weights");
  return op.call(grad, exit_logits);
}

StatsResult dispatch_stats(const Tensor& exit_logits, const Tensor& weights, double normalizer, double temperature,
                           const OptionalTensor& normalizer_tensor, const OptionalTensor& temperature_tensor) {
  static auto op = find_operator<StatsResult(const Tensor&, const Tensor&, double, double, const OptionalTensor&,
                                             const OptionalTensor&)>("aep::ensemble_stats");
  return op.call(exit_logits, weights, normalizer, temperature, normalizer_tensor, temperature_tensor);
}

void save_operands(AutogradContext* ctx, const Tensor& exit_logits, const Tensor& weights) {
  ctx->set_materialize_grads(false);
  // The logits are needed for the gradient of the weights alone.
  ctx->save_for_backward({weights.requires_grad() ? exit_logits : Tensor(), weights});
}

// Gradients for (exit_logits, weights). Where a graph of the backward is recorded, plain differentiable operators.
std::array<Tensor, 2> operand_gradients(AutogradContext* ctx, const Tensor& grad) {
  std::array<Tensor, 2> result;
  if (!grad.defined()) {
    return result;
  }
  const auto saved = ctx->get_saved_variables();
  const Tensor& exit_logits = saved[0];
  const Tensor& weights = saved[1];
  const bool graph = at::GradMode::is_enabled();
  const auto wide = accumulate_type(grad.scalar_type());
  if (ctx->needs_input_grad(0)) {
    result[0] =
        graph ? grad.to(wide).unsqueeze(0).mul(weights.to(wide).unsqueeze(-1).unsqueeze(-1)).to(grad.scalar_type())
              : dispatch_backward_logits(grad, weights);
  }
  if (ctx->needs_input_grad(1)) {
    const Tensor sums = graph ? grad.to(wide).unsqueeze(0).mul(exit_logits.to(wide)).sum({1, 2})
                              : dispatch_backward_weights(grad, exit_logits);
    result[1] = sums.to(weights.scalar_type());
  }
  return result;
}

class EnsembleFunction : public torch::autograd::Function<EnsembleFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& exit_logits, const Tensor& weights) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save_operands(ctx, exit_logits, weights);
    return dispatch_ensemble(exit_logits, weights);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto [logits, weights] = operand_gradients(ctx, grads[0]);
    return {logits, weights};
  }
};

class StatsFunction : public torch::autograd::Function<StatsFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& exit_logits, const Tensor& weights,
                               double normalizer, double temperature, const OptionalTensor* normalizer_tensor,
                               const OptionalTensor* temperature_tensor) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save_operands(ctx, exit_logits, weights);
    auto [logits, stats, argmax] =
        dispatch_stats(exit_logits, weights, normalizer, temperature, *normalizer_tensor, *temperature_tensor);
    ctx->mark_non_differentiable({stats, argmax});
    return {logits, stats, argmax};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto [logits, weights] = operand_gradients(ctx, grads[0]);
    return {logits, weights, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor ensemble_autograd(const Tensor& exit_logits, const Tensor& weights) {
  no_tangents("ensemble", {&exit_logits, &weights});
  if (needs_graph({&exit_logits, &weights})) {
    return EnsembleFunction::apply(exit_logits, weights);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch_ensemble(exit_logits, weights);
}

StatsResult stats_autograd(const Tensor& exit_logits, const Tensor& weights, double normalizer, double temperature,
                           const OptionalTensor& normalizer_tensor, const OptionalTensor& temperature_tensor) {
  no_tangents("ensemble_stats", {&exit_logits, &weights});
  if (needs_graph({&exit_logits, &weights})) {
    const auto outputs =
        StatsFunction::apply(exit_logits, weights, normalizer, temperature, &normalizer_tensor, &temperature_tensor);
    return {outputs[0], outputs[1], outputs[2]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch_stats(exit_logits, weights, normalizer, temperature, normalizer_tensor, temperature_tensor);
}

Tensor backward_logits_autograd(const Tensor& grad, const Tensor& weights) {
  no_tangents("ensemble_backward_logits", {&grad, &weights});
  std::vector<Tensor> result(1);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result[0] = dispatch_backward_logits(grad, weights);
  }
  differentiable_once("ensemble_backward_logits", {grad, weights}, result);
  return result[0];
}

Tensor backward_weights_autograd(const Tensor& grad, const Tensor& exit_logits) {
  no_tangents("ensemble_backward_weights", {&grad, &exit_logits});
  std::vector<Tensor> result(1);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result[0] = dispatch_backward_weights(grad, exit_logits);
  }
  differentiable_once("ensemble_backward_weights", {grad, exit_logits}, result);
  return result[0];
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) {
  m.impl("ensemble", &aep::ensemble_autograd);
  m.impl("ensemble_stats", &aep::stats_autograd);
  m.impl("ensemble_backward_logits", &aep::backward_logits_autograd);
  m.impl("ensemble_backward_weights", &aep::backward_weights_autograd);
}
