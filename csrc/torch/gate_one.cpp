// gate_one_: one row in place; the part before the kernel, and autograd (not differentiable).
#include <torch/library.h>

#include <array>

#include "autograd.h"
#include "prepare.h"

namespace aep {

namespace {

constexpr const char* kOp = "gate_one_";

struct Bytes {
  const char* name;
  const char *begin, *end;
};

// From the first to the last element of one row.
Bytes bytes_of(const char* name, const Tensor& tensor) {
  const int64_t last = (tensor.numel() - 1) * (tensor.dim() == 2 ? tensor.stride(1) : 1);
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {name, begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

// No result shares memory with another or with the logits. It runs at every exit of one image.
void check_rows_apart(const std::array<Bytes, 4>& rows) {
  for (size_t i = 0; i + 1 < rows.size(); ++i) {
    for (size_t j = i + 1; j < rows.size(); ++j) {
      TORCH_CHECK_VALUE(rows[i].end <= rows[j].begin || rows[j].end <= rows[i].begin, "aep::", kOp, ": ", rows[i].name,
                        " must not share memory with ", rows[j].name, ", got overlapping memory");
    }
  }
}

}  // namespace

GateOneCall prepare_gate_one(const Tensor& running, const Tensor& stats, const Tensor& leaves,
                             const Tensor& exit_logits, double weight_sum, double weight, double threshold,
                             double temperature, std::string_view criterion, std::string_view criterion_on, bool enabled,
                             bool last) {
  check_gate_one(running, stats, leaves, exit_logits, criterion, criterion_on);
  const at::Device device = exit_logits.device();
  check_scalar(kOp, "weight_sum", std::nullopt, weight_sum, device, false);
  check_scalar(kOp, "weight", std::nullopt, weight, device, false);
  check_scalar(kOp, "threshold", std::nullopt, threshold, device, false);
  check_scalar(kOp, "temperature", std::nullopt, temperature, device, true);
  check_rows_apart({bytes_of("running", running), bytes_of("stats", stats), bytes_of("leaves", leaves),
                    bytes_of("exit_logits", exit_logits)});

  GateOneCall call;
  const int64_t classes = exit_logits.size(1);
  call.exit_logits = classes == 1 || exit_logits.stride(1) == 1 ? exit_logits : exit_logits.contiguous();
  auto& p = call.params;
  p.running = running.mutable_data_ptr();
  p.exit_logits = call.exit_logits.const_data_ptr();
  p.stats_out = stats.mutable_data_ptr<float>();
  p.leaves_out = leaves.mutable_data_ptr<bool>();
  p.dtype = kernel_type(exit_logits.scalar_type());
  p.running_dtype = kernel_type(running.scalar_type());
  p.K = classes;
  p.weight_sum = weight_sum, p.weight = weight, p.threshold = threshold, p.temperature = temperature;
  p.criterion = kernel_criterion(criterion);
  p.criterion_on = criterion_on == "ensemble" ? kernels::CriterionOn::ensemble : kernels::CriterionOn::exit;
  p.enabled = enabled, p.last = last;
  return call;
}

namespace {

void gate_one_autograd(const Tensor& running, const Tensor& stats, const Tensor& leaves, const Tensor& exit_logits,
                       double weight_sum, double weight, double threshold, double temperature, std::string_view criterion,
                       std::string_view criterion_on, bool enabled, bool last) {
  static auto op =
      find_operator<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, double, double,
                         std::string_view, std::string_view, bool, bool)>("aep::gate_one_");
  no_tangents(kOp, {&running, &stats, &exit_logits});
  TORCH_CHECK_VALUE(!needs_graph({&running, &stats, &exit_logits}), "aep::", kOp,
                    ": arguments must not require a gradient, got requires_grad=True");
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(running, stats, leaves, exit_logits, weight_sum, weight, threshold, temperature, criterion, criterion_on, enabled, last);
  }
  mark_written({&running, &stats, &leaves});
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) { m.impl("gate_one_", &aep::gate_one_autograd); }
TORCH_LIBRARY_IMPL(aep, ADInplaceOrView, m) { m.impl("gate_one_", &aep::gate_one_autograd); }
