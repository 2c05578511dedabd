// linear_joint_cross_entropy on CUDA: on the current stream of the tensors' device, without waiting for it, unless
// labels are to be checked (labels.h): else one out of range gives a NaN loss and no gradient.
#include "../linear_loss.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels/cuda/api.h"
#include "labels.h"

namespace aep {

namespace {

namespace cuda = kernels::cuda;
using OptionalTensor = std::optional<Tensor>;

class CudaLossKernels final : public LossKernels {
 public:
  // Makes the device of the tensors current; where they are none or elsewhere, the checks will say so.
  explicit CudaLossKernels(at::TensorList tensors) {
    if (!tensors.empty() && tensors[0].is_cuda()) guard_.set_device(tensors[0].device());
    stream_ = c10::cuda::getCurrentCUDAStream();
  }
  void labels(const Tensor& target, int64_t classes, int64_t ignore_index) const override {
    check_labels_if_asked("linear_joint_cross_entropy", target, classes, &ignore_index);
  }
  void divisors(const kernels::MultiExitLossReduceParams& p) const override {
    C10_CUDA_CHECK(cuda::launch_multi_exit_loss_divisors(p, stream_));
  }
  void losses(const kernels::MultiExitLossParams& p) const override {
    C10_CUDA_CHECK(cuda::launch_multi_exit_loss(p, stream_));
  }
  void gradient(const kernels::MultiExitLossGradParams& p) const override {
    C10_CUDA_CHECK(cuda::launch_multi_exit_loss_grad(p, stream_));
  }
  void reduce(const kernels::MultiExitLossReduceParams& p) const override {
    C10_CUDA_CHECK(cuda::launch_multi_exit_loss_reduce(p, stream_));
  }

 private:
  c10::cuda::OptionalCUDAGuard guard_;
  cudaStream_t stream_ = nullptr;
};

std::tuple<Tensor, Tensor> linear_joint_cross_entropy(at::TensorList pooled, at::TensorList weights,
                                                      const Biases& biases, const Tensor& target,
                                                      const Tensor& exit_weights, const OptionalTensor& class_weight,
                                                      double label_smoothing, int64_t ignore_index,
                                                      std::string_view reduction, std::optional<int64_t> chunk) {
  const CudaLossKernels kernels(pooled);
  const auto [loss, exit_losses, none] = linear_loss({pooled, weights, biases, target, exit_weights, class_weight,
                                                      label_smoothing, ignore_index, reduction, chunk},
                                                     nullptr, kernels);
  return {loss, exit_losses};
}

LinearLossResult linear_joint_cross_entropy_with_grad(at::TensorList pooled, at::TensorList weights,
                                                      const Biases& biases, const Tensor& target,
                                                      const Tensor& exit_weights, const OptionalTensor& class_weight,
                                                      double label_smoothing, int64_t ignore_index,
                                                      std::string_view reduction, std::optional<int64_t> chunk,
                                                      const c10::List<bool>& wanted) {
  const CudaLossKernels kernels(pooled);
  return linear_loss({pooled, weights, biases, target, exit_weights, class_weight, label_smoothing, ignore_index,
                      reduction, chunk},
                     &wanted, kernels);
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, CUDA, m) {
  m.impl("linear_joint_cross_entropy", &aep::linear_joint_cross_entropy);
  m.impl("linear_joint_cross_entropy_with_grad", &aep::linear_joint_cross_entropy_with_grad);
}
