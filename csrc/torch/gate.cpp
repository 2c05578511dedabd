// gate: common part of the backends; not differentiable.
#include <torch/library.h>

#include "autograd.h"
#include "prepare.h"

namespace aep {

using OptionalTensor = std::optional<Tensor>;
using GateResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

kernels::GateCriterion kernel_criterion(std::string_view criterion) {
  if (criterion == "confidence") return kernels::GateCriterion::confidence;
  if (criterion == "entropy") return kernels::GateCriterion::entropy;
  if (criterion == "margin") return kernels::GateCriterion::margin;
  return criterion == "patience" ? kernels::GateCriterion::patience : kernels::GateCriterion::vote;
}

namespace {

// A matrix whose rows are dense.
Tensor dense_rows(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

// Every row laid out as in `like`, so that rows can be copied as bytes; rows may lie anywhere.
Tensor rows_like(const Tensor& tensor, const Tensor& like, at::MemoryFormat format) {
  return tensor.strides().slice(1) == like.strides().slice(1) ? tensor : tensor.contiguous(format);
}

}  // namespace

GateCall prepare_gate(const Tensor& features, const Tensor& running, const Tensor& indices, const Tensor& state,
                      const Tensor& exit_logits, const GateScalars& scalars, std::string_view criterion,
                      std::string_view criterion_on, bool enabled, bool last) {
  constexpr const char* op = "gate";
  check_gate(features, running, indices, state, exit_logits, criterion, criterion_on);
  const at::Device device = exit_logits.device();
  check_scalar(op, "weight_sum", scalars.weight_sum_tensor, scalars.weight_sum, device, false);
  check_scalar(op, "weight", scalars.weight_tensor, scalars.weight, device, false);
  check_scalar(op, "threshold", scalars.threshold_tensor, scalars.threshold, device, false);
  check_scalar(op, "temperature", scalars.temperature_tensor, scalars.temperature, device, true);

  const auto type = exit_logits.scalar_type();
  GateCall call;
  auto& p = call.params;
  p.n = exit_logits.size(0), p.K = exit_logits.size(1), p.S = state.size(1);
  const auto format = features.suggest_memory_format();
  call.features = fresh(features.sizes(), features.scalar_type(), features, format);
  call.running = fresh({p.n, p.K}, running.scalar_type(), features);
  call.indices = fresh({p.n}, at::kLong, features);
  call.state = fresh({p.n, p.S}, at::kLong, features);
  call.stats = fresh({p.n, 3}, at::kFloat, features);
  call.argmax = fresh({p.n}, at::kLong, features);
  call.weight_sum = fresh({}, accumulate_type(type), features);
  call.count = fresh({}, at::kLong, features);
  auto& keep = call.keep;
  keep[0] = rows_like(features, call.features, format);
  keep[1] = dense_rows(running);
  keep[2] = dense_rows(exit_logits);
  keep[3] = indices.contiguous();
  keep[4] = state.contiguous();
  p.features = keep[0].const_data_ptr();
  p.running = keep[1].const_data_ptr();
  p.exit_logits = keep[2].const_data_ptr();
  p.indices = keep[3].const_data_ptr<int64_t>();
  p.state = keep[4].const_data_ptr<int64_t>();
  p.features_out = call.features.mutable_data_ptr();
  p.running_out = call.running.mutable_data_ptr();
  p.indices_out = call.indices.mutable_data_ptr<int64_t>();
  p.state_out = call.state.mutable_data_ptr<int64_t>();
  p.stats_out = call.stats.mutable_data_ptr<float>();
  p.argmax_out = call.argmax.mutable_data_ptr<int64_t>();
  p.weight_sum_out = call.weight_sum.mutable_data_ptr();
  p.count_out = call.count.mutable_data_ptr<int64_t>();
  p.dtype = kernel_type(type);
  p.running_dtype = kernel_type(running.scalar_type());
  p.running_stride_n = keep[1].stride(0), p.logits_stride_n = keep[2].stride(0);
  const auto size = static_cast<int64_t>(features.element_size());
  p.feature_row_bytes = p.n > 0 ? features.numel() / p.n * size : 0;
  p.feature_stride_bytes = keep[0].stride(0) * size;
  p.feature_out_stride_bytes = call.features.stride(0) * size;
  p.weight_sum = kernel_scalar(scalars.weight_sum_tensor, scalars.weight_sum, type, keep[5]);
  p.weight = kernel_scalar(scalars.weight_tensor, scalars.weight, type, keep[6]);
  p.threshold = kernel_scalar(scalars.threshold_tensor, scalars.threshold, type, keep[7]);
  p.temperature = kernel_scalar(scalars.temperature_tensor, scalars.temperature, type, keep[8]);
  p.criterion = kernel_criterion(criterion);
  p.criterion_on = criterion_on == "ensemble" ? kernels::CriterionOn::ensemble : kernels::CriterionOn::exit;
  p.enabled = enabled, p.last = last;
  return call;
}

namespace {

GateResult gate_autograd(const Tensor& features, const Tensor& running, const Tensor& indices, const Tensor& state,
                         const Tensor& exit_logits, double weight_sum, double weight, double threshold,
                         double temperature, std::string_view criterion, std::string_view criterion_on, bool enabled, bool last,
                         const OptionalTensor& weight_sum_tensor, const OptionalTensor& weight_tensor,
                         const OptionalTensor& threshold_tensor, const OptionalTensor& temperature_tensor) {
  static auto op = find_operator<GateResult(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, double, double,
      std::string_view, std::string_view, bool, bool, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&)>("aep::gate");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(features, running, indices, state, exit_logits, weight_sum, weight, threshold, temperature, criterion, criterion_on,
                 enabled, last, weight_sum_tensor, weight_tensor, threshold_tensor, temperature_tensor);
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) { m.impl("gate", &aep::gate_autograd); }
