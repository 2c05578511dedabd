// The operators on the CPU: each prepares its call, shares the work out over threads, and returns.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <vector>

#include "../prepare.h"
#include "huge_pages.h"
#include "kernels/cpu/api.h"

namespace aep {

namespace {

namespace cpu = kernels::cpu;
using OptionalTensor = std::optional<Tensor>;

// Elements a thread should at least get: a parallel region costs about a microsecond, and far more on busy cores.
constexpr int64_t kGrain = 32768;

// Items per thread when one item touches `elements` numbers.
int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)); }

std::tuple<Tensor, Tensor> multi_exit_linear_head(at::TensorList features, at::TensorList weights,
                                                  const Biases& biases) {
  const HeadCall call = prepare_head(features, weights, biases);
  for (const auto& p : call.pools) {
    at::parallel_for(0, p.N * p.C, grain(p.H * p.W),
                     [&](int64_t begin, int64_t end) { cpu::global_avg_pool(p, begin, end); });
  }
  finish_head(call, weights, biases);
  return {call.logits, call.pooled};
}

Tensor ensemble(const Tensor& exit_logits, const Tensor& weights) {
  const EnsembleCall call = prepare_ensemble("ensemble", exit_logits, weights);
  const auto& p = call.params;
  at::parallel_for(0, p.N, grain(p.E * p.K), [&](int64_t begin, int64_t end) { cpu::ensemble(p, begin, end); });
  return call.output;
}

Tensor ensemble_backward_logits(const Tensor& grad, const Tensor& weights) {
  const EnsembleBackwardCall call = prepare_ensemble_backward_logits(grad, weights);
  const auto& p = call.params;
  at::parallel_for(0, p.N, grain(p.E * p.K),
                   [&](int64_t begin, int64_t end) { cpu::ensemble_backward_logits(p, begin, end); });
  return call.output;
}

Tensor ensemble_backward_weights(const Tensor& grad, const Tensor& exit_logits) {
  const EnsembleBackwardCall call = prepare_ensemble_backward_weights(grad, exit_logits);
  const auto& p = call.params;
  at::parallel_for(0, cpu::ensemble_backward_chunks(p.N), grain(kernels::kEnsembleChunkRows * p.E * p.K),
                   [&](int64_t begin, int64_t end) { cpu::ensemble_backward_weights(p, begin, end); });
  cpu::ensemble_backward_weights_finish(p);
  return call.output;
}

std::tuple<Tensor, Tensor, Tensor> ensemble_stats(const Tensor& exit_logits, const Tensor& weights, double normalizer,
                                                  double temperature, const OptionalTensor& normalizer_tensor,
                                                  const OptionalTensor& temperature_tensor) {
  const EnsembleStatsCall call =
      prepare_ensemble_stats(exit_logits, weights, normalizer, temperature, normalizer_tensor, temperature_tensor);
  const auto& p = call.params;
  at::parallel_for(0, p.ensemble.N, grain((p.ensemble.E + 2) * p.ensemble.K),
                   [&](int64_t begin, int64_t end) { cpu::ensemble_stats(p, begin, end); });
  return {call.ensemble.output, call.stats, call.argmax};
}

// Raises for the first label that is neither a class nor (if given) ignored, before anything is written.
void check_labels(const char* op, const Tensor& target, int64_t classes, const int64_t* ignore_index) {
  const auto* labels = target.const_data_ptr<int64_t>();
  const int64_t position = cpu::find_bad_label(labels, target.stride(0), target.size(0), classes, ignore_index);
  TORCH_CHECK_INDEX(position < 0, "aep::", op, ": target must be within 0..", classes - 1,
                    ignore_index ? " or ignore_index, got " : ", got ", labels[position * target.stride(0)],
                    " at position ", position);
}

std::tuple<Tensor, Tensor, Tensor> joint_cross_entropy(const Tensor& exit_logits, const Tensor& target,
                                                       const Tensor& exit_weights, const OptionalTensor& class_weight,
                                                       double label_smoothing, int64_t ignore_index,
                                                       std::string_view reduction) {
  const LossCall call =
      prepare_loss(exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction);
  const auto& p = call.params;
  check_labels("joint_cross_entropy", target, p.K, &ignore_index);
  at::parallel_for(0, p.E * p.N, grain(p.K),
                   [&](int64_t begin, int64_t end) { cpu::joint_cross_entropy(p, begin, end); });
  cpu::joint_cross_entropy_reduce(call.reduce);
  return {call.loss, call.exit_losses, call.kept};
}

Tensor joint_cross_entropy_backward(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                    const Tensor& kept, const OptionalTensor& grad_loss,
                                    const OptionalTensor& grad_exit_losses, const OptionalTensor& class_weight,
                                    double label_smoothing, int64_t ignore_index, std::string_view reduction) {
  const LossBackwardCall call = prepare_loss_backward(exit_logits, target, exit_weights, kept, grad_loss,
                                                      grad_exit_losses, class_weight, label_smoothing, ignore_index,
                                                      reduction);
  const auto& p = call.params;
  check_labels("joint_cross_entropy_backward", target, p.K, &ignore_index);
  advise_huge_pages(call.grad_logits);
  at::parallel_for(0, p.E * p.N, grain(p.K),
                   [&](int64_t begin, int64_t end) { cpu::joint_cross_entropy_backward(p, begin, end); });
  return call.grad_logits;
}

LossGradCall loss_and_gradient(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                               const OptionalTensor& class_weight, double label_smoothing, int64_t ignore_index,
                               std::string_view reduction, bool in_place) {
  LossGradCall call = prepare_loss_grad(exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index,
                                        reduction, in_place);
  const auto& p = call.params;
  check_labels("joint_cross_entropy", target, p.loss.K, &ignore_index);  // before the logits are overwritten
  if (!in_place) {
    advise_huge_pages(call.grad_logits);
  }
  cpu::joint_cross_entropy_denominator(call.loss.reduce);
  at::parallel_for(0, p.loss.E * p.loss.N, grain(p.loss.K),
                   [&](int64_t begin, int64_t end) { cpu::joint_cross_entropy_grad(p, begin, end); });
  cpu::joint_cross_entropy_reduce(call.loss.reduce);
  return call;
}

std::tuple<Tensor, Tensor, Tensor> joint_cross_entropy_with_grad(const Tensor& exit_logits, const Tensor& target,
                                                                 const Tensor& exit_weights,
                                                                 const OptionalTensor& class_weight,
                                                                 double label_smoothing, int64_t ignore_index,
                                                                 std::string_view reduction) {
  const LossGradCall call = loss_and_gradient(exit_logits, target, exit_weights, class_weight, label_smoothing,
                                              ignore_index, reduction, false);
  return {call.loss.loss, call.loss.exit_losses, call.grad_logits};
}

std::tuple<Tensor, Tensor> joint_cross_entropy_(Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                                                const OptionalTensor& class_weight, double label_smoothing,
                                                int64_t ignore_index, std::string_view reduction) {
  const LossGradCall call = loss_and_gradient(exit_logits, target, exit_weights, class_weight, label_smoothing,
                                              ignore_index, reduction, true);
  return {call.loss.loss, call.loss.exit_losses};
}

void joint_cross_entropy_scale_(Tensor& grad_logits, const Tensor& scale, double divisor) {
  const LossGradScaleCall call = prepare_loss_grad_scale(grad_logits, scale, divisor);
  const auto& p = call.params;
  at::parallel_for(0, p.E * p.N, grain(p.K), [&](int64_t begin, int64_t end) { cpu::loss_grad_scale(p, begin, end); });
}

Tensor subset_correct(const Tensor& exit_logits, const Tensor& weights, const Tensor& target) {
  const SubsetCall call = prepare_subsets(exit_logits, weights, target);
  const auto& p = call.params;
  check_labels("subset_correct", target, p.K, nullptr);
  // Every thread counts for itself; whole numbers add up to the same in any order.
  std::mutex mutex;
  const int64_t subsets = call.counts.size(0);
  at::parallel_for(0, p.N, std::max<int64_t>(64, grain(subsets * p.K)), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> counts(2 * subsets, 0);
    cpu::subset_correct(p, begin, end, counts.data());
    const std::lock_guard<std::mutex> lock(mutex);
    std::transform(counts.begin(), counts.end(), p.counts, p.counts, std::plus<int64_t>());
  });
  return call.counts;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate(
    const Tensor& features, const Tensor& running, const Tensor& indices, const Tensor& state,
    const Tensor& exit_logits, double weight_sum, double weight, double threshold, double temperature,
    const OptionalTensor& weight_sum_tensor, const OptionalTensor& weight_tensor,
    const OptionalTensor& threshold_tensor, const OptionalTensor& temperature_tensor, std::string_view policy,
    std::string_view on, bool enabled) {
  const GateScalars scalars{weight_sum,        weight,        threshold,        temperature,
                            weight_sum_tensor, weight_tensor, threshold_tensor, temperature_tensor};
  GateCall call = prepare_gate(features, running, indices, state, exit_logits, scalars, policy, on, enabled);
  auto& p = call.params;
  const Tensor scratch =
      at::empty({static_cast<int64_t>(cpu::gate_scratch_bytes(p.n))}, features.options().dtype(at::kByte));
  p.scratch = scratch.mutable_data_ptr();
  at::parallel_for(0, p.n, grain(2 * p.K), [&](int64_t begin, int64_t end) { cpu::gate_judge(p, begin, end); });
  cpu::gate_partition(p);
  at::parallel_for(0, p.n, grain(p.feature_row_bytes / 4 + 2 * p.K),
                   [&](int64_t begin, int64_t end) { cpu::gate_scatter(p, begin, end); });
  return {call.features, call.running, call.indices, call.state, call.stats, call.argmax, call.weight_sum, call.count};
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, CPU, m) {
  m.impl("multi_exit_linear_head", &aep::multi_exit_linear_head);
  m.impl("ensemble", &aep::ensemble);
  m.impl("ensemble_backward_logits", &aep::ensemble_backward_logits);
  m.impl("ensemble_backward_weights", &aep::ensemble_backward_weights);
  m.impl("ensemble_stats", &aep::ensemble_stats);
  m.impl("joint_cross_entropy", &aep::joint_cross_entropy);
  m.impl("joint_cross_entropy_backward", &aep::joint_cross_entropy_backward);
  m.impl("joint_cross_entropy_with_grad", &aep::joint_cross_entropy_with_grad);
  m.impl("joint_cross_entropy_", &aep::joint_cross_entropy_);
  m.impl("joint_cross_entropy_scale_", &aep::joint_cross_entropy_scale_);
  m.impl("subset_correct", &aep::subset_correct);
  m.impl("gate", &aep::gate);
}
