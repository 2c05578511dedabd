// The CPU kernels, as the torch layer sees them. No torch types; nothing here starts a thread.
//
// The caller may split a range [begin, end) in any way over any threads: each row's result is computed on its own and
// in a fixed order, so results depend neither on the split nor on the thread count. Arguments are trusted: check
// shapes, dtypes and labels first.
// All functions may throw std::bad_alloc (scratch memory) and nothing else. Empty ranges are fine.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../params.h"

namespace aep::kernels::cpu {

// Instruction sets: "scalar"; "avx2" and "avx512" on x86-64, "neon" on AArch64.
// In use: chosen once, on first use: the best that is built and supported, or the one that AEP_ISA names where that is
// possible.
const char* isa_in_use();
// One line if AEP_ISA asked for what cannot be had, else "".
const char* isa_notice();
// Comma-separated names, ascending: compiled into this library; usable on this CPU and operating system.
const char* isa_built();
const char* isa_supported();

// Items are (n, c) pairs, flattened: item = n * C + c, 0 <= begin <= end <= N * C.
void global_avg_pool(const GlobalAvgPoolParams& p, int64_t begin, int64_t end);

// Rows 0 .. N.
void small_linear(const SmallLinearParams& p, int64_t begin, int64_t end);

// Rows 0 .. N.
void ensemble(const EnsembleParams& p, int64_t begin, int64_t end);
void ensemble_stats(const EnsembleStatsParams& p, int64_t begin, int64_t end);

// Rows 0 .. N, for grad_logits.
void ensemble_backward_logits(const EnsembleBackwardParams& p, int64_t begin, int64_t end);
// For grad_weights: chunks 0 .. ensemble_backward_chunks(N) into p.partials, then, once all are done, the final sum on
// one thread.
int64_t ensemble_backward_chunks(int64_t N);
void ensemble_backward_weights(const EnsembleBackwardParams& p, int64_t chunk_begin, int64_t chunk_end);
void ensemble_backward_weights_finish(const EnsembleBackwardParams& p);

// Index of the first label outside 0 .. K-1; -1 if there is none. Labels equal to *ignore_index are fine (null: no such
// label).
int64_t find_bad_label(const int64_t* target, int64_t stride, int64_t N, int64_t K, const int64_t* ignore_index);

// Samples 0 .. N.
void multi_exit_loss(const MultiExitLossParams& p, int64_t begin, int64_t end);
// The gradient, with the losses in the same pass or from what theirs has kept; multi_exit_loss_divisors() first, where the
// coefficients point to them.
void multi_exit_loss_grad(const MultiExitLossGradParams& p, int64_t begin, int64_t end);
void multi_exit_loss_divisors(const MultiExitLossReduceParams& p);
// Once all samples are done, on one thread.
void multi_exit_loss_reduce(const MultiExitLossReduceParams& p);
// Rows 0 .. E * N, row = e * N + n.
void loss_grad_scale(const LossGradScaleParams& p, int64_t begin, int64_t end);

// Samples 0 .. N; adds to `counts` (2^E - 1, 2), which replaces p.counts, so that every thread can have its own (sums
// of integers do not depend on the order). Cut N into few large pieces (64 samples and more each): a call has a fixed
// cost of its own.
void subset_correct(const SubsetCorrectParams& p, int64_t begin, int64_t end, int64_t* counts);

// The gate, in three steps with a barrier between them:
//   1. gate_judge: rows 0 .. n, into scratch;
//   2. gate_partition on one thread: places of the rows, count_out, weight_sum_out; returns the count;
//   3. gate_scatter: rows 0 .. n, into all other outputs.
size_t gate_scratch_bytes(int64_t n);
void gate_judge(const GateParams& p, int64_t begin, int64_t end);
int64_t gate_partition(const GateParams& p);
void gate_scatter(const GateParams& p, int64_t begin, int64_t end);

// One row by itself; nothing is allocated.
void gate_one(const GateOneParams& p);

}  // namespace aep::kernels::cpu
