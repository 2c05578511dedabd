// The loss of linear exits without their (E, N, K) logits: exit by exit and chunk by chunk they are formed in one
// buffer, turned into losses and, in their place, into their gradient, and that into the gradients of what they came
// from.
#include "linear_loss.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <limits>

#include "held.h"
#include "prepare.h"
#include "results.h"

namespace aep {

namespace {

// Without a chunk given: a buffer of a sixteenth of the logits, or of this many bytes where that is more.
constexpr int64_t kShare = 16, kSmallBuffer = int64_t{4} << 20;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a chunk: as asked for, or as many as the buffer above has room for, evened out over the chunks.
int64_t chunk_rows(const LinearLoss& a, int64_t E, int64_t N, int64_t K, int64_t itemsize) {
  if (N <= 1) return 1;
  if (a.chunk.has_value()) return std::min(*a.chunk, N);
  const int64_t most = std::clamp<int64_t>(std::max(ceil_div(E * N, kShare), kSmallBuffer / (K * itemsize)), 1, N);
  return ceil_div(N, ceil_div(N, most));
}

// The gradients of one exit's linear layer; undefined where not wanted.
struct ExitGradients {
  Tensor pooled, weight, bias;
  bool any() const { return pooled.defined() || weight.defined() || bias.defined(); }
};

// Adds what a chunk of rows gives. Sums over rows are formed in `weight`'s and `bias`'s own dtype.
class Accumulator {
 public:
  Accumulator(ExitGradients& into, const Tensor& weight, double factor)
      : into_(into), weight_(weight), factor_(factor) {
    const bool half = weight.scalar_type() == at::kHalf || weight.scalar_type() == at::kBFloat16;
    if (half && into.weight.defined()) partial_ = fresh(weight.sizes(), weight.scalar_type(), weight);
  }

  // `grad`: (n, K), the gradient of the chunk's logits times the factor.
  void add(const Tensor& grad, const Tensor& pooled, int64_t start, bool first) {
    if (into_.pooled.defined()) {
      Tensor rows = into_.pooled.narrow(0, start, grad.size(0));
      at::mm_out(rows, grad, weight_);
    }
    if (into_.weight.defined()) {
      if (partial_.defined() && weight_.scalar_type() == at::kHalf) {
        // A sum over the chunk's rows may be beyond float16 though the gradient is not. So every feature is multiplied
        // by the power of two that its sums bear: rows times the largest entries is a bound on them.
        const Tensor peak = at::linalg_vector_norm(pooled, kInfinity, at::IntArrayRef{0}).to(at::kFloat);
        const Tensor most = at::linalg_vector_norm(grad, kInfinity).to(at::kFloat).mul_(grad.size(0)).clamp_min_(1);
        const Tensor power = at::clamp(15 - peak.mul(most).log2_().ceil_(), -40, 40);
        Tensor features = at::empty(pooled.sizes(), pooled.options());
        at::mul_out(features, pooled, power.exp2());
        at::mm_out(partial_, grad.t(), features);
        if (first) into_.weight.zero_();
        into_.weight.addcmul_(partial_, power.neg().exp2_(), 1 / factor_);
      } else if (partial_.defined()) {
        at::mm_out(partial_, grad.t(), pooled);
        if (first) into_.weight.zero_();
        into_.weight.add_(partial_, 1 / factor_);
      } else {
        at::addmm_out(into_.weight, into_.weight, grad.t(), pooled, /*beta=*/first ? 0 : 1);
      }
    }
    if (into_.bias.defined()) {
      const Tensor sums = grad.sum(0, /*keepdim=*/false, into_.bias.scalar_type());
      if (first) into_.bias.zero_();
      into_.bias.add_(sums, 1 / factor_);
    }
  }

 private:
  ExitGradients& into_;
  const Tensor& weight_;
  const double factor_;
  Tensor partial_;
};

}  // namespace

LinearLossResult linear_loss(const LinearLoss& a, const c10::List<bool>* wanted, const LossKernels& kernels) {
  constexpr const char* op = "linear_joint_cross_entropy";
  check_linear_loss(a.pooled, a.weights, a.biases, a.target, a.exit_weights, a.class_weight, a.label_smoothing,
                    a.reduction, a.chunk);
  const auto E = static_cast<int64_t>(a.pooled.size());
  const int64_t N = a.pooled[0].size(0), K = a.weights[0].size(0);
  TORCH_CHECK_VALUE(!wanted || static_cast<int64_t>(wanted->size()) == 3 * E, "aep::", op, ": wanted must hold ", 3 * E,
                    " entries, got ", wanted->size());
  kernels.labels(a.target, K, a.ignore_index);

  const Tensor& like = a.pooled[0];
  const auto type = like.scalar_type();
  const auto wide = like.options().dtype(accumulate_type(type));
  const int64_t wide_size = accumulate_type(type) == at::kDouble ? 8 : 4;
  const Tensor loss = at::empty({}, wide), exit_losses = at::empty({E}, wide), row_losses = at::empty({E, N}, wide);
  const Tensor divisors = at::empty({2}, wide), exit_weights = accumulated(a.exit_weights, type);
  Tensor class_weight;
  if (a.class_weight.has_value()) class_weight = accumulated(*a.class_weight, type);

  kernels::MultiExitLossReduceParams reduce{};
  reduce.row_losses[0] = row_losses.const_data_ptr();
  reduce.weights[0] = exit_weights.const_data_ptr();
  reduce.target = a.target.const_data_ptr<int64_t>();
  reduce.class_weight = class_weight.defined() ? class_weight.const_data_ptr() : nullptr;
  reduce.loss = loss.mutable_data_ptr();
  reduce.losses[0] = exit_losses.mutable_data_ptr();
  reduce.divisors = divisors.mutable_data_ptr();
  reduce.dtype = kernel_type(type);
  reduce.reduction = a.reduction == "mean" ? kernels::Reduction::mean : kernels::Reduction::sum;
  reduce.E = E, reduce.N = N, reduce.K = K;
  reduce.target_stride = a.target.stride(0);
  reduce.ignore_index = a.ignore_index;
  kernels.divisors(reduce);  // the gradient needs it before the losses are known

  const double factor = held_factor(type, N, a.reduction);
  const int64_t rows = chunk_rows(a, E, N, K, static_cast<int64_t>(like.element_size()));
  const Tensor buffer = fresh({std::min(rows, N), K}, type, like);
  kernels::MultiExitLossGradParams q{};
  auto& p = q.loss;
  p.logits = q.grad_logits = buffer.mutable_data_ptr();
  p.class_weight = reduce.class_weight;
  p.dtype = reduce.dtype;
  p.E = 1, p.K = K;
  p.stride_e = q.out_stride_e = buffer.numel();
  p.stride_n = q.out_stride_n = K;
  p.stride_k = q.out_stride_k = 1;
  p.target_stride = reduce.target_stride;
  p.ignore_index = a.ignore_index;
  p.label_smoothing = a.label_smoothing;
  p.temperature = 1;
  q.coefficients[0].denominator = reduce.divisors;
  q.coefficients[0].factor = factor;

  std::vector<ExitGradients> gradients(E);
  for (int64_t e = 0; e < E; ++e) {
    const Tensor& weight = a.weights[e];
    const std::optional<Tensor> bias = a.biases[e];
    ExitGradients& own = gradients[e];
    if (wanted) {
      if (wanted->get(e)) own.pooled = fresh(a.pooled[e].sizes(), type, like);
      if (wanted->get(E + e)) own.weight = fresh(weight.sizes(), accumulate_type(type), like);
      if (wanted->get(2 * E + e) && bias.has_value()) own.bias = fresh({K}, accumulate_type(type), like);
    }
    if (N == 0) {  // nothing is added below
      if (own.weight.defined()) own.weight.zero_();
      if (own.bias.defined()) own.bias.zero_();
    }
    q.coefficients[0].weights = static_cast<const char*>(exit_weights.const_data_ptr()) + e * wide_size;
    Accumulator accumulate(own, weight, factor);
    for (int64_t start = 0; start < N; start += rows) {
      const int64_t count = std::min(rows, N - start);
      Tensor logits = buffer.narrow(0, 0, count);
      const Tensor pooled = a.pooled[e].narrow(0, start, count);
      if (bias.has_value()) {
        at::addmm_out(logits, *bias, pooled, weight.t());
      } else {
        at::mm_out(logits, pooled, weight.t());
      }
      p.N = count;
      p.target = reduce.target + start * reduce.target_stride;
      p.row_losses[0] = static_cast<char*>(row_losses.mutable_data_ptr()) + (e * N + start) * wide_size;
      if (own.any()) {
        kernels.gradient(q);
        accumulate.add(logits, pooled, start, start == 0);
      } else {
        kernels.losses(p);
      }
    }
  }
  kernels.reduce(reduce);

  std::vector<Tensor> found;
  for (const auto part : {&ExitGradients::pooled, &ExitGradients::weight, &ExitGradients::bias}) {
    for (const ExitGradients& own : gradients) {
      if ((own.*part).defined()) found.push_back(own.*part);
    }
  }
  return {loss, exit_losses, std::move(found)};
}

}  // namespace aep
