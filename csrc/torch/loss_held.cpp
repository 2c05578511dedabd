// The memory modes of multi_exit_loss that form the gradient in the forward: held in a tensor of its own
// (multi_exit_loss_with_grad) or written over the logits (multi_exit_loss_). The backward only scales it.
#include <ATen/MemoryOverlap.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>

#include "autograd.h"
#include "held.h"
#include "prepare.h"
#include "results.h"

namespace aep {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

double held_factor(at::ScalarType type, const c10::SymInt& rows, std::string_view reduction) {
  if (type != at::kHalf || reduction != "mean") {
    return 1;
  }
  const int64_t count = rows.guard_int(__FILE__, __LINE__);
  double factor = 1;
  while (factor < 1024 && 2 * factor <= static_cast<double>(count)) {
    factor *= 2;
  }
  return factor;
}

namespace {

double factor_of(const Tensor& exit_logits, std::string_view reduction) {
  return held_factor(exit_logits.scalar_type(), exit_logits.sym_size(1), reduction);
}

// Whether every element has a place of its own. Sufficient: each stride reaches past all that the smaller ones span.
bool without_overlap(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) {
      return true;
    }
    if (tensor.size(d) > 1) {
      dims.emplace_back(tensor.stride(d), tensor.size(d));
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) {
      return false;
    }
    reach += stride * (size - 1);
  }
  return true;
}

void check_replaceable(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                       const LossOptions& o) {
  TORCH_CHECK(without_overlap(exit_logits), "aep::", o.op(),
              ": memory='in_place' needs exit_logits whose elements do not share memory (clone() them), got shape ",
              exit_logits.sizes(), " with strides ", exit_logits.strides());
  const auto check = [&](const Tensor& other) {
    TORCH_CHECK(!other.storage().is_alias_of(exit_logits.storage()), "aep::", o.op(),
                ": memory='in_place' overwrites exit_logits: no other argument may share their memory, got one of shape ",
                other.sizes(), " that does");
  };
  check(target), check(exit_weights);
  for (const OptionalTensor* other : {&o.class_weight, &o.prefix_weights, &o.output_weights}) {
    if (other->has_value()) check(**other);
  }
}

}  // namespace

LossGradCall prepare_loss_grad(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                               const LossOptions& o, bool in_place) {
  LossGradCall call;
  call.loss = prepare_loss(exit_logits, target, exit_weights, o);
  TORCH_CHECK_VALUE(o.reduction != "none", "aep::", o.op(), ": memory='", in_place ? "in_place" : "in_forward",
                    "' needs reduction 'mean' or 'sum', got 'none'");
  if (in_place) {
    check_replaceable(exit_logits, target, exit_weights, o);
    call.grad_logits = exit_logits;
  } else {
    call.grad_logits = fresh(exit_logits.sizes(), exit_logits.scalar_type(), exit_logits);
  }
  auto& q = call.params;
  const auto& r = call.loss.reduce;
  q.loss = call.loss.params;
  q.loss.kept = nullptr;
  for (int i = 0; i < 3; ++i) {
    auto& c = q.coefficients[i];
    c.weights = r.weights[i];
    c.weight = r.weight;
    c.denominator = static_cast<char*>(r.divisors) + i / 2 * static_cast<int64_t>(call.loss.kept.element_size());
    c.factor = factor_of(exit_logits, o.reduction);
  }
  q.grad_logits = call.grad_logits.mutable_data_ptr();
  q.out_stride_e = call.grad_logits.stride(0), q.out_stride_n = call.grad_logits.stride(1);
  q.out_stride_k = call.grad_logits.stride(2);
  return call;
}

LossGradScaleCall prepare_loss_grad_scale(const Tensor& grad_logits, const Tensor& scale, double divisor) {
  constexpr const char* op = "multi_exit_loss_scale_";
  const auto type = grad_logits.scalar_type();
  check_floating(op, "grad_logits", grad_logits);
  TORCH_CHECK_VALUE(grad_logits.dim() == 3, "aep::", op, ": grad_logits must have 3 dimensions (E, N, K), got shape ",
                    grad_logits.sizes());
  TORCH_CHECK(without_overlap(grad_logits), "aep::", op, ": grad_logits must not share memory among elements, got "
              "strides ", grad_logits.strides());
  check_dtype(op, "scale", scale, accumulate_type(type));
  check_shape(op, "scale", scale, {});
  check_device(op, "scale", scale, grad_logits.device());
  LossGradScaleCall call;
  call.scale = scale;
  auto& p = call.params;
  p.grad = grad_logits.mutable_data_ptr();
  p.scale = scale.const_data_ptr();
  p.divisor = divisor;
  p.dtype = kernel_type(type);
  p.E = grad_logits.size(0), p.N = grad_logits.size(1), p.K = grad_logits.size(2);
  p.stride_e = grad_logits.stride(0), p.stride_n = grad_logits.stride(1), p.stride_k = grad_logits.stride(2);
  return call;
}

namespace {

using HeldResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using InPlaceResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

HeldResult dispatch_with_grad(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                              const LossOptions& o) {
  static auto op = find_operator<HeldResult(const Tensor&, const Tensor&, const Tensor&, AEP_LOSS_ARGUMENTS)>(
      "aep::multi_exit_loss_with_grad");
  return op.call(exit_logits, target, exit_weights, AEP_LOSS_VALUES(o));
}

InPlaceResult dispatch_in_place(Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                const LossOptions& o) {
  static auto op = find_operator<InPlaceResult(Tensor&, const Tensor&, const Tensor&, AEP_LOSS_ARGUMENTS)>(
      "aep::multi_exit_loss_");
  return op.call(exit_logits, target, exit_weights, AEP_LOSS_VALUES(o));
}

void dispatch_scale(Tensor& grad_logits, const Tensor& scale, double divisor) {
  static auto op = find_operator<void(Tensor&, const Tensor&, double)>("aep::multi_exit_loss_scale_");
  op.call(grad_logits, scale, divisor);
}

// A tensor with memory behind it, not one that a compiler traces.
bool is_concrete(const Tensor& tensor) {
  return !tensor.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

}  // namespace

int64_t holders_of_saved() { return at::SavedTensorDefaultHooks::get_tls_state().stack.empty() ? 2 : 1; }

Tensor scaled(Tensor held, const Tensor& grad_loss, double factor, int64_t holders) {
  if (!is_concrete(held) || !is_concrete(grad_loss)) {
    const Tensor scale = factor == 1 ? grad_loss : grad_loss.div(factor);
    return held.to(grad_loss.scalar_type()).mul(scale).to(held.scalar_type());
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  const bool free = !torch::autograd::get_current_graph_task_keep_graph() &&
                    (holders == kAnyHolders ||
                     (static_cast<int64_t>(held.use_count()) == holders && held.storage().use_count() == 1));
  Tensor result = free ? std::move(held) : held.clone();
  Tensor view = result;
  while (view.dim() < 3) {
    view = view.unsqueeze(0);
  }
  dispatch_scale(view, grad_loss, factor);
  if (free) {  // whoever else has saved this memory must learn that it changed
    torch::autograd::impl::bump_version(result);
  }
  return result;
}

void refuse_second(const char* op, variable_list& result) {
  const auto node = torch::autograd::get_current_node();
  std::vector<Tensor> sources;
  for (const auto& edge : node->next_edges()) {
    if (edge.is_valid()) {
      sources.push_back(at::empty({0}));
      torch::autograd::impl::set_gradient_edge(sources.back(), edge);
    }
  }
  differentiable_once(op, sources, result);
}

namespace {

class HeldFunction : public torch::autograd::Function<HeldFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& exit_logits, const Tensor& target,
                               const Tensor& exit_weights, const OptionalTensor& prefix_weights,
                               const LossOptions* options, bool in_place) {
    Tensor loss, losses[3], held;
    if (in_place) {
      at::AutoDispatchBelowAutograd guard;  // the version counter is the business of the key between
      held = exit_logits.detach();
      std::tie(loss, losses[0], losses[1], losses[2]) = dispatch_in_place(held, target, exit_weights, *options);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(loss, losses[0], losses[1], losses[2], held) =
          dispatch_with_grad(exit_logits, target, exit_weights, *options);
    }
    const bool learned = prefix_weights.has_value() && prefix_weights->requires_grad();
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {held, exit_weights.requires_grad() ? losses[0] : Tensor(), learned ? losses[1] : Tensor()});
    ctx->saved_data["factor"] = factor_of(exit_logits, options->reduction);
    ctx->saved_data["holders"] = in_place ? kAnyHolders : holders_of_saved();
    ctx->saved_data["exit_weights"] = exit_weights.scalar_type();
    ctx->saved_data["prefix_weights"] = prefix_weights.value_or(exit_weights).scalar_type();
    ctx->saved_data["name"] = std::string(options->op());
    if (in_place) {
      ctx->mark_non_differentiable({losses[0], losses[1], losses[2]});
      return {loss, losses[0], losses[1], losses[2]};
    }
    ctx->mark_non_differentiable({losses[0], losses[1], losses[2], held});
    return {loss, losses[0], losses[1], losses[2], held};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(6);
    const Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) {
      return result;
    }
    auto saved = ctx->get_saved_variables();
    if (saved[1].defined()) {
      result[2] = saved[1].mul(grad_loss).to(ctx->saved_data["exit_weights"].toScalarType());
    }
    if (saved[2].defined()) {
      result[3] = saved[2].mul(grad_loss).to(ctx->saved_data["prefix_weights"].toScalarType());
    }
    if (ctx->needs_input_grad(0)) {
      result[0] = scaled(std::move(saved[0]), grad_loss, ctx->saved_data["factor"].toDouble(),
                         ctx->saved_data["holders"].toInt());
    }
    if (at::GradMode::is_enabled()) {
      refuse_second(ctx->saved_data["name"].toStringRef().c_str(), result);
    }
    return result;
  }
};

// Overwritten logits are no function of what they were computed from: their part of the graph ends in an error.
class Overwritten : public torch::autograd::Function<Overwritten> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& exit_logits, const char* op) {
    ctx->saved_data["name"] = std::string(op);
    ctx->mark_dirty({exit_logits});
    return exit_logits;
  }

  static variable_list backward(AutogradContext* ctx, variable_list) {
    TORCH_CHECK(false, "aep::", ctx->saved_data["name"].toStringRef(),
                ": memory='in_place' has overwritten exit_logits with their gradient, got a use of them after the loss");
  }
};

bool needs_graph_of(const Tensor& exit_logits, const Tensor& exit_weights, const OptionalTensor& prefix_weights) {
  return needs_graph({&exit_logits, &exit_weights}) || (prefix_weights.has_value() && needs_graph({&*prefix_weights}));
}

HeldResult with_grad_autograd(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                              AEP_LOSS_ARGUMENTS) {
  const LossOptions options = AEP_LOSS_OPTIONS;
  refuse_gradients(exit_logits, target, exit_weights, options);
  if (needs_graph_of(exit_logits, exit_weights, prefix_weights)) {
    const auto outputs = HeldFunction::apply(exit_logits, target, exit_weights, prefix_weights, &options, false);
    // The caller's is a tensor of its own on the same memory: when it is gone, the memory counts one holder.
    return {outputs[0], outputs[1], outputs[2], outputs[3],
            is_concrete(outputs[4]) ? outputs[4].detach() : outputs[4]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch_with_grad(exit_logits, target, exit_weights, options);
}

InPlaceResult in_place_autograd(Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                AEP_LOSS_ARGUMENTS) {
  const LossOptions options = AEP_LOSS_OPTIONS;
  refuse_gradients(exit_logits, target, exit_weights, options);
  if (needs_graph_of(exit_logits, exit_weights, prefix_weights)) {
    torch::autograd::check_inplace(exit_logits, true);  // leaves and their views, in torch's own words
    const auto outputs = HeldFunction::apply(exit_logits, target, exit_weights, prefix_weights, &options, true);
    if (exit_logits.requires_grad()) {
      // Only the graph changes here: the version stays the one that the held gradient was saved with.
      auto counter = exit_logits.unsafeGetTensorImpl()->version_counter();
      const auto version = counter.current_version();
      Overwritten::apply(exit_logits, options.op());
      counter.set_version(version);
    }
    return {outputs[0], outputs[1], outputs[2], outputs[3]};
  }
  at::AutoDispatchBelowAutograd guard;
  return dispatch_in_place(exit_logits, target, exit_weights, options);
}

// Between autograd and the backends: whoever has saved the logits must learn that they changed.
InPlaceResult in_place_version(Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                               AEP_LOSS_ARGUMENTS) {
  const auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return dispatch_in_place(exit_logits, target, exit_weights, AEP_LOSS_OPTIONS);
  }();
  torch::autograd::impl::bump_version(exit_logits);
  return result;
}

void scale_version(Tensor& grad_logits, const Tensor& scale, double divisor) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    dispatch_scale(grad_logits, scale, divisor);
  }
  torch::autograd::impl::bump_version(grad_logits);
}

void scale_autograd(Tensor& grad_logits, const Tensor& scale, double divisor) {
  TORCH_CHECK(!needs_graph({&grad_logits, &scale}),
              "aep::multi_exit_loss_scale_: not differentiable, got an argument with requires_grad=True");
  no_tangents("multi_exit_loss_scale_", {&grad_logits, &scale});
  at::AutoDispatchBelowAutograd guard;
  dispatch_scale(grad_logits, scale, divisor);
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) {
  m.impl("multi_exit_loss_with_grad", &aep::with_grad_autograd);
  m.impl("multi_exit_loss_", &aep::in_place_autograd);
  m.impl("multi_exit_loss_scale_", &aep::scale_autograd);
}

TORCH_LIBRARY_IMPL(aep, ADInplaceOrView, m) {
  m.impl("multi_exit_loss_", &aep::in_place_version);
  m.impl("multi_exit_loss_scale_", &aep::scale_version);
}
