// Checks of the operators' arguments, with messages of the form "aep::<operator>: <rule>, got <value>". They run in the
// backend kernels, where sizes are known.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace aep {

using at::Tensor;
using Biases = c10::List<std::optional<Tensor>>;

// float64 for float64, float32 for everything narrower.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

void check_features(const char* op, const Tensor& features);
void check_head(at::TensorList features, at::TensorList weights, const Biases& biases);
void check_ensemble(const char* op, const Tensor& exit_logits, const Tensor& weights);
void check_scalar(const char* op, const char* name, const std::optional<Tensor>& tensor, double value,
                  at::Device device, bool positive);
// `probabilities`: whether the target may be (N, K) of them.
void check_loss(const char* op, const Tensor& exit_logits, const Tensor& target,
                const std::optional<Tensor>& class_weight, double label_smoothing, bool probabilities);
void check_vector(const char* op, const char* name, const Tensor& vector, int64_t length, at::Device device);
void check_reduction(const char* op, std::string_view reduction);
void check_linear_loss(at::TensorList pooled, at::TensorList weights, const Biases& biases, const Tensor& target,
                       const Tensor& exit_weights, const std::optional<Tensor>& class_weight, double label_smoothing,
                       std::string_view reduction, std::optional<int64_t> chunk);
void check_shape(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef shape);
void check_dtype(const char* op, const char* name, const Tensor& tensor, at::ScalarType type);
void check_device(const char* op, const char* name, const Tensor& tensor, at::Device device);
void check_floating(const char* op, const char* name, const Tensor& tensor);
void check_subsets(const Tensor& exit_logits, const Tensor& weights, const Tensor& target);
void check_gate(const Tensor& features, const Tensor& running, const Tensor& indices, const Tensor& state,
                const Tensor& exit_logits, std::string_view criterion, std::string_view criterion_on);
void check_gate_one(const Tensor& running, const Tensor& stats, const Tensor& leaves, const Tensor& exit_logits,
                    std::string_view criterion, std::string_view criterion_on);

}  // namespace aep
