// What the backends of an operator share: checks, allocation, and the kernels' parameters. A backend calls prepare_x(),
// runs the kernels on the parameters, and returns the tensors. Each struct keeps alive whatever its parameters point
// to.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <vector>

#include "checks.h"
#include "kernels/params.h"
#include "results.h"

namespace aep {

inline kernels::DType kernel_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return kernels::DType::f32;
    case at::kDouble: return kernels::DType::f64;
    case at::kBFloat16: return kernels::DType::bf16;
    case at::kHalf: return kernels::DType::f16;
    default: TORCH_INTERNAL_ASSERT(false, "no kernel type for ", type);
  }
}

// A small operand in the accumulation dtype, dense.
inline Tensor accumulated(const Tensor& tensor, at::ScalarType storage) {
  const auto type = accumulate_type(storage);
  return tensor.scalar_type() == type && tensor.is_contiguous() ? tensor : tensor.to(type).contiguous();
}

// A scalar operand; `keep` holds the tensor that the result points to.
inline kernels::Scalar kernel_scalar(const std::optional<Tensor>& tensor, double value, at::ScalarType storage,
                                     Tensor& keep) {
  if (!tensor.has_value()) {
    return {nullptr, value};
  }
  keep = accumulated(*tensor, storage);
  return {keep.const_data_ptr(), 0.0};
}

struct PoolCall {
  Tensor output;
  kernels::GlobalAvgPoolParams params{};
};
PoolCall prepare_pool(const Tensor& features);
// Checked features into `output`, whose rows lie `out_stride_n` elements apart.
kernels::GlobalAvgPoolParams pool_params(const Tensor& features, void* output, int64_t out_stride_n);

struct HeadCall {
  Tensor logits, pooled;
  c10::SmallVector<kernels::GlobalAvgPoolParams, 8> pools;
  c10::SmallVector<int64_t, 8> offsets;  // of the exits' pooled features
};
HeadCall prepare_head(at::TensorList features, at::TensorList weights, const Biases& biases);
// After the pools: the product into the exit's slice of `logits`, for the kernels of few rows; nothing where the
// weight's strides are not theirs.
std::optional<kernels::SmallLinearParams> small_linear_params(const HeadCall& call, size_t exit, const Tensor& weight,
                                                              const std::optional<Tensor>& bias);
// The same by ATen.
void finish_exit(const HeadCall& call, size_t exit, const Tensor& weight, const std::optional<Tensor>& bias);

struct EnsembleCall {
  Tensor output, weights;
  kernels::EnsembleParams params{};
};
EnsembleCall prepare_ensemble(const Tensor& exit_logits, const Tensor& weights);

struct EnsembleBackwardCall {
  Tensor output, operand, grad, partials;
  kernels::EnsembleBackwardParams params{};
};
EnsembleBackwardCall prepare_ensemble_backward_logits(const Tensor& grad, const Tensor& weights);
EnsembleBackwardCall prepare_ensemble_backward_weights(const Tensor& grad, const Tensor& exit_logits);

struct EnsembleStatsCall {
  EnsembleCall ensemble;
  Tensor stats, argmax;
  std::array<Tensor, 2> keep;
  kernels::EnsembleStatsParams params{};
};
EnsembleStatsCall prepare_ensemble_stats(const Tensor& exit_logits, const Tensor& weights, double normalizer,
                                         double temperature, const std::optional<Tensor>& normalizer_tensor,
                                         const std::optional<Tensor>& temperature_tensor);

// What follows the tensors in the schemas of the loss; `name` is the function that errors name.
struct LossOptions {
  const std::optional<Tensor>& class_weight;
  double label_smoothing;
  int64_t ignore_index;
  std::string_view reduction;
  const std::optional<Tensor>&prefix_weights, &output_weights;
  double distillation, temperature;
  bool detach_prefix;
  std::string_view name;

  const char* op() const { return name == "joint_cross_entropy" ? "joint_cross_entropy" : "multi_exit_loss"; }
  bool terms() const { return prefix_weights.has_value() || distillation > 0; }
};
#define AEP_LOSS_ARGUMENTS                                                                                        \
  const std::optional<Tensor>&class_weight, double label_smoothing, int64_t ignore_index,                         \
      std::string_view reduction, const std::optional<Tensor>&prefix_weights,                                     \
      const std::optional<Tensor>&output_weights, double distillation, double temperature, bool detach_prefix,    \
      std::string_view name
#define AEP_LOSS_OPTIONS                                                                                          \
  LossOptions { class_weight, label_smoothing, ignore_index, reduction, prefix_weights, output_weights,           \
        distillation, temperature, detach_prefix, name }
#define AEP_LOSS_VALUES(o)                                                                                        \
  (o).class_weight, (o).label_smoothing, (o).ignore_index, (o).reduction, (o).prefix_weights, (o).output_weights, \
      (o).distillation, (o).temperature, (o).detach_prefix, (o).name

struct LossCall {
  Tensor loss, losses[3], kept;  // results; losses that are not asked for are empty
  Tensor row_losses[3], target, class_weight, output_weights, weights[2];
  kernels::MultiExitLossParams params{};
  kernels::MultiExitLossReduceParams reduce{};
};
LossCall prepare_loss(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                      const LossOptions& options);

// In the autograd kernels: raises for gradients and tangents that the loss does not have.
void refuse_gradients(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                      const LossOptions& options);

// The gradient of what a LossCall has kept; or of its loss, in the same pass, in a tensor of its own or in the place of
// the logits.
struct LossGradCall {
  LossCall loss;
  Tensor grad_logits, grad_loss, grad_losses[3];
  kernels::MultiExitLossGradParams params{};
};
LossGradCall prepare_loss_backward(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                   const Tensor& kept, const std::optional<Tensor>& grad_loss,
                                   const std::optional<Tensor> (&grad_losses)[3], const LossOptions& options);
LossGradCall prepare_loss_grad(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                               const LossOptions& options, bool in_place);

struct LossGradScaleCall {
  Tensor scale;
  kernels::LossGradScaleParams params{};
};
LossGradScaleCall prepare_loss_grad_scale(const Tensor& grad_logits, const Tensor& scale, double divisor);

struct SubsetCall {
  Tensor counts, weights;
  kernels::SubsetCorrectParams params{};
};
// The counts are not zeroed yet: labels are checked first.
SubsetCall prepare_subsets(const Tensor& exit_logits, const Tensor& weights, const Tensor& target);

struct GateScalars {
  double weight_sum, weight, threshold, temperature;
  const std::optional<Tensor>&weight_sum_tensor, &weight_tensor, &threshold_tensor, &temperature_tensor;
};
struct GateCall {
  Tensor features, running, indices, state, stats, argmax, weight_sum, count;  // results
  std::array<Tensor, 9> keep;                                                  // dense inputs, scalars
  kernels::GateParams params{};                                                // scratch is the backend's
};
GateCall prepare_gate(const Tensor& features, const Tensor& running, const Tensor& indices, const Tensor& state,
                      const Tensor& exit_logits, const GateScalars& scalars, std::string_view criterion,
                      std::string_view criterion_on, bool enabled, bool last);

struct GateOneCall {
  Tensor exit_logits;  // dense
  kernels::GateOneParams params{};
};
GateOneCall prepare_gate_one(const Tensor& running, const Tensor& stats, const Tensor& leaves,
                             const Tensor& exit_logits, double weight_sum, double weight, double threshold,
                             double temperature, std::string_view criterion, std::string_view criterion_on, bool enabled,
                             bool last);

// The name, checked before.
kernels::GateCriterion kernel_criterion(std::string_view criterion);

}  // namespace aep
