// global_avg_pool: common part of the backends, autograd. Autocast leaves it alone: the sum is formed in float32 in any
// case, and the result keeps the dtype of the features.
#include <torch/library.h>

#include "autograd.h"
#include "prepare.h"

namespace aep {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

kernels::GlobalAvgPoolParams pool_params(const Tensor& features, void* output, int64_t out_stride_n) {
  kernels::GlobalAvgPoolParams p{};
  p.input = features.const_data_ptr();
  p.output = output;
  p.dtype = kernel_type(features.scalar_type());
  p.N = features.size(0), p.C = features.size(1), p.H = features.size(2), p.W = features.size(3);
  p.stride_n = features.stride(0), p.stride_c = features.stride(1);
  p.stride_h = features.stride(2), p.stride_w = features.stride(3);
  p.out_stride_n = out_stride_n, p.out_stride_c = 1;
  return p;
}

PoolCall prepare_pool(const Tensor& features) {
  check_features("global_avg_pool", features);
  PoolCall call;
  call.output = fresh(features.sizes().slice(0, 2), features.scalar_type(), features);
  call.params = pool_params(features, call.output.mutable_data_ptr(), features.size(1));
  return call;
}

namespace {

Tensor dispatch_pool(const Tensor& features) {
  static auto op = find_operator<Tensor(const Tensor&)>("aep::global_avg_pool");
  return op.call(features);
}

class PoolFunction : public torch::autograd::Function<PoolFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& features) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->saved_data["shape"] = c10::IValue(features.sym_sizes());
    return dispatch_pool(features);
  }

  // One number per channel, shown at full size: autograd adds it to the trunk's gradient in one pass, without a tensor
  // of that size. Plain differentiable operators: a second backward goes through them.
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) {
      return {Tensor()};
    }
    const auto shape = ctx->saved_data["shape"].toSymIntVector();
    const Tensor each = grads[0].div(c10::Scalar(shape[2] * shape[3]));
    return {each.unsqueeze(-1).unsqueeze(-1).expand_symint(shape)};
  }
};

Tensor pool_autograd(const Tensor& features) {
  no_tangents("global_avg_pool", {&features});
  if (needs_graph({&features})) {
    return PoolFunction::apply(features);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch_pool(features);
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) { m.impl("global_avg_pool", &aep::pool_autograd); }
