// All kernels of one instruction set, and its table. The including file defines
// AEP_ISA_NAMESPACE, AEP_ISA_TABLE and AEP_ISA_NAME, and includes its vec_*.h.

// The order matters: each builds on those before it.
#include "common.inl.h"
#include "row_stats.inl.h"
#include "ensemble.inl.h"
#include "gate.inl.h"
#include "global_avg_pool.inl.h"
#include "multi_exit_loss.inl.h"
#include "small_linear.inl.h"
#include "subset_correct.inl.h"

namespace aep::kernels::cpu {
namespace AEP_ISA_NAMESPACE {
namespace {

template <class A>
void exponentials(const A* in, A* out, int64_t count) {
  for_vectors<Vec<A>::n>(count,
                         [&](int64_t k, auto part) { store(out + k, exponential(load(in + k, part, A(0))), part); });
}

template <class From, class To>
void convert_as(const void* in, void* out, int64_t count) {
  for_vectors<Vec<float>::n>(count, [&](int64_t k, auto part) {
    store(static_cast<To*>(out) + k, load(static_cast<const From*>(in) + k, part, 0.0f), part);
  });
}

void convert(const void* in, DType from, void* out, DType to, int64_t count) {
  if (from == DType::f32 && to == DType::bf16) return convert_as<float, BF16>(in, out, count);
  if (from == DType::f32 && to == DType::f16) return convert_as<float, F16>(in, out, count);
  if (from == DType::bf16 && to == DType::f32) return convert_as<BF16, float>(in, out, count);
  if (from == DType::f16 && to == DType::f32) return convert_as<F16, float>(in, out, count);
}

}  // namespace
}  // namespace AEP_ISA_NAMESPACE

extern const KernelTable AEP_ISA_TABLE = {
    AEP_ISA_NAME,
    AEP_ISA_NAMESPACE::global_avg_pool,
    AEP_ISA_NAMESPACE::small_linear,
    AEP_ISA_NAMESPACE::ensemble,
    AEP_ISA_NAMESPACE::ensemble_stats,
    AEP_ISA_NAMESPACE::ensemble_backward_logits,
    AEP_ISA_NAMESPACE::ensemble_backward_weights,
    AEP_ISA_NAMESPACE::multi_exit_loss,
    AEP_ISA_NAMESPACE::multi_exit_loss_grad,
    AEP_ISA_NAMESPACE::loss_grad_scale,
    AEP_ISA_NAMESPACE::subset_correct,
    AEP_ISA_NAMESPACE::gate_judge,
    AEP_ISA_NAMESPACE::gate_scatter,
    AEP_ISA_NAMESPACE::gate_one,
    AEP_ISA_NAMESPACE::exponentials<float>,
    AEP_ISA_NAMESPACE::exponentials<double>,
    AEP_ISA_NAMESPACE::convert,
};

}  // namespace aep::kernels::cpu
