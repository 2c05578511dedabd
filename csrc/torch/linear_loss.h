// linear_joint_cross_entropy: the loop over exits and chunks of rows, which the backends share. Products are ATen's, on
// the device's current stream; what happens to a chunk of logits is the backend's.
//
// How gradients are held until the backward: those of the pooled features in their own dtype and times held_factor (see
// held.h); those of weights and biases in the accumulation dtype, in which they are summed over the chunks, as they are.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels/params.h"

namespace aep {

// The operator's arguments, as its schema has them.
struct LinearLoss {
  at::TensorList pooled, weights;
  const Biases& biases;
  const Tensor &target, &exit_weights;
  const std::optional<Tensor>& class_weight;
  double label_smoothing;
  int64_t ignore_index;
  std::string_view reduction;
  std::optional<int64_t> chunk;
};

// A backend's kernels: each runs, or enqueues, all of its work.
class LossKernels {
 public:
  virtual ~LossKernels() = default;
  // Raises for a label out of range, where that needs no waiting for a device or is asked for all the same.
  virtual void labels(const Tensor& target, int64_t classes, int64_t ignore_index) const = 0;
  virtual void divisors(const kernels::MultiExitLossReduceParams& p) const = 0;
  virtual void losses(const kernels::MultiExitLossParams& p) const = 0;
  virtual void gradient(const kernels::MultiExitLossGradParams& p) const = 0;
  virtual void reduce(const kernels::MultiExitLossReduceParams& p) const = 0;
};

using LinearLossResult = std::tuple<Tensor, Tensor, std::vector<Tensor>>;  // loss, exit_losses, gradients

// `wanted` null: no gradients.
LinearLossResult linear_loss(const LinearLoss& arguments, const c10::List<bool>* wanted, const LossKernels& kernels);

}  // namespace aep
