// The operators on CUDA: each prepares its call and launches on the current stream of the tensors' device. Nothing
// waits for the device, unless labels are to be checked (labels.h): else one out of range gives a NaN loss and no
// gradient, and is never counted as correct. Backwards leave the check to their forward.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../prepare.h"
#include "kernels/cuda/api.h"
#include "labels.h"

namespace aep {

namespace {

namespace cuda = kernels::cuda;
using OptionalTensor = std::optional<Tensor>;

// Makes the device of `tensor` current, and names its current stream.
struct OnDevice {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  explicit OnDevice(const Tensor& tensor) : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
};

Tensor global_avg_pool(const Tensor& features) {
  const PoolCall call = prepare_pool(features);
  const OnDevice device(features);
  C10_CUDA_CHECK(cuda::launch_global_avg_pool(call.params, device.stream));
  return call.output;
}

// Up to this many rows the products of all exits are one launch: reading the weights is all that takes time then, and a
// warp that holds a row more reads none of them again. Above, a matrix belongs to the tensor cores, so ATen has it.
// That is a call for each exit: what joins products of unequal length (at::_grouped_mm) takes bfloat16 alone and the
// weights of all exits in one tensor, which would have to be copied together first.
constexpr int64_t kSmallRows = 8;

std::tuple<Tensor, Tensor> multi_exit_linear_head(at::TensorList features, at::TensorList weights,
                                                  const Biases& biases) {
  const HeadCall call = prepare_head(features, weights, biases);
  const OnDevice device(call.pooled);
  C10_CUDA_CHECK(
      cuda::launch_global_avg_pools(call.pools.data(), static_cast<int64_t>(call.pools.size()), device.stream));
  c10::SmallVector<kernels::SmallLinearParams, 8> small;
  for (size_t e = 0; e < weights.size(); ++e) {
    const OptionalTensor bias = biases[e];
    std::optional<kernels::SmallLinearParams> layer;
    if (call.logits.size(1) <= kSmallRows) {
      layer = small_linear_params(call, e, weights[e], bias);
    }
    if (layer.has_value()) {
      small.push_back(*layer);
    } else {
      finish_exit(call, e, weights[e], bias);
    }
  }
  C10_CUDA_CHECK(cuda::launch_small_linears(small.data(), static_cast<int64_t>(small.size()), device.stream));
  return {call.logits, call.pooled};
}

Tensor ensemble(const Tensor& exit_logits, const Tensor& weights) {
  const EnsembleCall call = prepare_ensemble(exit_logits, weights);
  const OnDevice device(exit_logits);
  C10_CUDA_CHECK(cuda::launch_ensemble(call.params, device.stream));
  return call.output;
}

Tensor ensemble_backward_logits(const Tensor& grad, const Tensor& weights) {
  const EnsembleBackwardCall call = prepare_ensemble_backward_logits(grad, weights);
  const OnDevice device(grad);
  C10_CUDA_CHECK(cuda::launch_ensemble_backward(call.params, device.stream));
  return call.output;
}

Tensor ensemble_backward_weights(const Tensor& grad, const Tensor& exit_logits) {
  const EnsembleBackwardCall call = prepare_ensemble_backward_weights(grad, exit_logits);
  const OnDevice device(grad);
  C10_CUDA_CHECK(cuda::launch_ensemble_backward(call.params, device.stream));
  return call.output;
}

std::tuple<Tensor, Tensor, Tensor> ensemble_stats(const Tensor& exit_logits, const Tensor& weights, double normalizer,
                                                  double temperature, const OptionalTensor& normalizer_tensor,
                                                  const OptionalTensor& temperature_tensor) {
  const EnsembleStatsCall call =
      prepare_ensemble_stats(exit_logits, weights, normalizer, temperature, normalizer_tensor, temperature_tensor);
  const OnDevice device(exit_logits);
  C10_CUDA_CHECK(cuda::launch_ensemble_stats(call.params, device.stream));
  return {call.ensemble.output, call.stats, call.argmax};
}

using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

LossResult multi_exit_loss(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                           AEP_LOSS_ARGUMENTS) {
  const LossOptions options = AEP_LOSS_OPTIONS;
  const LossCall call = prepare_loss(exit_logits, target, exit_weights, options);
  const auto& p = call.params;
  const OnDevice device(exit_logits);
  if (target.dim() == 1) check_labels_if_asked(options.op(), target, p.K, &ignore_index);
  C10_CUDA_CHECK(cuda::launch_multi_exit_loss(p, device.stream));
  C10_CUDA_CHECK(cuda::launch_multi_exit_loss_reduce(call.reduce, device.stream));
  return {call.loss, call.losses[0], call.losses[1], call.losses[2], call.kept};
}

Tensor multi_exit_loss_backward(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                const Tensor& kept, const OptionalTensor& grad_loss,
                                const OptionalTensor& grad_exit_losses, const OptionalTensor& grad_prefix_losses,
                                const OptionalTensor& grad_distillation_losses, AEP_LOSS_ARGUMENTS) {
  const OptionalTensor grad_losses[3] = {grad_exit_losses, grad_prefix_losses, grad_distillation_losses};
  const LossGradCall call =
      prepare_loss_backward(exit_logits, target, exit_weights, kept, grad_loss, grad_losses, AEP_LOSS_OPTIONS);
  const auto& p = call.params;
  const OnDevice device(exit_logits);
  C10_CUDA_CHECK(cuda::launch_multi_exit_loss_grad(p, device.stream));
  return call.grad_logits;
}

LossGradCall loss_and_gradient(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                               const LossOptions& options, bool in_place) {
  LossGradCall call = prepare_loss_grad(exit_logits, target, exit_weights, options, in_place);
  const auto& p = call.params;
  const int64_t ignore_index = options.ignore_index;
  const OnDevice device(exit_logits);
  // Before the logits are overwritten.
  if (target.dim() == 1) check_labels_if_asked(options.op(), target, p.loss.K, &ignore_index);
  C10_CUDA_CHECK(cuda::launch_multi_exit_loss_divisors(call.loss.reduce, device.stream));
  C10_CUDA_CHECK(cuda::launch_multi_exit_loss_grad(p, device.stream));
  C10_CUDA_CHECK(cuda::launch_multi_exit_loss_reduce(call.loss.reduce, device.stream));
  return call;
}

LossResult multi_exit_loss_with_grad(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                     AEP_LOSS_ARGUMENTS) {
  const LossGradCall call = loss_and_gradient(exit_logits, target, exit_weights, AEP_LOSS_OPTIONS, false);
  return {call.loss.loss, call.loss.losses[0], call.loss.losses[1], call.loss.losses[2], call.grad_logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> multi_exit_loss_(Tensor& exit_logits, const Tensor& target,
                                                            const Tensor& exit_weights, AEP_LOSS_ARGUMENTS) {
  const LossGradCall call = loss_and_gradient(exit_logits, target, exit_weights, AEP_LOSS_OPTIONS, true);
  return {call.loss.loss, call.loss.losses[0], call.loss.losses[1], call.loss.losses[2]};
}

void multi_exit_loss_scale_(Tensor& grad_logits, const Tensor& scale, double divisor) {
  const LossGradScaleCall call = prepare_loss_grad_scale(grad_logits, scale, divisor);
  const OnDevice device(grad_logits);
  C10_CUDA_CHECK(cuda::launch_loss_grad_scale(call.params, device.stream));
}

void run(const SubsetCall& call, const Tensor& target) {
  const OnDevice device(call.counts);
  check_labels_if_asked("subset_correct", target, call.params.K, nullptr);
  call.counts.zero_();
  C10_CUDA_CHECK(cuda::launch_subset_correct(call.params, device.stream));
}

Tensor subset_correct(const Tensor& exit_logits, const Tensor& weights, const Tensor& target) {
  const SubsetCall call = prepare_subsets(exit_logits, weights, target);
  run(call, target);
  return call.counts;
}

void run(GateCall& call) {
  const OnDevice device(call.features);
  const auto bytes = static_cast<int64_t>(cuda::gate_scratch_bytes(call.params.n));
  const Tensor scratch = fresh({bytes}, at::kByte, call.features);
  call.params.scratch = scratch.mutable_data_ptr();
  C10_CUDA_CHECK(cuda::launch_gate(call.params, device.stream));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate(
    const Tensor& features, const Tensor& running, const Tensor& indices, const Tensor& state,
    const Tensor& exit_logits, double weight_sum, double weight, double threshold, double temperature,
    std::string_view criterion, std::string_view criterion_on, bool enabled, bool last,
    const OptionalTensor& weight_sum_tensor,
    const OptionalTensor& weight_tensor, const OptionalTensor& threshold_tensor,
    const OptionalTensor& temperature_tensor) {
  const GateScalars scalars{weight_sum,        weight,        threshold,        temperature,
                            weight_sum_tensor, weight_tensor, threshold_tensor, temperature_tensor};
  GateCall call =
      prepare_gate(features, running, indices, state, exit_logits, scalars, criterion, criterion_on, enabled, last);
  run(call);
  return {call.features, call.running, call.indices, call.state, call.stats, call.argmax, call.weight_sum, call.count};
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, CUDA, m) {
  m.impl("global_avg_pool", &aep::global_avg_pool);
  m.impl("multi_exit_linear_head", &aep::multi_exit_linear_head);
  m.impl("ensemble", &aep::ensemble);
  m.impl("ensemble_backward_logits", &aep::ensemble_backward_logits);
  m.impl("ensemble_backward_weights", &aep::ensemble_backward_weights);
  m.impl("ensemble_stats", &aep::ensemble_stats);
  m.impl("multi_exit_loss", &aep::multi_exit_loss);
  m.impl("multi_exit_loss_backward", &aep::multi_exit_loss_backward);
  m.impl("multi_exit_loss_with_grad", &aep::multi_exit_loss_with_grad);
  m.impl("multi_exit_loss_", &aep::multi_exit_loss_);
  m.impl("multi_exit_loss_scale_", &aep::multi_exit_loss_scale_);
  m.impl("subset_correct", &aep::subset_correct);
  m.impl("gate", &aep::gate);
}
