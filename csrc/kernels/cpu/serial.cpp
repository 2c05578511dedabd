// The parts that run once, on one thread, and are too small to need vectors: label checks, final sums, the gate's
// partition, scratch memory.
// Sums run in ascending order, in double, and are rounded once: they do not depend on how the rows were computed.
#include <stdint.h>
#include <stdlib.h>

#include <new>

#include "api.h"
#include "kernel_table.h"

namespace aep::kernels::cpu {
namespace {

template <class A>
A read(Scalar s) {
  return s.ptr ? *static_cast<const A*>(s.ptr) : static_cast<A>(s.value);
}

// What the mean divides by: cross entropies, and divergences.
template <class A>
void find_divisors(const MultiExitLossReduceParams& p, A (&divisors)[2]) {
  divisors[0] = divisors[1] = A(1);
  if (p.reduction != Reduction::mean) return;
  const A* class_weight = static_cast<const A*>(p.class_weight);
  double total = 0, count = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    const int64_t y = p.target ? p.target[n * p.target_stride] : 0;
    if (p.target && y == p.ignore_index) continue;
    total += p.target && class_weight ? static_cast<double>(class_weight[y]) : 1.0;
    count += 1;
  }
  // As F.cross_entropy: without any weight NaN, even where label smoothing leaves a loss to divide.
  divisors[0] = total == 0 ? static_cast<A>(__builtin_nan("")) : static_cast<A>(total);
  divisors[1] = count == 0 ? static_cast<A>(__builtin_nan("")) : static_cast<A>(count);
}

template <class A>
void write_divisors(const MultiExitLossReduceParams& p) {
  A divisors[2];
  find_divisors(p, divisors);
  for (int i = 0; i < 2; ++i) static_cast<A*>(p.divisors)[i] = divisors[i];
}

template <class A>
void reduce_losses(const MultiExitLossReduceParams& p) {
  const auto weight = [&](int i, int64_t e) {
    return p.weights[i] ? static_cast<const A*>(p.weights[i])[e] : static_cast<A>(p.weight);
  };
  A* loss = static_cast<A*>(p.loss);
  A divisors[2];
  find_divisors(p, divisors);
  if (p.reduction == Reduction::none) {
    for (int64_t n = 0; n < p.N; ++n) loss[n] = 0;
  } else {
    *loss = 0;
  }
  for (int i = 0; i < 3; ++i) {
    const A* rows = static_cast<const A*>(p.row_losses[i]);
    if (p.reduction == Reduction::none ? !rows : !p.losses[i]) continue;
    A sum = 0;
    for (int64_t e = 0; e < p.E; ++e, rows += p.N) {
      if (p.reduction == Reduction::none) {
        for (int64_t n = 0; n < p.N; ++n) loss[n] = loss[n] + weight(i, e) * rows[n];
        continue;
      }
      double total = 0;
      for (int64_t n = 0; n < p.N; ++n) total += static_cast<double>(rows[n]);
      const A own = static_cast<A>(total / static_cast<double>(divisors[i / 2]));
      static_cast<A*>(p.losses[i])[e] = own;
      sum = sum + weight(i, e) * own;
    }
    if (p.reduction != Reduction::none) *loss = *loss + sum;
  }
  if (p.divisors) write_divisors<A>(p);
}

template <class A>
void finish_weights(const EnsembleBackwardParams& p) {
  const A* partials = static_cast<const A*>(p.partials);
  A* out = static_cast<A*>(p.grad_weights);
  const int64_t chunks = ensemble_backward_chunks(p.N);
  for (int64_t e = 0; e < p.E; ++e) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += static_cast<double>(partials[chunk * p.E + e]);
    out[e] = static_cast<A>(total);
  }
}

}  // namespace

int64_t ensemble_backward_chunks(int64_t N) { return (N + kEnsembleChunkRows - 1) / kEnsembleChunkRows; }

void ensemble_backward_weights_finish(const EnsembleBackwardParams& p) {
  p.dtype == DType::f64 ? finish_weights<double>(p) : finish_weights<float>(p);
}

int64_t find_bad_label(const int64_t* target, int64_t stride, int64_t N, int64_t K, const int64_t* ignore_index) {
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = target[n * stride];
    if ((y < 0 || y >= K) && !(ignore_index && y == *ignore_index)) return n;
  }
  return -1;
}

void multi_exit_loss_reduce(const MultiExitLossReduceParams& p) {
  p.dtype == DType::f64 ? reduce_losses<double>(p) : reduce_losses<float>(p);
}

void multi_exit_loss_divisors(const MultiExitLossReduceParams& p) {
  p.dtype == DType::f64 ? write_divisors<double>(p) : write_divisors<float>(p);
}

size_t gate_scratch_bytes(int64_t n) { return static_cast<size_t>(n) * sizeof(GateRow); }

int64_t gate_partition(const GateParams& p) {
  GateRow* rows = static_cast<GateRow*>(p.scratch);
  int64_t stay = 0;
  for (int64_t n = 0; n < p.n; ++n) stay += !rows[n].leaves;
  int64_t next[2] = {0, stay};
  for (int64_t n = 0; n < p.n; ++n) rows[n].place = next[rows[n].leaves ? 1 : 0]++;
  *p.count_out = stay;
  if (p.dtype == DType::f64) {
    *static_cast<double*>(p.weight_sum_out) = read<double>(p.weight_sum) + read<double>(p.weight);
  } else {
    *static_cast<float*>(p.weight_sum_out) = read<float>(p.weight_sum) + read<float>(p.weight);
  }
  return stay;
}

void throw_bad_alloc() { throw std::bad_alloc(); }

void* allocate_scratch(size_t bytes) {
  constexpr size_t line = 64;
  void* memory = aligned_alloc(line, (bytes + line) / line * line);
  if (!memory) throw_bad_alloc();
  return memory;
}

void free_scratch(void* memory) { free(memory); }

}  // namespace aep::kernels::cpu
