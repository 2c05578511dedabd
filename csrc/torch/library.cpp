// The operators' schemas. Backend kernels are registered in cpu/ and cuda/, autograd and autocast beside each
// operator's common part (head.cpp, ensemble.cpp, ...), fake kernels and flop formulas in aep_ext/ops.
//
// A scalar operand is a number plus an optional 0-d tensor that overrides it: numbers cost no allocation, and a
// tensor's value is never read back.
#include <torch/library.h>

#define AEP_LOSS_SCHEMA                                                                                          \
  "Tensor? class_weight=None, float label_smoothing=0.0, int ignore_index=-100, str reduction=\"mean\", "         \
  "Tensor? prefix_weights=None, Tensor? output_weights=None, float distillation=0.0, float temperature=3.0, "    \
  "bool detach_prefix=False, str name=\"multi_exit_loss\""

TORCH_LIBRARY(aep, m) {
  m.def("global_avg_pool(Tensor features) -> Tensor");

  // (E, N, K) logits; the pooled features of all exits one behind the other, kept for the backward (pooled_size()).
  m.def(
      "multi_exit_linear_head(Tensor[] features, Tensor[] weights, Tensor?[] biases) "
      "-> (Tensor logits, Tensor pooled)");

  m.def("ensemble(Tensor exit_logits, Tensor weights) -> Tensor");
  m.def("ensemble_backward_logits(Tensor grad, Tensor weights) -> Tensor");
  m.def("ensemble_backward_weights(Tensor grad, Tensor exit_logits) -> Tensor");
  m.def(
      "ensemble_stats(Tensor exit_logits, Tensor weights, float normalizer=1.0, float temperature=1.0, "
      "Tensor? normalizer_tensor=None, Tensor? temperature_tensor=None) "
      "-> (Tensor logits, Tensor stats, Tensor argmax)");

  // kept, for the backward: what kernels/params.h says, and the two divisors of the mean. `name`: the function that errors
  // name; joint_cross_entropy is this one without prefixes and distillation. Losses that are not asked for are empty.
  m.def("multi_exit_loss(Tensor exit_logits, Tensor target, Tensor exit_weights, " AEP_LOSS_SCHEMA
        ") -> (Tensor loss, Tensor exit_losses, Tensor prefix_losses, Tensor distillation_losses, Tensor kept)");
  m.def(
      "multi_exit_loss_backward(Tensor exit_logits, Tensor target, Tensor exit_weights, Tensor kept, "
      "Tensor? grad_loss, Tensor? grad_exit_losses, Tensor? grad_prefix_losses, Tensor? grad_distillation_losses, "
      AEP_LOSS_SCHEMA ") -> Tensor");
  // The other memory modes: the gradient as a result, and in the place of the logits. Both hold it times
  // held_factor (csrc/torch/loss_held.cpp), which multi_exit_loss_scale_ divides by.
  m.def("multi_exit_loss_with_grad(Tensor exit_logits, Tensor target, Tensor exit_weights, " AEP_LOSS_SCHEMA
        ") -> (Tensor loss, Tensor exit_losses, Tensor prefix_losses, Tensor distillation_losses, Tensor grad_logits)");
  m.def("multi_exit_loss_(Tensor(a!) exit_logits, Tensor target, Tensor exit_weights, " AEP_LOSS_SCHEMA
        ") -> (Tensor loss, Tensor exit_losses, Tensor prefix_losses, Tensor distillation_losses)");
  m.def("multi_exit_loss_scale_(Tensor(a!) grad_logits, Tensor scale, float divisor=1.0) -> ()");

  // The loss of linear exits, whose logits are formed `chunk` rows at a time (csrc/torch/linear_loss.cpp).
  m.def(
      "linear_joint_cross_entropy(Tensor[] pooled, Tensor[] weights, Tensor?[] biases, Tensor target, "
      "Tensor exit_weights, Tensor? class_weight=None, float label_smoothing=0.0, int ignore_index=-100, "
      "str reduction=\"mean\", int? chunk=None) -> (Tensor loss, Tensor exit_losses)");
  // With the gradients of those tensors for which `wanted` (all of pooled, then of weights, then of biases) is true.
  // They are held as csrc/torch/linear_loss.h says.
  m.def(
      "linear_joint_cross_entropy_with_grad(Tensor[] pooled, Tensor[] weights, Tensor?[] biases, Tensor target, "
      "Tensor exit_weights, Tensor? class_weight, float label_smoothing, int ignore_index, str reduction, int? chunk, "
      "bool[] wanted) -> (Tensor loss, Tensor exit_losses, Tensor[] gradients)");

  m.def("subset_correct(Tensor exit_logits, Tensor weights, Tensor target) -> Tensor");

  // What is seldom given stands last: defaults cost less than arguments.
  m.def(
      "gate(Tensor features, Tensor running, Tensor indices, Tensor state, Tensor exit_logits, float weight_sum, "
      "float weight, float threshold, float temperature=1.0, str criterion=\"confidence\", str criterion_on=\"ensemble\", "
      "bool enabled=True, bool last=False, Tensor? weight_sum_tensor=None, Tensor? weight_tensor=None, "
      "Tensor? threshold_tensor=None, Tensor? temperature_tensor=None) -> (Tensor features, Tensor running, Tensor indices, Tensor state, "
      "Tensor stats, Tensor argmax, Tensor weight_sum, Tensor count)");
  // One row in place, for criteria without a state; CPU only. The decision is a tensor, not a bool: a result that depends
  // on data could not be traced.
  m.def(
      "gate_one_(Tensor(a!) running, Tensor(b!) stats, Tensor(c!) leaves, Tensor exit_logits, float weight_sum, "
      "float weight, float threshold, float temperature=1.0, str criterion=\"confidence\", str criterion_on=\"ensemble\", "
      "bool enabled=True, bool last=False) -> ()");
}
