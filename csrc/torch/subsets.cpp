// subset_correct: common part of the backends; not differentiable.
#include <torch/library.h>

#include "autograd.h"
#include "prepare.h"

namespace aep {

SubsetCall prepare_subsets(const Tensor& exit_logits, const Tensor& weights, const Tensor& target) {
  check_subsets(exit_logits, weights, target);
  SubsetCall call;
  auto& p = call.params;
  p.E = exit_logits.size(0), p.N = exit_logits.size(1), p.K = exit_logits.size(2);
  call.weights = accumulated(weights, exit_logits.scalar_type());
  call.counts = fresh({(int64_t{1} << p.E) - 1, 2}, at::kLong, exit_logits);
  p.logits = exit_logits.const_data_ptr();
  p.weights = call.weights.const_data_ptr();
  p.target = target.const_data_ptr<int64_t>();
  p.counts = call.counts.mutable_data_ptr<int64_t>();
  p.dtype = kernel_type(exit_logits.scalar_type());
  p.stride_e = exit_logits.stride(0), p.stride_n = exit_logits.stride(1), p.stride_k = exit_logits.stride(2);
  p.target_stride = target.stride(0);
  return call;
}

namespace {

Tensor subsets_autograd(const Tensor& exit_logits, const Tensor& weights, const Tensor& target) {
  static auto op = find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&)>("aep::subset_correct");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(exit_logits, weights, target);
}

}  // namespace

}  // namespace aep

TORCH_LIBRARY_IMPL(aep, Autograd, m) { m.impl("subset_correct", &aep::subsets_autograd); }
