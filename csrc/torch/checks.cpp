#include "checks.h"

#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <ostream>

#include "kernels/params.h"

namespace aep {

namespace {

// An argument's name, with its place in a list: "features[2]".
struct Name {
  const char* text;
  int64_t index = -1;
};

std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.text;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}

// torch's name in Python, without "torch.".
const char* type_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kBFloat16: return "bfloat16";
    case at::kHalf: return "float16";
    case at::kLong: return "int64";
    case at::kInt: return "int32";
    case at::kShort: return "int16";
    case at::kChar: return "int8";
    case at::kByte: return "uint8";
    case at::kBool: return "bool";
    case at::kComplexHalf: return "complex32";
    case at::kComplexFloat: return "complex64";
    case at::kComplexDouble: return "complex128";
    default: return c10::toString(type);
  }
}

bool is_floating(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

void floating(const char* op, Name name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(is_floating(tensor), "aep::", op, ": ", name, " must be float32, float64, bfloat16 or float16, got ",
                   type_name(tensor.scalar_type()));
}

void has_type(const char* op, Name name, const Tensor& tensor, at::ScalarType type) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, "aep::", op, ": ", name, " must be ", type_name(type), ", got ",
                   type_name(tensor.scalar_type()));
}

void has_shape(const char* op, Name name, const Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "aep::", op, ": ", name, " must have shape ", shape, ", got ",
                    tensor.sizes());
}

void on_device(const char* op, Name name, const Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, "aep::", op, ": ", name, " must be on device ", device, ", got ",
                    tensor.device());
}

void is_feature_map(const char* op, Name name, const Tensor& x) {
  floating(op, name, x);
  TORCH_CHECK_VALUE(x.dim() == 4, "aep::", op, ": ", name, " must have 4 dimensions (N, C, H, W), got shape ",
                    x.sizes());
  TORCH_CHECK_VALUE(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, "aep::", op, ": ", name,
                    " must have C, H and W of at least 1, got shape ", x.sizes());
}

void is_exit_logits(const char* op, const Tensor& exit_logits) {
  floating(op, {"exit_logits"}, exit_logits);
  TORCH_CHECK_VALUE(exit_logits.dim() == 3, "aep::", op, ": exit_logits must have 3 dimensions (E, N, K), got shape ",
                    exit_logits.sizes());
  TORCH_CHECK_VALUE(exit_logits.size(0) >= 1 && exit_logits.size(2) >= 1, "aep::", op,
                    ": exit_logits must have E >= 1 and K >= 1, got shape ", exit_logits.sizes());
}

void is_integers(const char* op, Name name, const Tensor& tensor, at::IntArrayRef shape, at::Device device) {
  has_type(op, name, tensor, at::kLong);
  has_shape(op, name, tensor, shape);
  on_device(op, name, tensor, device);
}

// The dtypes in which sums of logits of `type` may be kept.
void is_running_sum(const char* op, const Tensor& running, at::ScalarType type) {
  const auto wide = accumulate_type(type);
  if (type == wide) {
    has_type(op, {"running"}, running, type);
  } else {
    TORCH_CHECK_TYPE(running.scalar_type() == type || running.scalar_type() == wide, "aep::", op, ": running must be ",
                     type_name(wide), " or ", type_name(type), ", got ", type_name(running.scalar_type()));
  }
}

// A tensor that is written in place: (1, count), dense.
void is_row(const char* op, const char* name, const Tensor& tensor, int64_t count, at::Device device) {
  const std::array<int64_t, 2> shape{1, count};
  has_shape(op, {name}, tensor, shape);
  on_device(op, {name}, tensor, device);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "aep::", op, ": ", name, " must be contiguous, got strides ",
                    tensor.strides());
}

}  // namespace

void check_shape(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  has_shape(op, {name}, tensor, shape);
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, at::ScalarType type) {
  has_type(op, {name}, tensor, type);
}

void check_device(const char* op, const char* name, const Tensor& tensor, at::Device device) {
  on_device(op, {name}, tensor, device);
}

void check_floating(const char* op, const char* name, const Tensor& tensor) { floating(op, {name}, tensor); }

void check_vector(const char* op, const char* name, const Tensor& vector, int64_t length, at::Device device) {
  floating(op, {name}, vector);
  has_shape(op, {name}, vector, {length});
  on_device(op, {name}, vector, device);
}

void check_features(const char* op, const Tensor& features) { is_feature_map(op, {"features"}, features); }

namespace {

void is_pooled(const char* op, Name name, const Tensor& x) {
  floating(op, name, x);
  TORCH_CHECK_VALUE(x.dim() == 2, "aep::", op, ": ", name, " must have 2 dimensions (N, C), got shape ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) >= 1, "aep::", op, ": ", name, " must have C of at least 1, got shape ", x.sizes());
}

// The linear layers of all exits on `inputs`, an argument called `name`, each of which `check_input` has to like.
void check_linears(const char* op, const char* name, at::TensorList inputs, at::TensorList weights,
                   const Biases& biases, void (*check_input)(const char*, Name, const Tensor&)) {
  TORCH_CHECK_VALUE(!inputs.empty(), "aep::", op, ": ", name, " must hold at least 1 tensor, got 0");
  const auto exits = static_cast<int64_t>(inputs.size());
  TORCH_CHECK_VALUE(weights.size() == inputs.size(), "aep::", op, ": weights must hold ", exits, " tensors, got ",
                    weights.size());
  TORCH_CHECK_VALUE(biases.size() == inputs.size(), "aep::", op, ": biases must hold ", exits, " tensors, got ",
                    biases.size());
  for (int64_t e = 0; e < exits; ++e) {
    check_input(op, {name, e}, inputs[e]);
  }
  const Tensor& first = inputs[0];
  TORCH_CHECK_VALUE(weights[0].dim() == 2 && weights[0].size(0) >= 1, "aep::", op,
                    ": weights[0] must have shape [K, C] with K >= 1, got ", weights[0].sizes());
  const int64_t classes = weights[0].size(0);
  for (int64_t e = 0; e < exits; ++e) {
    const Tensor& x = inputs[e];
    TORCH_CHECK_VALUE(x.size(0) == first.size(0), "aep::", op, ": ", Name{name, e},
                      " must have N = ", first.size(0), ", got shape ", x.sizes());
    has_shape(op, {"weights", e}, weights[e], {classes, x.size(1)});
    const std::optional<Tensor> bias = biases[e];
    if (bias.has_value()) {
      has_shape(op, {"biases", e}, *bias, {classes});
    }
    has_type(op, {name, e}, x, first.scalar_type());
    on_device(op, {name, e}, x, first.device());
    has_type(op, {"weights", e}, weights[e], first.scalar_type());
    on_device(op, {"weights", e}, weights[e], first.device());
    if (bias.has_value()) {
      has_type(op, {"biases", e}, *bias, first.scalar_type());
      on_device(op, {"biases", e}, *bias, first.device());
    }
  }
}

}  // namespace

void check_head(at::TensorList features, at::TensorList weights, const Biases& biases) {
  check_linears("multi_exit_linear_head", "features", features, weights, biases, is_feature_map);
}

void check_linear_loss(at::TensorList pooled, at::TensorList weights, const Biases& biases, const Tensor& target,
                       const Tensor& exit_weights, const std::optional<Tensor>& class_weight, double label_smoothing,
                       std::string_view reduction, std::optional<int64_t> chunk) {
  constexpr const char* op = "linear_joint_cross_entropy";
  check_linears(op, "pooled", pooled, weights, biases, is_pooled);
  const at::Device device = pooled[0].device();
  is_integers(op, {"target"}, target, {pooled[0].size(0)}, device);
  check_vector(op, "exit_weights", exit_weights, static_cast<int64_t>(pooled.size()), device);
  if (class_weight.has_value()) {
    check_vector(op, "class_weight", *class_weight, weights[0].size(0), device);
  }
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "aep::", op,
                    ": label_smoothing must be within 0..1, got ", label_smoothing);
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum", "aep::", op,
                    ": reduction must be 'mean' or 'sum', got '", reduction, "'");
  TORCH_CHECK_VALUE(!chunk.has_value() || *chunk >= 1, "aep::", op, ": chunk must be at least 1, got ",
                    chunk.value_or(1));
}

void check_ensemble(const char* op, const Tensor& exit_logits, const Tensor& weights) {
  is_exit_logits(op, exit_logits);
  check_vector(op, "weights", weights, exit_logits.size(0), exit_logits.device());
}

void check_scalar(const char* op, const char* name, const std::optional<Tensor>& tensor, double value,
                  at::Device device, bool positive) {
  if (tensor.has_value()) {
    floating(op, {name}, *tensor);
    has_shape(op, {name}, *tensor, {});
    on_device(op, {name}, *tensor, device);
  } else if (positive) {
    TORCH_CHECK_VALUE(std::isfinite(value) && value > 0, "aep::", op, ": ", name,
                      " must be finite and greater than 0, got ", value);
  } else {
    TORCH_CHECK_VALUE(!std::isnan(value), "aep::", op, ": ", name, " must not be NaN, got ", value);
  }
}

void check_loss(const char* op, const Tensor& exit_logits, const Tensor& target,
                const std::optional<Tensor>& class_weight, double label_smoothing, bool probabilities) {
  is_exit_logits(op, exit_logits);
  if (probabilities && target.dim() == 2) {
    floating(op, {"target"}, target);
    has_shape(op, {"target"}, target, {exit_logits.size(1), exit_logits.size(2)});
    on_device(op, {"target"}, target, exit_logits.device());
  } else {
    is_integers(op, {"target"}, target, {exit_logits.size(1)}, exit_logits.device());
  }
  if (class_weight.has_value()) {
    check_vector(op, "class_weight", *class_weight, exit_logits.size(2), exit_logits.device());
  }
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "aep::", op,
                    ": label_smoothing must be within 0..1, got ", label_smoothing);
}

void check_reduction(const char* op, std::string_view reduction) {
  TORCH_CHECK_VALUE(reduction == "none" || reduction == "mean" || reduction == "sum", "aep::", op,
                    ": reduction must be 'none', 'mean' or 'sum', got '", reduction, "'");
}

void check_subsets(const Tensor& exit_logits, const Tensor& weights, const Tensor& target) {
  constexpr const char* op = "subset_correct";
  check_ensemble(op, exit_logits, weights);
  TORCH_CHECK_VALUE(exit_logits.size(0) <= kernels::kMaxSubsetExits, "aep::", op, ": exit_logits must have at most ",
                    kernels::kMaxSubsetExits, " exits, got ", exit_logits.size(0));
  is_integers(op, {"target"}, target, {exit_logits.size(1)}, exit_logits.device());
}

void check_gate(const Tensor& features, const Tensor& running, const Tensor& indices, const Tensor& state,
                const Tensor& exit_logits, std::string_view criterion, std::string_view criterion_on) {
  constexpr const char* op = "gate";
  floating(op, {"exit_logits"}, exit_logits);
  TORCH_CHECK_VALUE(exit_logits.dim() == 2 && exit_logits.size(1) >= 1, "aep::", op,
                    ": exit_logits must have shape [n, K] with K >= 1, got ", exit_logits.sizes());
  const int64_t rows = exit_logits.size(0);
  const int64_t classes = exit_logits.size(1);
  const at::Device device = exit_logits.device();
  TORCH_CHECK_VALUE(
      criterion == "confidence" || criterion == "entropy" || criterion == "margin" || criterion == "patience" ||
          criterion == "vote",
      "aep::", op, ": criterion must be one of confidence, entropy, margin, patience, vote, got '", criterion, "'");
  TORCH_CHECK_VALUE(criterion_on == "ensemble" || criterion_on == "exit", "aep::", op,
                    ": criterion_on must be 'ensemble' or 'exit', got '", criterion_on, "'");
  floating(op, {"features"}, features);
  TORCH_CHECK_VALUE(features.dim() >= 1 && features.size(0) == rows, "aep::", op, ": features must have ", rows,
                    " rows, got shape ", features.sizes());
  on_device(op, {"features"}, features, device);
  is_running_sum(op, running, exit_logits.scalar_type());
  has_shape(op, {"running"}, running, {rows, classes});
  on_device(op, {"running"}, running, device);
  is_integers(op, {"indices"}, indices, {rows}, device);
  const int64_t width = criterion == "patience" ? 2 : criterion == "vote" ? classes : 0;
  is_integers(op, {"state"}, state, {rows, width}, device);
}

void check_gate_one(const Tensor& running, const Tensor& stats, const Tensor& leaves, const Tensor& exit_logits,
                    std::string_view criterion, std::string_view criterion_on) {
  constexpr const char* op = "gate_one_";
  floating(op, {"exit_logits"}, exit_logits);
  TORCH_CHECK_VALUE(exit_logits.dim() == 2 && exit_logits.size(0) == 1 && exit_logits.size(1) >= 1, "aep::", op,
                    ": exit_logits must have shape [1, K] with K >= 1, got ", exit_logits.sizes());
  const at::Device device = exit_logits.device();
  TORCH_CHECK_VALUE(criterion == "confidence" || criterion == "entropy" || criterion == "margin", "aep::", op,
                    ": criterion must be one of confidence, entropy, margin, got '", criterion, "'");
  TORCH_CHECK_VALUE(criterion_on == "ensemble" || criterion_on == "exit", "aep::", op,
                    ": criterion_on must be 'ensemble' or 'exit', got '", criterion_on, "'");
  is_running_sum(op, running, exit_logits.scalar_type());
  is_row(op, "running", running, exit_logits.size(1), device);
  has_type(op, {"stats"}, stats, at::kFloat);
  is_row(op, "stats", stats, 3, device);
  has_type(op, {"leaves"}, leaves, at::kBool);
  const std::array<int64_t, 1> one{1};
  has_shape(op, {"leaves"}, leaves, one);
  on_device(op, {"leaves"}, leaves, device);
}

}  // namespace aep
