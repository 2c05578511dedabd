// linear_joint_cross_entropy on the CPU.
#include "../linear_loss.h"

#include <torch/library.h>

#include "kernels/cpu/api.h"
#include "share.h"

namespace aep {

namespace {

namespace cpu = kernels::cpu;
using OptionalTensor = std::optional<Tensor>;

class CpuLossKernels final : public LossKernels {
 public:
  void labels(const Tensor& target, int64_t classes, int64_t ignore_index) const override {
    check_labels("linear_joint_cross_entropy", target, classes, &ignore_index);
  }
  void divisors(const kernels::MultiExitLossReduceParams& p) const override {
    cpu::multi_exit_loss_divisors(p);
  }
  void losses(const kernels::MultiExitLossParams& p) const override {
    share(p.N, p.E * p.K, [&](int64_t begin, int64_t end) { cpu::multi_exit_loss(p, begin, end); });
  }
  void gradient(const kernels::MultiExitLossGradParams& p) const override {
    share(p.loss.N, p.loss.E * p.loss.K,
          [&](int64_t begin, int64_t end) { cpu::multi_exit_loss_grad(p, begin, end); });
  }
  void reduce(const kernels::MultiExitLossReduceParams& p) const override { cpu::multi_exit_loss_reduce(p); }
};

std::tuple<Tensor, Tensor> linear_joint_cross_entropy(at::TensorList pooled, at::TensorList weights,
                                                      const Biases& biases, const Tensor& target,
                                                      const Tensor& exit_weights, const OptionalTensor& class_weight,
                                                      double label_smoothing, int64_t ignore_index,
                                                      std::string_view reduction, std::optional<int64_t> chunk) {
  const auto [loss, exit_losses, none] = linear_loss({pooled, weights, biases, target, exit_weights, class_weight,
                                                      label_smoothing, ignore_index, reduction, chunk},
                                                     nullptr, CpuLossKernels());
  return {loss, exit_losses};
}

LinearLossResult linear_joint_cross_entropy_with_grad(at::TensorList pooled, at::TensorList weights,
                                                      const Biases& biases, const Tensor& target,
                                                      const Tensor& exit_weights, const OptionalTensor& class_weight,
                                                      double label_smoothing, int64_t ignore_index,
                                                      std::string_view reduction, std::optional<int64_t> chunk,
                                                      const c10::List<bool>& wanted) {
  return linear_loss({pooled, weights, biases, target, exit_weights, class_weight, label_smoothing, ignore_index,
                      reduction, chunk},
                     &wanted, CpuLossKernels());
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, CPU, m) {
  m.impl("linear_joint_cross_entropy", &aep::linear_joint_cross_entropy);
  m.impl("linear_joint_cross_entropy_with_grad", &aep::linear_joint_cross_entropy_with_grad);
}
