// The small-size kernels in a row, to have their instructions counted by valgrind: benchmarks/callgrind.py runs this
// and reads the counts. Run by itself it only computes; it times nothing.
//
//   callgrind_kernels CALLS      one line for each case: its name. AEP_ISA chooses the instruction set.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "kernels/cpu/api.h"

using namespace aep::kernels;

// Valgrind is told these names: it sets its counts to zero when the first is entered and writes them down when the
// second is. They must stay functions of their own.
extern "C" __attribute__((noinline, visibility("default"))) void aep_count_begin() { asm volatile("" ::: "memory"); }
extern "C" __attribute__((noinline, visibility("default"))) void aep_count_end() { asm volatile("" ::: "memory"); }

namespace {

int calls = 100;

// Numbers of about the size of logits, the same everywhere.
std::vector<float> numbers(size_t count, uint64_t seed) {
  std::vector<float> values(count);
  uint64_t state = seed * 0x9E3779B97F4A7C15ull + 1;
  for (float& v : values) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    v = static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-29f;
  }
  return values;
}

std::vector<int64_t> labels(int64_t count, int64_t classes) {
  std::vector<int64_t> values(static_cast<size_t>(count));
  for (int64_t n = 0; n < count; ++n) values[static_cast<size_t>(n)] = n * 7 % classes;
  return values;
}

template <class F>
void count(const char* name, F&& call) {
  for (int i = 0; i < 3; ++i) call();  // the choice of the instruction set and the first allocations are not counted
  aep_count_begin();
  for (int i = 0; i < calls; ++i) call();
  aep_count_end();
  printf("%s\n", name);
}

void ensembles(const char* name, const char* stats_name, int64_t E, int64_t N, int64_t K) {
  const std::vector<float> logits = numbers(static_cast<size_t>(E * N * K), 1);
  const std::vector<float> weights(static_cast<size_t>(E), 0.25f);
  std::vector<float> out(static_cast<size_t>(N * K)), stats(static_cast<size_t>(N * 3));
  std::vector<int64_t> argmax(static_cast<size_t>(N));
  EnsembleStatsParams p{};
  p.ensemble = {logits.data(), weights.data(), out.data(), DType::f32, E, N, K, N * K, K, 1, K};
  p.normalizer = {nullptr, 1}, p.temperature = {nullptr, 1}, p.stats = stats.data(), p.argmax = argmax.data();
  count(name, [&] { cpu::ensemble(p.ensemble, 0, N); });
  count(stats_name, [&] { cpu::ensemble_stats(p, 0, N); });
}

void losses(const char* name, const char* backward_name, const char* both_name, int64_t E, int64_t N, int64_t K) {
  const size_t rows = static_cast<size_t>(E * N);
  const std::vector<float> logits = numbers(rows * static_cast<size_t>(K), 2), weights(static_cast<size_t>(E), 0.25f);
  const std::vector<int64_t> target = labels(N, K);
  std::vector<float> row_losses(rows), row_max(rows), row_sum(rows), exit_losses(static_cast<size_t>(E)), grad(logits.size());
  float loss = 0, denominator = 0;
  JointCrossEntropyParams p{};
  p.logits = logits.data(), p.target = target.data(), p.row_losses = row_losses.data();
  p.row_max = row_max.data(), p.row_sum = row_sum.data(), p.dtype = DType::f32, p.E = E, p.N = N, p.K = K;
  p.stride_e = N * K, p.stride_n = K, p.stride_k = 1, p.target_stride = 1, p.ignore_index = -100;
  JointCrossEntropyReduceParams r{};
  r.row_losses = row_losses.data(), r.exit_weights = weights.data(), r.target = target.data(), r.loss = &loss;
  r.exit_losses = exit_losses.data(), r.denominator = &denominator, r.dtype = DType::f32;
  r.reduction = Reduction::mean, r.E = E, r.N = N, r.K = K, r.target_stride = 1, r.ignore_index = -100;
  count(name, [&] {
    cpu::joint_cross_entropy(p, 0, E * N);
    cpu::joint_cross_entropy_reduce(r);
  });
  JointCrossEntropyBackwardParams b{};
  b.logits = logits.data(), b.target = target.data(), b.row_max = row_max.data(), b.row_sum = row_sum.data();
  b.coefficients = {weights.data(), nullptr, nullptr, &denominator, 0, 0, 0, 1};
  b.grad_logits = grad.data(), b.dtype = DType::f32, b.E = E, b.N = N, b.K = K;
  b.stride_e = N * K, b.stride_n = K, b.stride_k = 1, b.target_stride = 1;
  b.out_stride_e = N * K, b.out_stride_n = K, b.ignore_index = -100;
  count(backward_name, [&] { cpu::joint_cross_entropy_backward(b, 0, E * N); });
  JointCrossEntropyGradParams g{};
  g.loss = p, g.coefficients = b.coefficients, g.grad_logits = grad.data();
  g.out_stride_e = N * K, g.out_stride_n = K, g.out_stride_k = 1;
  count(both_name, [&] {
    cpu::joint_cross_entropy_grad(g, 0, E * N);
    cpu::joint_cross_entropy_reduce(r);
  });
}

void subsets(const char* name, int64_t E, int64_t N, int64_t K) {
  const std::vector<float> logits = numbers(static_cast<size_t>(E * N * K), 3), weights(static_cast<size_t>(E), 0.25f);
  const std::vector<int64_t> target = labels(N, K);
  std::vector<int64_t> counts(static_cast<size_t>(2 * ((1 << E) - 1)));
  SubsetCorrectParams p{};
  p.logits = logits.data(), p.weights = weights.data(), p.target = target.data(), p.dtype = DType::f32;
  p.E = E, p.N = N, p.K = K, p.stride_e = N * K, p.stride_n = K, p.stride_k = 1, p.target_stride = 1;
  count(name, [&] { cpu::subset_correct(p, 0, N, counts.data()); });
}

// One row, its features either kept (copied) or not.
void gate(const char* name, int64_t K, int64_t feature_bytes, double threshold) {
  const std::vector<float> features = numbers(static_cast<size_t>(feature_bytes / 4), 4),
                           running = numbers(static_cast<size_t>(K), 5), logits = numbers(static_cast<size_t>(K), 6);
  std::vector<float> features_out(features.size()), running_out(running.size()), stats(3);
  std::vector<char> scratch(cpu::gate_scratch_bytes(1));
  int64_t index = 0, index_out = 0, argmax = 0, stay = 0;
  float weight_sum = 0;
  GateParams p{};
  p.features = features.data(), p.running = running.data(), p.exit_logits = logits.data(), p.indices = &index;
  p.features_out = features_out.data(), p.running_out = running_out.data(), p.indices_out = &index_out;
  p.stats_out = stats.data(), p.argmax_out = &argmax, p.weight_sum_out = &weight_sum, p.count_out = &stay;
  p.scratch = scratch.data(), p.dtype = p.running_dtype = DType::f32, p.n = 1, p.K = K;
  p.running_stride_n = p.logits_stride_n = K;
  p.feature_row_bytes = p.feature_stride_bytes = p.feature_out_stride_bytes = feature_bytes;
  p.weight_sum = {nullptr, 0.3}, p.weight = {nullptr, 0.7}, p.temperature = {nullptr, 1};
  p.threshold = {nullptr, threshold}, p.policy = GatePolicy::confidence, p.on = GateOn::ensemble, p.enabled = true;
  count(name, [&] {
    cpu::gate_judge(p, 0, 1);
    cpu::gate_partition(p);
    cpu::gate_scatter(p, 0, 1);
  });
}

void pool(const char* name, int64_t C, int64_t side, bool channels_last) {
  const std::vector<float> input = numbers(static_cast<size_t>(C * side * side), 7);
  std::vector<float> output(static_cast<size_t>(C));
  GlobalAvgPoolParams p{};
  p.input = input.data(), p.output = output.data(), p.dtype = DType::f32, p.N = 1, p.C = C, p.H = p.W = side;
  p.stride_n = C * side * side, p.stride_c = channels_last ? 1 : side * side;
  p.stride_h = channels_last ? side * C : side, p.stride_w = channels_last ? C : 1;
  p.out_stride_n = C, p.out_stride_c = 1;
  count(name, [&] { cpu::global_avg_pool(p, 0, C); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || (calls = atoi(argv[1])) < 1) {
    fprintf(stderr, "usage: %s CALLS\n", argv[0]);
    return 2;
  }
  if (*cpu::isa_notice()) {
    fprintf(stderr, "%s\n", cpu::isa_notice());
    return 3;
  }
  printf("isa %s\n", cpu::isa_in_use());
  count("empty", [] { asm volatile("" ::: "memory"); });
  ensembles("ensemble-4-1-10", "ensemble_stats-4-1-10", 4, 1, 10);
  ensembles("ensemble-4-64-100", "ensemble_stats-4-64-100", 4, 64, 100);
  losses("joint_cross_entropy-4-64-10", "joint_cross_entropy_backward-4-64-10", "joint_cross_entropy_grad-4-64-10",
         4, 64, 10);
  losses("joint_cross_entropy-4-64-100", "joint_cross_entropy_backward-4-64-100", "joint_cross_entropy_grad-4-64-100",
         4, 64, 100);
  subsets("subset_correct-4-64-10", 4, 64, 10);
  gate("gate-1-10-stays", 10, 512 * 8 * 8 * 4, 2.0);
  gate("gate-1-10-leaves", 10, 512 * 8 * 8 * 4, 0.0);
  pool("global_avg_pool-1-512-8-8", 512, 8, false);
  pool("global_avg_pool-1-512-8-8-channels_last", 512, 8, true);
  return 0;
}
