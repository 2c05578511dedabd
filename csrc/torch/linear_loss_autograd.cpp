// linear_joint_cross_entropy: autograd and autocast. The forward forms the gradients that are wanted, the backward scales
// them.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "autograd.h"
#include "checks.h"
#include "held.h"

namespace aep {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using Losses = std::tuple<Tensor, Tensor>;

namespace {

constexpr const char* kLinearLoss = "linear_joint_cross_entropy";

struct Rest {
  const Tensor* target;
  const OptionalTensor* class_weight;
  double label_smoothing;
  int64_t ignore_index;
  std::string_view reduction;
  std::optional<int64_t> chunk;
};

Losses dispatch(at::TensorList pooled, at::TensorList weights, const Biases& biases, const Tensor& exit_weights,
                const Rest& r) {
  static auto op = find_operator<Losses(at::TensorList, at::TensorList, const Biases&, const Tensor&, const Tensor&,
                                        const OptionalTensor&, double, int64_t, std::string_view,
                                        std::optional<int64_t>)>("aep::linear_joint_cross_entropy");
  return op.call(pooled, weights, biases, *r.target, exit_weights, *r.class_weight, r.label_smoothing, r.ignore_index,
                 r.reduction, r.chunk);
}

using WithGradients = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

WithGradients dispatch_with_grad(at::TensorList pooled, at::TensorList weights, const Biases& biases,
                                 const Tensor& exit_weights, const Rest& r, const c10::List<bool>& wanted) {
  static auto op =
      find_operator<WithGradients(at::TensorList, at::TensorList, const Biases&, const Tensor&, const Tensor&,
                                  const OptionalTensor&, double, int64_t, std::string_view, std::optional<int64_t>,
                                  const c10::List<bool>&)>("aep::linear_joint_cross_entropy_with_grad");
  return op.call(pooled, weights, biases, *r.target, exit_weights, *r.class_weight, r.label_smoothing, r.ignore_index,
                 r.reduction, r.chunk, wanted);
}

class LinearLossFunction : public torch::autograd::Function<LinearLossFunction> {
 public:
  // `tensors`: E pooled features, E weights, those biases that exist, the exit weights.
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Biases* biases, const Rest* rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const size_t exits = biases->size();
    const auto pooled = tensors.slice(0, exits), weights = tensors.slice(exits, exits);
    const Tensor& exit_weights = tensors.back();
    c10::List<bool> wanted;
    c10::List<int64_t> inputs;  // the place among `tensors` of each gradient that is formed
    size_t next_bias = 2 * exits;
    for (size_t i = 0; i < 3 * exits; ++i) {
      const bool exists = i < 2 * exits || OptionalTensor((*biases)[i - 2 * exits]).has_value();
      const size_t place = i < 2 * exits ? i : next_bias;
      if (i >= 2 * exits && exists) ++next_bias;
      wanted.push_back(exists && tensors[place].requires_grad());
      if (wanted.get(i)) inputs.push_back(static_cast<int64_t>(place));
    }
    Tensor loss, exit_losses;
    variable_list saved;
    if (inputs.empty()) {
      std::tie(loss, exit_losses) = dispatch(pooled, weights, *biases, exit_weights, *rest);
    } else {
      std::tie(loss, exit_losses, saved) = dispatch_with_grad(pooled, weights, *biases, exit_weights, *rest, wanted);
    }
    saved.push_back(exit_weights.requires_grad() ? exit_losses : Tensor());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({exit_losses});
    const auto type = pooled[0].scalar_type();
    ctx->saved_data["inputs"] = inputs;
    ctx->saved_data["holders"] = holders_of_saved();
    ctx->saved_data["exits"] = static_cast<int64_t>(exits);
    ctx->saved_data["count"] = static_cast<int64_t>(tensors.size());
    ctx->saved_data["type"] = type;
    ctx->saved_data["exit_weights"] = exit_weights.scalar_type();
    ctx->saved_data["factor"] = held_factor(type, pooled[0].sym_size(0), rest->reduction);
    return {loss, exit_losses};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto count = static_cast<size_t>(ctx->saved_data["count"].toInt());
    variable_list result(count + 2);
    const Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) {
      return result;
    }
    const auto inputs = ctx->saved_data["inputs"].toIntVector();
    const auto type = ctx->saved_data["type"].toScalarType();
    const int64_t exits = ctx->saved_data["exits"].toInt(), holders = ctx->saved_data["holders"].toInt();
    auto saved = ctx->get_saved_variables();
    {
      at::AutoGradMode no_grad(false);
      for (size_t i = 0; i < inputs.size(); ++i) {
        if (ctx->needs_input_grad(inputs[i])) {
          const double factor = inputs[i] < exits ? ctx->saved_data["factor"].toDouble() : 1;
          result[inputs[i]] = scaled(std::move(saved[i]), grad_loss, factor, holders).to(type);
        }
      }
      if (ctx->needs_input_grad(count - 1)) {
        result[count - 1] = saved.back().mul(grad_loss).to(ctx->saved_data["exit_weights"].toScalarType());
      }
    }
    if (at::GradMode::is_enabled()) {
      refuse_second(kLinearLoss, result);
    }
    return result;
  }
};

Losses linear_loss_autograd(at::TensorList pooled, at::TensorList weights, const Biases& biases, const Tensor& target,
                            const Tensor& exit_weights, const OptionalTensor& class_weight, double label_smoothing,
                            int64_t ignore_index, std::string_view reduction, std::optional<int64_t> chunk) {
  TORCH_CHECK_VALUE(!class_weight.has_value() || !needs_graph({&*class_weight}), "aep::", kLinearLoss,
                    ": class_weight must not require a gradient, got requires_grad=True");
  std::vector<Tensor> tensors(pooled.begin(), pooled.end());
  tensors.insert(tensors.end(), weights.begin(), weights.end());
  for (size_t e = 0; e < biases.size(); ++e) {
    const OptionalTensor bias = biases[e];
    if (bias.has_value()) {
      tensors.push_back(*bias);
    }
  }
  tensors.push_back(exit_weights);
  for (const Tensor& tensor : tensors) {
    no_tangents(kLinearLoss, {&tensor});
  }
  if (class_weight.has_value()) {
    no_tangents(kLinearLoss, {&*class_weight});
  }
  const Rest rest{&target, &class_weight, label_smoothing, ignore_index, reduction, chunk};
  // Lists of unequal length cannot be told apart behind this point; the backend's checks name them.
  const bool matched = pooled.size() == weights.size() && pooled.size() == biases.size() && !pooled.empty();
  if (matched && needs_graph(at::TensorList(tensors))) {
    const auto outputs = LinearLossFunction::apply(at::TensorList(tensors), &biases, &rest);
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch(pooled, weights, biases, exit_weights, rest);
}

// What the operator above is made of; by itself it has no derivative.
WithGradients linear_with_grad_autograd(at::TensorList pooled, at::TensorList weights, const Biases& biases,
                                        const Tensor& target, const Tensor& exit_weights,
                                        const OptionalTensor& class_weight, double label_smoothing,
                                        int64_t ignore_index, std::string_view reduction,
                                        std::optional<int64_t> chunk, const c10::List<bool>& wanted) {
  std::vector<Tensor> tensors(pooled.begin(), pooled.end());
  tensors.insert(tensors.end(), weights.begin(), weights.end());
  for (size_t e = 0; e < biases.size(); ++e) {
    const OptionalTensor bias = biases[e];
    tensors.push_back(bias.value_or(Tensor()));
  }
  tensors.push_back(exit_weights);
  tensors.push_back(class_weight.value_or(Tensor()));
  for (const Tensor& tensor : tensors) {
    no_tangents("linear_joint_cross_entropy_with_grad", {&tensor});
    TORCH_CHECK(!needs_graph({&tensor}), "aep::linear_joint_cross_entropy_with_grad: not differentiable (call "
                "linear_joint_cross_entropy), got an argument with requires_grad=True");
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  const Rest rest{&target, &class_weight, label_smoothing, ignore_index, reduction, chunk};
  return dispatch_with_grad(pooled, weights, biases, exit_weights, rest, wanted);
}

// As torch does for `linear`: everything that enters a product to the autocast dtype, float64 excepted.
Losses loss_autocast(at::TensorList pooled, at::TensorList weights, const Biases& biases, const Tensor& target,
                     const Tensor& exit_weights, const OptionalTensor& class_weight, double label_smoothing,
                     int64_t ignore_index, std::string_view reduction, std::optional<int64_t> chunk) {
  const auto device = pooled.empty() ? at::kCPU : pooled[0].device().type();
  c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto type = at::autocast::get_autocast_dtype(device);
  Biases cast;
  for (size_t e = 0; e < biases.size(); ++e) {
    const OptionalTensor bias = biases[e];
    cast.push_back(at::autocast::cached_cast(type, bias, device));
  }
  const Rest rest{&target, &class_weight, label_smoothing, ignore_index, reduction, chunk};
  return dispatch(at::autocast::cached_cast(type, pooled, device), at::autocast::cached_cast(type, weights, device),
                  cast, exit_weights, rest);
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) {
  m.impl("linear_joint_cross_entropy", &aep::linear_loss_autograd);
  m.impl("linear_joint_cross_entropy_with_grad", &aep::linear_with_grad_autograd);
}
TORCH_LIBRARY_IMPL(aep, AutocastCPU, m) { m.impl("linear_joint_cross_entropy", &aep::loss_autocast); }
TORCH_LIBRARY_IMPL(aep, AutocastCUDA, m) { m.impl("linear_joint_cross_entropy", &aep::loss_autocast); }
