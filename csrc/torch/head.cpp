// multi_exit_linear_head: common part of the backends, autograd, autocast.
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "autograd.h"
#include "prepare.h"

namespace aep {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using HeadResult = std::tuple<Tensor, Tensor>;

namespace {

// Where the next exit's pooled features begin. BLAS sums in an order that depends on a matrix's alignment: every exit
// gets the same, or its logits would change their last bits with the other exits at hand, and so with pruning.
constexpr int64_t kPooledUnit = 64;
template <class Int>
Int pooled_size(const Int& rows, const Int& channels) {
  return (rows * channels + (kPooledUnit - 1)) / kPooledUnit * kPooledUnit;
}

}  // namespace

HeadCall prepare_head(at::TensorList features, at::TensorList weights, const Biases& biases) {
  check_head(features, weights, biases);
  const auto exits = static_cast<int64_t>(features.size());
  const int64_t rows = features[0].size(0);
  const auto type = features[0].scalar_type();
  HeadCall call;
  int64_t total = 0;
  bool gaps = false;
  for (const Tensor& x : features) {
    call.offsets.push_back(total);
    total += pooled_size(rows, x.size(1));
    gaps |= rows * x.size(1) % kPooledUnit != 0;
  }
  call.pooled = fresh({total}, type, features[0]);
  if (gaps) {
    call.pooled.zero_();  // nothing undefined is returned
  }
  call.logits = fresh({exits, rows, weights[0].size(0)}, type, features[0]);
  auto* out = static_cast<char*>(call.pooled.mutable_data_ptr());
  for (int64_t e = 0; e < exits; ++e) {
    const Tensor& x = features[e];
    call.pools.push_back(
        pool_params(x, out + call.offsets[e] * static_cast<int64_t>(x.element_size()), x.size(1)));
  }
  return call;
}

std::optional<kernels::SmallLinearParams> small_linear_params(const HeadCall& call, size_t exit, const Tensor& weight,
                                                              const std::optional<Tensor>& bias) {
  const auto& pool = call.pools[exit];
  if (weight.stride(1) != 1 && pool.C > 1) {
    return std::nullopt;
  }
  kernels::SmallLinearParams p{};
  p.input = pool.output;
  p.weight = weight.const_data_ptr();
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.dtype = pool.dtype;
  p.N = pool.N, p.C = pool.C, p.K = weight.size(0);
  p.output = static_cast<char*>(call.logits.mutable_data_ptr()) +
             static_cast<int64_t>(exit) * p.N * p.K * static_cast<int64_t>(call.logits.element_size());
  p.stride_n = p.C, p.weight_stride_k = weight.stride(0), p.out_stride_n = p.K;
  p.bias_stride = bias.has_value() ? bias->stride(0) : 0;
  return p;
}

void finish_exit(const HeadCall& call, size_t exit, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t rows = call.logits.size(1), channels = weight.size(1);
  const Tensor pooled = call.pooled.narrow(0, call.offsets[exit], rows * channels).view({rows, channels});
  Tensor out = call.logits.select(0, static_cast<int64_t>(exit));
  if (bias.has_value()) {
    at::addmm_out(out, *bias, pooled, weight.t());
  } else {
    at::mm_out(out, pooled, weight.t());
  }
}

namespace {

HeadResult dispatch_head(at::TensorList features, at::TensorList weights, const Biases& biases) {
  static auto op =
      find_operator<HeadResult(at::TensorList, at::TensorList, const Biases&)>("aep::multi_exit_linear_head");
  return op.call(features, weights, biases);
}

// One node for all exits: it saves the weights and the pooled features, not the feature maps.
class HeadFunction : public torch::autograd::Function<HeadFunction> {
 public:
  // `tensors`: E features, E weights, then those biases that exist.
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Biases* biases) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const size_t exits = biases->size();
    const auto features = tensors.slice(0, exits);
    const auto weights = tensors.slice(exits, exits);
    auto [logits, pooled] = dispatch_head(features, weights, *biases);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({pooled});
    variable_list saved = weights.vec();
    saved.push_back(pooled);
    ctx->save_for_backward(std::move(saved));
    c10::List<bool> has_bias;
    std::vector<c10::SymInt> shapes;
    for (size_t e = 0; e < exits; ++e) {
      const std::optional<Tensor> bias = (*biases)[e];
      has_bias.push_back(bias.has_value());
      const auto sizes = features[e].sym_sizes();
      shapes.insert(shapes.end(), sizes.begin(), sizes.end());
    }
    ctx->saved_data["has_bias"] = has_bias;
    ctx->saved_data["shapes"] = c10::IValue(c10::SymIntArrayRef(shapes));
    return {logits, pooled};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto has_bias = ctx->saved_data["has_bias"].toBoolList();
    const size_t exits = has_bias.size();
    const auto shapes = ctx->saved_data["shapes"].toSymIntVector();
    const auto saved = ctx->get_saved_variables();
    const Tensor& pooled = saved[exits];
    size_t inputs = 2 * exits;
    for (size_t e = 0; e < exits; ++e) {
      inputs += has_bias.get(e);
    }
    variable_list result(inputs + 1);
    if (!grads[0].defined()) {
      return result;
    }
    {
      at::AutoGradMode no_grad(false);
      c10::SymInt offset = 0;
      size_t next_bias = 2 * exits;
      for (size_t e = 0; e < exits; ++e) {
        const Tensor grad = grads[0].select(0, static_cast<int64_t>(e));
        const auto shape = c10::SymIntArrayRef(shapes).slice(4 * e, 4);
        if (ctx->needs_input_grad(e)) {
          // One number per channel, shown at full size: autograd adds it to the trunk's gradient without a copy of that
          // size.
          const Tensor each = grad.mm(saved[e]).div(c10::Scalar(shape[2] * shape[3]));
          result[e] = each.unsqueeze(-1).unsqueeze(-1).expand_symint(shape);
        }
        if (ctx->needs_input_grad(exits + e)) {
          const Tensor own = pooled.narrow_symint(0, offset, shape[0] * shape[1]);
          result[exits + e] = grad.t().mm(own.view_symint({shape[0], shape[1]}));
        }
        if (has_bias.get(e)) {
          if (ctx->needs_input_grad(next_bias)) {
            result[next_bias] = grad.sum(0);
          }
          ++next_bias;
        }
        offset += pooled_size(shape[0], shape[1]);
      }
    }
    variable_list sources(saved.begin(), saved.begin() + static_cast<int64_t>(exits));
    sources.push_back(grads[0]);
    differentiable_once("multi_exit_linear_head", sources, result);
    return result;
  }
};

HeadResult head_autograd(at::TensorList features, at::TensorList weights, const Biases& biases) {
  bool graph = false;
  const auto look_at = [&](const Tensor& tensor) {
    no_tangents("multi_exit_linear_head", {&tensor});
    graph |= tensor.defined() && tensor.requires_grad();
  };
  for (const Tensor& tensor : features) look_at(tensor);
  for (const Tensor& tensor : weights) look_at(tensor);
  for (size_t e = 0; e < biases.size(); ++e) {
    const std::optional<Tensor> bias = biases[e];
    if (bias.has_value()) look_at(*bias);
  }
  // Lists of unequal length cannot be told apart behind this point; the backend's checks name them.
  const bool matched = features.size() == weights.size() && features.size() == biases.size() && !features.empty();
  if (!matched || !graph || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return dispatch_head(features, weights, biases);
  }
  std::vector<Tensor> tensors(features.begin(), features.end());
  tensors.insert(tensors.end(), weights.begin(), weights.end());
  for (size_t e = 0; e < biases.size(); ++e) {
    const std::optional<Tensor> bias = biases[e];
    if (bias.has_value()) {
      tensors.push_back(*bias);
    }
  }
  const auto outputs = HeadFunction::apply(at::TensorList(tensors), &biases);
  return {outputs[0], outputs[1]};
}

// As torch does for `linear`: everything to the autocast dtype, float64 excepted.
HeadResult head_autocast(at::TensorList features, at::TensorList weights, const Biases& biases) {
  const auto device = features.empty() ? at::kCPU : features[0].device().type();
  c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto type = at::autocast::get_autocast_dtype(device);
  Biases cast;
  for (size_t e = 0; e < biases.size(); ++e) {
    const std::optional<Tensor> bias = biases[e];
    cast.push_back(at::autocast::cached_cast(type, bias, device));
  }
  return dispatch_head(at::autocast::cached_cast(type, features, device),
                       at::autocast::cached_cast(type, weights, device), cast);
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) { m.impl("multi_exit_linear_head", &aep::head_autograd); }
TORCH_LIBRARY_IMPL(aep, AutocastCPU, m) { m.impl("multi_exit_linear_head", &aep::head_autocast); }
TORCH_LIBRARY_IMPL(aep, AutocastCUDA, m) { m.impl("multi_exit_linear_head", &aep::head_autocast); }
