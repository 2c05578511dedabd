// The operators on the CPU: each prepares its call, shares the work out over threads, and returns.
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "../prepare.h"
#include "kernels/cpu/api.h"
#include "share.h"

namespace aep {

namespace {

namespace cpu = kernels::cpu;
using OptionalTensor = std::optional<Tensor>;

// Samples that a thread of subset_correct should at least get: a call of the kernel has a fixed cost of its own.
constexpr int64_t kSubsetGrain = 64;

Tensor global_avg_pool(const Tensor& features) {
  PoolCall call = prepare_pool(features);
  const auto& p = call.params;
  share(p.N * p.C, p.H * p.W, [&](int64_t begin, int64_t end) { cpu::global_avg_pool(p, begin, end); });
  return std::move(call.output);
}

// The pools of all exits in one parallel region. Threads share the elements of the maps; a channel belongs to the thread
// that has its first element.
void pool_exits(const HeadCall& call) {
  int64_t total = 0;
  for (const auto& p : call.pools) total += p.N * p.C * p.H * p.W;
  share(total, 1, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const auto& p : call.pools) {
      const int64_t size = p.H * p.W, items = p.N * p.C;
      const auto item = [&](int64_t element) {
        return std::clamp<int64_t>((element - first + size - 1) / size, 0, items);
      };
      if (end > first && begin < first + items * size) cpu::global_avg_pool(p, item(begin), item(end));
      first += items * size;
    }
  });
}

// Up to this many multiply-adds of an exit the product is our own: a call of BLAS and the views it needs cost 5 us, as
// much as 150,000 multiply-adds of our kernel (measured on one core with AVX-512). Above, it is ATen's.
constexpr int64_t kSmallProduct = 1 << 18;

bool small_product(const HeadCall& call, size_t e, const Tensor& weight, const OptionalTensor& bias) {
  const auto& pool = call.pools[e];
  if (pool.N * pool.C * weight.size(0) > kSmallProduct) return false;
  const auto p = small_linear_params(call, e, weight, bias);
  if (!p.has_value()) return false;
  cpu::small_linear(*p, 0, p->N);
  return true;
}

std::tuple<Tensor, Tensor> multi_exit_linear_head(at::TensorList features, at::TensorList weights,
                                                  const Biases& biases) {
  HeadCall call = prepare_head(features, weights, biases);
  pool_exits(call);
  for (size_t e = 0; e < weights.size(); ++e) {
    const OptionalTensor bias = biases[e];
    if (!small_product(call, e, weights[e], bias)) finish_exit(call, e, weights[e], bias);
  }
  return {std::move(call.logits), std::move(call.pooled)};
}

void run(const kernels::EnsembleParams& p) {
  share(p.N, p.E * p.K, [&](int64_t begin, int64_t end) { cpu::ensemble(p, begin, end); });
}

Tensor ensemble(const Tensor& exit_logits, const Tensor& weights) {
  EnsembleCall call = prepare_ensemble(exit_logits, weights);
  run(call.params);
  return std::move(call.output);
}

Tensor ensemble_backward_logits(const Tensor& grad, const Tensor& weights) {
  const EnsembleBackwardCall call = prepare_ensemble_backward_logits(grad, weights);
  const auto& p = call.params;
  share(p.N, p.E * p.K, [&](int64_t begin, int64_t end) { cpu::ensemble_backward_logits(p, begin, end); });
  return call.output;
}

Tensor ensemble_backward_weights(const Tensor& grad, const Tensor& exit_logits) {
  const EnsembleBackwardCall call = prepare_ensemble_backward_weights(grad, exit_logits);
  const auto& p = call.params;
  share(cpu::ensemble_backward_chunks(p.N), kernels::kEnsembleChunkRows * p.E * p.K,
        [&](int64_t begin, int64_t end) { cpu::ensemble_backward_weights(p, begin, end); });
  cpu::ensemble_backward_weights_finish(p);
  return call.output;
}

void run(const kernels::EnsembleStatsParams& p) {
  share(p.ensemble.N, (p.ensemble.E + 2) * p.ensemble.K,
        [&](int64_t begin, int64_t end) { cpu::ensemble_stats(p, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> ensemble_stats(const Tensor& exit_logits, const Tensor& weights, double normalizer,
                                                  double temperature, const OptionalTensor& normalizer_tensor,
                                                  const OptionalTensor& temperature_tensor) {
  EnsembleStatsCall call =
      prepare_ensemble_stats(exit_logits, weights, normalizer, temperature, normalizer_tensor, temperature_tensor);
  run(call.params);
  return {std::move(call.ensemble.output), std::move(call.stats), std::move(call.argmax)};
}

using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

LossResult multi_exit_loss(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                           AEP_LOSS_ARGUMENTS) {
  const LossOptions options = AEP_LOSS_OPTIONS;
  const LossCall call = prepare_loss(exit_logits, target, exit_weights, options);
  const auto& p = call.params;
  if (target.dim() == 1) check_labels(options.op(), target, p.K, &ignore_index);
  share(p.N, p.E * p.K, [&](int64_t begin, int64_t end) { cpu::multi_exit_loss(p, begin, end); });
  cpu::multi_exit_loss_reduce(call.reduce);
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
  if (target.dim() == 1) check_labels("multi_exit_loss_backward", target, p.loss.K, &ignore_index);
  share(p.loss.N, p.loss.E * p.loss.K, [&](int64_t begin, int64_t end) { cpu::multi_exit_loss_grad(p, begin, end); });
  return call.grad_logits;
}

LossGradCall loss_and_gradient(const Tensor& exit_logits, const Tensor& target, const Tensor& exit_weights,
                               const LossOptions& options, bool in_place) {
  LossGradCall call = prepare_loss_grad(exit_logits, target, exit_weights, options, in_place);
  const auto& p = call.params;
  const int64_t ignore_index = options.ignore_index;
  // Before the logits are overwritten.
  if (target.dim() == 1) check_labels(options.op(), target, p.loss.K, &ignore_index);
  cpu::multi_exit_loss_divisors(call.loss.reduce);
  share(p.loss.N, p.loss.E * p.loss.K, [&](int64_t begin, int64_t end) { cpu::multi_exit_loss_grad(p, begin, end); });
  cpu::multi_exit_loss_reduce(call.loss.reduce);
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
  const auto& p = call.params;
  share(p.E * p.N, p.K, [&](int64_t begin, int64_t end) { cpu::loss_grad_scale(p, begin, end); });
}

void run(const SubsetCall& call, const Tensor& target) {
  const auto& p = call.params;
  check_labels("subset_correct", target, p.K, nullptr);
  const int64_t numbers = call.counts.numel();
  std::fill_n(p.counts, numbers, 0);
  // Every thread counts for itself; whole numbers add up to the same in any order.
  std::mutex mutex;
  share(p.N, std::min(numbers / 2 * p.K, kGrain / kSubsetGrain), [&](int64_t begin, int64_t end) {
    if (begin == 0 && end == p.N) return cpu::subset_correct(p, begin, end, p.counts);
    std::vector<int64_t> counts(numbers, 0);
    cpu::subset_correct(p, begin, end, counts.data());
    const std::lock_guard<std::mutex> lock(mutex);
    std::transform(counts.begin(), counts.end(), p.counts, p.counts, std::plus<int64_t>());
  });
}

Tensor subset_correct(const Tensor& exit_logits, const Tensor& weights, const Tensor& target) {
  SubsetCall call = prepare_subsets(exit_logits, weights, target);
  run(call, target);
  return std::move(call.counts);
}

void run(kernels::GateParams& p) {
  const size_t bytes = cpu::gate_scratch_bytes(p.n);
  alignas(8) char few[4096];
  const std::unique_ptr<char[]> many(bytes > sizeof(few) ? new char[bytes] : nullptr);
  p.scratch = many ? many.get() : few;
  share(p.n, 2 * p.K, [&](int64_t begin, int64_t end) { cpu::gate_judge(p, begin, end); });
  cpu::gate_partition(p);
  share(p.n, p.feature_row_bytes / 4 + 2 * p.K,
        [&](int64_t begin, int64_t end) { cpu::gate_scatter(p, begin, end); });
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
  run(call.params);
  return {std::move(call.features), std::move(call.running), std::move(call.indices),    std::move(call.state),
          std::move(call.stats),    std::move(call.argmax),  std::move(call.weight_sum), std::move(call.count)};
}

void gate_one_(const Tensor& running, const Tensor& stats, const Tensor& leaves, const Tensor& exit_logits,
               double weight_sum, double weight, double threshold, double temperature, std::string_view criterion,
               std::string_view criterion_on, bool enabled, bool last) {
  cpu::gate_one(prepare_gate_one(running, stats, leaves, exit_logits, weight_sum, weight, threshold, temperature,
                                 criterion, criterion_on, enabled, last)
                    .params);
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, CPU, m) {
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
  m.impl("gate_one_", &aep::gate_one_);
}
