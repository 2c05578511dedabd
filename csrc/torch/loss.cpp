// joint_cross_entropy: common part of the backends, autograd of the memory mode that recomputes. Autocast leaves it
// alone: losses are formed in float32 whatever the dtype of the logits, which a cast of the logits would only copy.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "autograd.h"
#include "prepare.h"
#include "results.h"

namespace aep {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using LossResult = std::tuple<Tensor, Tensor, Tensor>;

namespace {

// `kept`: the maxima of all rows, then their sums of exponentials, then the divisor of the mean.
void* element_of(const Tensor& kept, int64_t position) {
  return static_cast<char*>(kept.mutable_data_ptr()) + position * static_cast<int64_t>(kept.element_size());
}

}  // namespace

LossCall prepare_loss(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                      const OptionalTensor& class_weight, double label_smoothing, int64_t ignore_index,
                      std::string_view reduction) {
  constexpr const char* op = "joint_cross_entropy";
  check_loss(op, exit_logits, target, class_weight, label_smoothing);
  check_vector(op, "exit_weights", exit_weights, exit_logits.size(0), exit_logits.device());
  check_reduction(reduction);
  const auto type = exit_logits.scalar_type();
  const auto wide = exit_logits.options().dtype(accumulate_type(type));
  LossCall call;
  auto& p = call.params;
  p.E = exit_logits.size(0), p.N = exit_logits.size(1), p.K = exit_logits.size(2);
  call.exit_weights = accumulated(exit_weights, type);
  const bool none = reduction == "none";
  call.loss = none ? at::empty({p.N}, wide) : at::empty({}, wide);
  call.exit_losses = none ? at::empty({p.E, p.N}, wide) : at::empty({p.E}, wide);
  call.row_losses = none ? call.exit_losses : at::empty({p.E, p.N}, wide);
  call.kept = at::empty({2 * p.E * p.N + 1}, wide);
  p.logits = exit_logits.const_data_ptr();
  p.target = target.const_data_ptr<int64_t>();
  if (class_weight.has_value()) {
    call.class_weight = accumulated(*class_weight, type);
    p.class_weight = call.class_weight.const_data_ptr();
  }
  p.row_losses = call.row_losses.mutable_data_ptr();
  p.row_max = element_of(call.kept, 0);
  p.row_sum = element_of(call.kept, p.E * p.N);
  p.dtype = kernel_type(type);
  p.stride_e = exit_logits.stride(0), p.stride_n = exit_logits.stride(1), p.stride_k = exit_logits.stride(2);
  p.target_stride = target.stride(0);
  p.ignore_index = ignore_index;
  p.label_smoothing = label_smoothing;

  auto& r = call.reduce;
  r.reduction = none                  ? kernels::Reduction::none
                : reduction == "mean" ? kernels::Reduction::mean
                                      : kernels::Reduction::sum;
  r.row_losses = p.row_losses;
  r.exit_weights = call.exit_weights.const_data_ptr();
  r.target = p.target;
  r.class_weight = p.class_weight;
  r.loss = call.loss.mutable_data_ptr();
  r.exit_losses = none ? nullptr : call.exit_losses.mutable_data_ptr();
  r.denominator = element_of(call.kept, 2 * p.E * p.N);
  r.dtype = p.dtype;
  r.E = p.E, r.N = p.N, r.K = p.K;
  r.target_stride = p.target_stride;
  r.ignore_index = ignore_index;
  return call;
}

LossBackwardCall prepare_loss_backward(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                       const Tensor& kept, const OptionalTensor& grad_loss,
                                       const OptionalTensor& grad_exit_losses, const OptionalTensor& class_weight,
                                       double label_smoothing, int64_t ignore_index, std::string_view reduction) {
  constexpr const char* op = "joint_cross_entropy_backward";
  check_loss(op, exit_logits, target, class_weight, label_smoothing);
  check_vector(op, "exit_weights", exit_weights, exit_logits.size(0), exit_logits.device());
  check_reduction(reduction);
  const auto type = exit_logits.scalar_type();
  const bool none = reduction == "none";
  LossBackwardCall call;
  auto& p = call.params;
  auto& c = p.coefficients;
  p.E = exit_logits.size(0), p.N = exit_logits.size(1), p.K = exit_logits.size(2);
  const auto check = [&](const char* name, const Tensor& tensor, at::IntArrayRef shape) {
    check_dtype(op, name, tensor, accumulate_type(type));
    check_shape(op, name, tensor, shape);
    check_device(op, name, tensor, exit_logits.device());
  };
  check("kept", kept, {2 * p.E * p.N + 1});
  call.kept = kept.contiguous();
  c.factor = 1;
  c.denominator = reduction == "mean" ? element_of(call.kept, 2 * p.E * p.N) : nullptr;
  if (grad_loss.has_value()) {
    none ? check("grad_loss", *grad_loss, {p.N}) : check("grad_loss", *grad_loss, {});
    call.exit_weights = accumulated(exit_weights, type);
    call.grad_loss = *grad_loss;
    c.exit_weights = call.exit_weights.const_data_ptr();
    c.grad_loss = grad_loss->const_data_ptr();
    c.loss_stride_n = none ? grad_loss->stride(0) : 0;
  }
  if (grad_exit_losses.has_value()) {
    none ? check("grad_exit_losses", *grad_exit_losses, {p.E, p.N})
         : check("grad_exit_losses", *grad_exit_losses, {p.E});
    call.grad_exit_losses = *grad_exit_losses;
    c.grad_exit_losses = grad_exit_losses->const_data_ptr();
    c.exit_stride_e = grad_exit_losses->stride(0);
    c.exit_stride_n = none ? grad_exit_losses->stride(1) : 0;
  }
  call.grad_logits = fresh({p.E, p.N, p.K}, type, exit_logits);
  p.logits = exit_logits.const_data_ptr();
  p.target = target.const_data_ptr<int64_t>();
  if (class_weight.has_value()) {
    call.class_weight = accumulated(*class_weight, type);
    p.class_weight = call.class_weight.const_data_ptr();
  }
  p.row_max = element_of(call.kept, 0);
  p.row_sum = element_of(call.kept, p.E * p.N);
  p.grad_logits = call.grad_logits.mutable_data_ptr();
  p.dtype = kernel_type(type);
  p.stride_e = exit_logits.stride(0), p.stride_n = exit_logits.stride(1), p.stride_k = exit_logits.stride(2);
  p.target_stride = target.stride(0);
  p.out_stride_e = p.N * p.K, p.out_stride_n = p.K;
  p.ignore_index = ignore_index;
  p.label_smoothing = label_smoothing;
  return call;
}

namespace {

LossResult dispatch_loss(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                         const OptionalTensor& class_weight, double label_smoothing, int64_t ignore_index,
                         std::string_view reduction) {
  static auto op = find_operator<LossResult(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
                                            int64_t, std::string_view)>("aep::joint_cross_entropy");
  return op.call(exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction);
}

Tensor dispatch_backward(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                         const Tensor& kept, const OptionalTensor& grad_loss, const OptionalTensor& grad_exit_losses,
                         const OptionalTensor& class_weight, double label_smoothing, int64_t ignore_index,
                         std::string_view reduction) {
  static auto op = find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
                                        int64_t, std::string_view)>("aep::joint_cross_entropy_backward");
  return op.call(exit_logits, target, exit_weights, kept, grad_loss, grad_exit_losses, class_weight, label_smoothing,
                 ignore_index, reduction);
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

class LossFunction : public torch::autograd::Function<LossFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& exit_logits, const Tensor& target,
                               const Tensor& exit_weights, const OptionalTensor* class_weight, double label_smoothing,
                               int64_t ignore_index, std::string_view reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, exit_losses, kept] =
        dispatch_loss(exit_logits, target, exit_weights, *class_weight, label_smoothing, ignore_index, reduction);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({kept});
    ctx->save_for_backward({exit_logits, target, exit_weights, class_weight->value_or(Tensor()), kept,
                            exit_weights.requires_grad() ? exit_losses : Tensor()});
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["reduction"] = std::string(reduction);
    return {loss, exit_losses, kept};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(7);
    const Tensor& grad_loss = grads[0];
    const Tensor& grad_exit_losses = grads[1];
    if (!grad_loss.defined() && !grad_exit_losses.defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables();
    const Tensor& exit_weights = saved[2];
    const std::string& reduction = ctx->saved_data["reduction"].toStringRef();
    if (ctx->needs_input_grad(0)) {
      result[0] = dispatch_backward(saved[0], saved[1], exit_weights, saved[4], optional(grad_loss),
                                    optional(grad_exit_losses), optional(saved[3]),
                                    ctx->saved_data["label_smoothing"].toDouble(),
                                    ctx->saved_data["ignore_index"].toInt(), reduction);
    }
    if (ctx->needs_input_grad(2) && grad_loss.defined()) {
      const Tensor products = saved[5].mul(grad_loss);
      result[2] = (reduction == "none" ? products.sum(1) : products).to(exit_weights.scalar_type());
    }
    return result;
  }
};

LossResult loss_autograd(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                         const OptionalTensor& class_weight, double label_smoothing, int64_t ignore_index,
                         std::string_view reduction) {
  TORCH_CHECK_VALUE(!class_weight.has_value() || !needs_graph({&*class_weight}),
                    "aep::joint_cross_entropy: class_weight must not require a gradient, got requires_grad=True");
  no_tangents("joint_cross_entropy", {&exit_logits, &exit_weights});
  if (class_weight.has_value()) {
    no_tangents("joint_cross_entropy", {&*class_weight});
  }
  if (needs_graph({&exit_logits, &exit_weights})) {
    const auto outputs =
        LossFunction::apply(exit_logits, target, exit_weights, &class_weight, label_smoothing, ignore_index, reduction);
    return {outputs[0], outputs[1], outputs[2]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch_loss(exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction);
}

Tensor backward_autograd(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                         const Tensor& kept, const OptionalTensor& grad_loss, const OptionalTensor& grad_exit_losses,
                         const OptionalTensor& class_weight, double label_smoothing, int64_t ignore_index,
                         std::string_view reduction) {
  const Tensor loss = grad_loss.value_or(Tensor()), exits = grad_exit_losses.value_or(Tensor());
  no_tangents("joint_cross_entropy_backward", {&exit_logits, &exit_weights, &kept, &loss, &exits});
  std::vector<Tensor> result(1);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result[0] = dispatch_backward(exit_logits, target, exit_weights, kept, grad_loss, grad_exit_losses, class_weight,
                                  label_smoothing, ignore_index, reduction);
  }
  differentiable_once("joint_cross_entropy", {exit_logits, exit_weights, kept, loss, exits}, result);
  return result[0];
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) {
  m.impl("joint_cross_entropy", &aep::loss_autograd);
  m.impl("joint_cross_entropy_backward", &aep::backward_autograd);
}
