#include "backend.h"

#include "testing.h"

namespace backend {
namespace {

// Whether this part of 0 .. total stands for all of it.
bool whole(int64_t begin, int64_t end, int64_t total) { return begin == 0 && (end > 0 || total == 0); }

void global_avg_pool(const GlobalAvgPoolParams& p, int64_t begin, int64_t end) {
  if (whole(begin, end, p.N * p.C)) check(cuda::launch_global_avg_pool(p, nullptr), "global_avg_pool");
}
void small_linear(const SmallLinearParams& p, int64_t begin, int64_t end) {
  if (whole(begin, end, p.N)) check(cuda::launch_small_linears(&p, 1, nullptr), "small_linears");
}
void ensemble(const EnsembleParams& p, int64_t begin, int64_t end) {
  if (whole(begin, end, p.N)) check(cuda::launch_ensemble(p, nullptr), "ensemble");
}
void ensemble_stats(const EnsembleStatsParams& p, int64_t begin, int64_t end) {
  if (whole(begin, end, p.ensemble.N)) check(cuda::launch_ensemble_stats(p, nullptr), "ensemble_stats");
}
void ensemble_backward_logits(const EnsembleBackwardParams& p, int64_t begin, int64_t end) {
  EnsembleBackwardParams q = p;
  q.grad_weights = nullptr;
  if (whole(begin, end, p.N)) check(cuda::launch_ensemble_backward(q, nullptr), "ensemble_backward");
}
void ensemble_backward_weights(const EnsembleBackwardParams&, int64_t, int64_t) {}  // with the last step, below
void multi_exit_loss(const MultiExitLossParams& p, int64_t begin, int64_t end) {
  if (whole(begin, end, p.N)) check(cuda::launch_multi_exit_loss(p, nullptr), "multi_exit_loss");
}
void multi_exit_loss_grad(const MultiExitLossGradParams& p, int64_t begin, int64_t end) {
  if (whole(begin, end, p.loss.N)) check(cuda::launch_multi_exit_loss_grad(p, nullptr), "multi_exit_loss_grad");
}
void loss_grad_scale(const LossGradScaleParams& p, int64_t begin, int64_t end) {
  if (whole(begin, end, p.E * p.N)) check(cuda::launch_loss_grad_scale(p, nullptr), "loss_grad_scale");
}
void subset_correct(const SubsetCorrectParams& p, int64_t begin, int64_t end, int64_t* counts) {
  SubsetCorrectParams q = p;
  q.counts = counts;
  if (whole(begin, end, p.N)) check(cuda::launch_subset_correct(q, nullptr), "subset_correct");
}
void gate_judge(const GateParams&, int64_t, int64_t) {}
void gate_scatter(const GateParams&, int64_t, int64_t) {}

std::vector<emulated::Region> guarded_memory() {
  std::vector<emulated::Region> list;
  for (testing::Guarded* memory : testing::all_guarded()) list.push_back({memory->data(), memory->size()});
  return list;
}
const bool told = (emulated::regions = guarded_memory, true);

}  // namespace

const cpu::KernelTable& table() {
  static const cpu::KernelTable cuda_table = [] {
    cpu::KernelTable t = cpu::kScalarTable;  // what has no CUDA kernel stays
    t.name = "cuda, emulated";
    t.global_avg_pool = global_avg_pool;
    t.small_linear = small_linear;
    t.ensemble = ensemble;
    t.ensemble_stats = ensemble_stats;
    t.ensemble_backward_logits = ensemble_backward_logits;
    t.ensemble_backward_weights = ensemble_backward_weights;
    t.multi_exit_loss = multi_exit_loss;
    t.multi_exit_loss_grad = multi_exit_loss_grad;
    t.loss_grad_scale = loss_grad_scale;
    t.subset_correct = subset_correct;
    t.gate_judge = gate_judge;
    t.gate_scatter = gate_scatter;
    return t;
  }();
  return cuda_table;
}

void check(cudaError_t error, const char* what) {
  ++testing::checks;
  if (error == cudaSuccess) return;
  testing::report(__FILE__, __LINE__,
                  std::string(what) + ": error " + std::to_string(static_cast<int>(error)) + " " + emulated::fault());
  emulated::clear_fault();
}

int64_t gate_partition(const GateParams& p) {
  check(cuda::launch_gate(p, nullptr), "gate");
  return *p.count_out;
}

void ensemble_backward_weights_finish(const EnsembleBackwardParams& p) {
  EnsembleBackwardParams q = p;
  q.grad_logits = nullptr;
  check(cuda::launch_ensemble_backward(q, nullptr), "ensemble_backward");
}

void multi_exit_loss_reduce(const MultiExitLossReduceParams& p) {
  if (p.divisors) check(cuda::launch_multi_exit_loss_divisors(p, nullptr), "multi_exit_loss_divisors");
  check(cuda::launch_multi_exit_loss_reduce(p, nullptr), "multi_exit_loss_reduce");
}

int64_t find_bad_label(const int64_t* target, int64_t stride, int64_t N, int64_t K, const int64_t* ignore_index) {
  int64_t result = -7;
  check(cuda::launch_find_bad_label(target, stride, N, K, ignore_index, &result, nullptr), "find_bad_label");
  return result;
}

}  // namespace backend
