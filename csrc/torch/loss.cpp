// multi_exit_loss, and joint_cross_entropy as its special case: common part of the backends, autograd of the memory mode
// that recomputes. Autocast leaves it alone: losses are formed in float32 whatever the dtype of the logits, which a cast of
// the logits would only copy.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "autograd.h"
#include "prepare.h"
#include "results.h"

namespace aep {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

namespace {

// `kept`: what the kernels keep of the rows, then the two divisors of the mean.
void* divisors_of(const Tensor& kept) {
  return static_cast<char*>(kept.mutable_data_ptr()) + (kept.numel() - 2) * static_cast<int64_t>(kept.element_size());
}
int64_t kept_size(int64_t E, int64_t N, bool terms) { return kernels::multi_exit_loss_kept(E, N, terms) + 2; }

void check_options(const char* op, const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                   const LossOptions& o) {
  check_loss(op, exit_logits, target, o.class_weight, o.label_smoothing, o.name != "joint_cross_entropy");
  const int64_t exits = exit_logits.size(0);
  check_vector(op, "exit_weights", exit_weights, exits, exit_logits.device());
  if (o.prefix_weights.has_value()) check_vector(op, "prefix_weights", *o.prefix_weights, exits, exit_logits.device());
  if (o.output_weights.has_value()) check_vector(op, "output_weights", *o.output_weights, exits, exit_logits.device());
  TORCH_CHECK_VALUE(o.distillation >= 0 && std::isfinite(o.distillation), "aep::", op,
                    ": distillation must be finite and at least 0, got ", o.distillation);
  TORCH_CHECK_VALUE(o.temperature > 0 && std::isfinite(o.temperature), "aep::", op,
                    ": temperature must be finite and greater than 0, got ", o.temperature);
  check_reduction(op, o.reduction);
}

// What losses and gradients have in common.
void fill_params(LossCall& call, const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                 const LossOptions& o) {
  const auto type = exit_logits.scalar_type();
  auto& p = call.params;
  p.logits = exit_logits.const_data_ptr();
  p.dtype = kernel_type(type);
  p.E = exit_logits.size(0), p.N = exit_logits.size(1), p.K = exit_logits.size(2);
  p.stride_e = exit_logits.stride(0), p.stride_n = exit_logits.stride(1), p.stride_k = exit_logits.stride(2);
  call.target = target;
  if (target.dim() == 2) {
    if (target.scalar_type() != accumulate_type(type)) call.target = target.to(accumulate_type(type));
    if (call.target.stride(1) != 1) call.target = call.target.contiguous();
    p.probabilities = call.target.const_data_ptr();
  } else {
    p.target = target.const_data_ptr<int64_t>();
  }
  p.target_stride = call.target.stride(0);
  if (o.class_weight.has_value()) {
    call.class_weight = accumulated(*o.class_weight, type);
    p.class_weight = call.class_weight.const_data_ptr();
  }
  if (o.output_weights.has_value()) {
    call.output_weights = accumulated(*o.output_weights, type);
    p.output_weights = call.output_weights.const_data_ptr();
  }
  call.weights[0] = accumulated(exit_weights, type);
  if (o.prefix_weights.has_value()) call.weights[1] = accumulated(*o.prefix_weights, type);
  p.ignore_index = o.ignore_index;
  p.label_smoothing = o.label_smoothing;
  p.temperature = o.temperature;
  p.prefixes = o.prefix_weights.has_value();
  p.distillation = o.distillation > 0;
  p.detach_prefix = o.detach_prefix;
}

}  // namespace

LossCall prepare_loss(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                      const LossOptions& o) {
  check_options(o.op(), exit_logits, target, exit_weights, o);
  const auto wide = exit_logits.options().dtype(accumulate_type(exit_logits.scalar_type()));
  LossCall call;
  fill_params(call, exit_logits, target, exit_weights, o);
  auto& p = call.params;
  auto& r = call.reduce;
  const bool none = o.reduction == "none";
  call.loss = none ? at::empty({p.N}, wide) : at::empty({}, wide);
  call.kept = at::empty({kept_size(p.E, p.N, o.terms())}, wide);
  p.kept = call.kept.mutable_data_ptr();
  r.divisors = divisors_of(call.kept);
  for (int i = 0; i < 3; ++i) {
    if ((i == 1 && !p.prefixes) || (i == 2 && !p.distillation)) {
      call.losses[i] = at::empty({0}, wide);
      continue;
    }
    call.losses[i] = none ? at::empty({p.E, p.N}, wide) : at::empty({p.E}, wide);
    call.row_losses[i] = none ? call.losses[i] : at::empty({p.E, p.N}, wide);
    p.row_losses[i] = call.row_losses[i].mutable_data_ptr();
    r.row_losses[i] = p.row_losses[i];
    r.losses[i] = call.losses[i].mutable_data_ptr();
    if (i < 2) r.weights[i] = call.weights[i].const_data_ptr();
  }
  r.weight = o.distillation * o.temperature * o.temperature;
  r.target = p.target;
  r.class_weight = p.class_weight;
  r.loss = call.loss.mutable_data_ptr();
  r.dtype = p.dtype;
  r.reduction = none                    ? kernels::Reduction::none
                : o.reduction == "mean" ? kernels::Reduction::mean
                                        : kernels::Reduction::sum;
  r.E = p.E, r.N = p.N, r.K = p.K;
  r.target_stride = p.target_stride;
  r.ignore_index = p.ignore_index;
  return call;
}

LossGradCall prepare_loss_backward(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                   const Tensor& kept, const OptionalTensor& grad_loss,
                                   const OptionalTensor (&grad_losses)[3], const LossOptions& o) {
  constexpr const char* op = "multi_exit_loss_backward";
  check_options(op, exit_logits, target, exit_weights, o);
  LossGradCall call;
  fill_params(call.loss, exit_logits, target, exit_weights, o);
  auto& q = call.params;
  auto& p = call.loss.params;
  const bool none = o.reduction == "none", mean = o.reduction == "mean";
  const auto check = [&](const char* name, const Tensor& tensor, at::IntArrayRef shape) {
    check_dtype(op, name, tensor, accumulate_type(exit_logits.scalar_type()));
    check_shape(op, name, tensor, shape);
    check_device(op, name, tensor, exit_logits.device());
  };
  check("kept", kept, {kept_size(p.E, p.N, o.terms())});
  call.loss.kept = kept.contiguous();
  p.kept = call.loss.kept.mutable_data_ptr();
  if (grad_loss.has_value()) {
    none ? check("grad_loss", *grad_loss, {p.N}) : check("grad_loss", *grad_loss, {});
    call.grad_loss = *grad_loss;
  }
  const char* names[] = {"grad_exit_losses", "grad_prefix_losses", "grad_distillation_losses"};
  const bool asked[] = {true, p.prefixes, p.distillation};
  for (int i = 0; i < 3; ++i) {
    if (!asked[i]) continue;
    auto& c = q.coefficients[i];
    c.factor = 1;
    if (mean) {
      c.denominator = static_cast<char*>(divisors_of(call.loss.kept)) + i / 2 * static_cast<int64_t>(kept.element_size());
    }
    if (grad_loss.has_value()) {
      if (i < 2) c.weights = call.loss.weights[i].const_data_ptr();
      c.weight = o.distillation * o.temperature * o.temperature;
      c.grad_loss = grad_loss->const_data_ptr();
      c.loss_stride_n = none ? grad_loss->stride(0) : 0;
    }
    if (grad_losses[i].has_value()) {
      const Tensor& given = call.grad_losses[i] = *grad_losses[i];
      none ? check(names[i], given, {p.E, p.N}) : check(names[i], given, {p.E});
      c.grad_losses = given.const_data_ptr();
      c.stride_e = given.stride(0);
      c.stride_n = none ? given.stride(1) : 0;
    }
  }
  call.grad_logits = fresh({p.E, p.N, p.K}, exit_logits.scalar_type(), exit_logits);
  q.loss = p;
  q.grad_logits = call.grad_logits.mutable_data_ptr();
  q.out_stride_e = p.N * p.K, q.out_stride_n = p.K, q.out_stride_k = 1;
  return call;
}

namespace {

LossResult dispatch_loss(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                         const LossOptions& o) {
  static auto op = find_operator<LossResult(const Tensor&, const Tensor&, const Tensor&, AEP_LOSS_ARGUMENTS)>(
      "aep::multi_exit_loss");
  return op.call(exit_logits, target, exit_weights, AEP_LOSS_VALUES(o));
}

Tensor dispatch_backward(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                         const Tensor& kept, const OptionalTensor& grad_loss, const OptionalTensor& grad_exit_losses,
                         const OptionalTensor& grad_prefix_losses, const OptionalTensor& grad_distillation_losses,
                         const LossOptions& o) {
  static auto op = find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                        const OptionalTensor&, AEP_LOSS_ARGUMENTS)>("aep::multi_exit_loss_backward");
  return op.call(exit_logits, target, exit_weights, kept, grad_loss, grad_exit_losses, grad_prefix_losses,
                 grad_distillation_losses, AEP_LOSS_VALUES(o));
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

class LossFunction : public torch::autograd::Function<LossFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& exit_logits, const Tensor& target,
                               const Tensor& exit_weights, const OptionalTensor& prefix_weights,
                               const LossOptions* o) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, exit_losses, prefix_losses, distillation_losses, kept] =
        dispatch_loss(exit_logits, target, exit_weights, *o);
    ctx->set_materialize_grads(false);
    variable_list constant{kept};
    if (!prefix_weights.has_value()) constant.push_back(prefix_losses);
    if (!(o->distillation > 0)) constant.push_back(distillation_losses);
    ctx->mark_non_differentiable(constant);
    const bool learned = prefix_weights.has_value() && prefix_weights->requires_grad();
    ctx->save_for_backward({exit_logits, target, exit_weights, kept, o->class_weight.value_or(Tensor()),
                            prefix_weights.value_or(Tensor()), o->output_weights.value_or(Tensor()),
                            exit_weights.requires_grad() ? exit_losses : Tensor(), learned ? prefix_losses : Tensor()});
    ctx->saved_data["label_smoothing"] = o->label_smoothing;
    ctx->saved_data["ignore_index"] = o->ignore_index;
    ctx->saved_data["reduction"] = std::string(o->reduction);
    ctx->saved_data["distillation"] = o->distillation;
    ctx->saved_data["temperature"] = o->temperature;
    ctx->saved_data["detach_prefix"] = o->detach_prefix;
    ctx->saved_data["name"] = std::string(o->name);
    return {loss, exit_losses, prefix_losses, distillation_losses, kept};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined() && !grads[3].defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables();
    const std::string &reduction = ctx->saved_data["reduction"].toStringRef(), &name = ctx->saved_data["name"].toStringRef();
    const OptionalTensor class_weight = optional(saved[4]), prefix_weights = optional(saved[5]),
                         output_weights = optional(saved[6]);
    if (ctx->needs_input_grad(0)) {
      const LossOptions options{class_weight,
                                ctx->saved_data["label_smoothing"].toDouble(),
                                ctx->saved_data["ignore_index"].toInt(),
                                reduction,
                                prefix_weights,
                                output_weights,
                                ctx->saved_data["distillation"].toDouble(),
                                ctx->saved_data["temperature"].toDouble(),
                                ctx->saved_data["detach_prefix"].toBool(),
                                name};
      result[0] = dispatch_backward(saved[0], saved[1], saved[2], saved[3], optional(grads[0]), optional(grads[1]),
                                    optional(grads[2]), optional(grads[3]), options);
    }
    for (const int i : {0, 1}) {  // the weights of exits, and of prefixes
      if (saved[7 + i].defined() && grads[0].defined()) {
        const Tensor products = saved[7 + i].mul(grads[0]);
        result[2 + i] = (reduction == "none" ? products.sum(1) : products).to(saved[i == 0 ? 2 : 5].scalar_type());
      }
    }
    return result;
  }
};

LossResult loss_autograd(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                         AEP_LOSS_ARGUMENTS) {
  const LossOptions options = AEP_LOSS_OPTIONS;
  refuse_gradients(exit_logits, target, exit_weights, options);
  if (needs_graph({&exit_logits, &exit_weights}) || (prefix_weights.has_value() && needs_graph({&*prefix_weights}))) {
    const auto outputs = LossFunction::apply(exit_logits, target, exit_weights, prefix_weights, &options);
    return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch_loss(exit_logits, target, exit_weights, options);
}

Tensor backward_autograd(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                         const Tensor& kept, const OptionalTensor& grad_loss, const OptionalTensor& grad_exit_losses,
                         const OptionalTensor& grad_prefix_losses, const OptionalTensor& grad_distillation_losses,
                         AEP_LOSS_ARGUMENTS) {
  const LossOptions options = AEP_LOSS_OPTIONS;
  const Tensor loss = grad_loss.value_or(Tensor()), exits = grad_exit_losses.value_or(Tensor()),
               prefixes = grad_prefix_losses.value_or(Tensor()), kl = grad_distillation_losses.value_or(Tensor()),
               prefix = prefix_weights.value_or(Tensor());
  no_tangents("multi_exit_loss_backward", {&exit_logits, &exit_weights, &prefix, &kept, &loss, &exits, &prefixes, &kl});
  std::vector<Tensor> result(1);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result[0] = dispatch_backward(exit_logits, target, exit_weights, kept, grad_loss, grad_exit_losses,
                                  grad_prefix_losses, grad_distillation_losses, options);
  }
  differentiable_once(options.op(), {exit_logits, exit_weights, prefix, kept, loss, exits, prefixes, kl}, result);
  return result[0];
}

}  // namespace

void refuse_gradients(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                      const LossOptions& o) {
  const auto refuse = [&](const char* what, const Tensor& tensor) {
    TORCH_CHECK_VALUE(!needs_graph({&tensor}), "aep::", o.op(), ": ", what,
                      " must not require a gradient, got requires_grad=True");
    no_tangents(o.op(), {&tensor});
  };
  refuse("target", target);
  if (o.class_weight.has_value()) refuse("class_weight", *o.class_weight);
  if (o.output_weights.has_value()) refuse("output_weights", *o.output_weights);
  no_tangents(o.op(), {&exit_logits, &exit_weights});
  if (o.prefix_weights.has_value()) no_tangents(o.op(), {&*o.prefix_weights});
}

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) {
  m.impl("multi_exit_loss", &aep::loss_autograd);
  m.impl("multi_exit_loss_backward", &aep::backward_autograd);
}
