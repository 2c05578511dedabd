// The CUDA kernels, as the torch layer sees them. No torch types.
//
// Every function enqueues work on `stream` of the current device and returns without waiting; it allocates nothing and
// never synchronises.
// Results are deterministic: no floating-point atomics, fixed orders of additions. Empty inputs (N == 0) are fine.
// The return value is that of the launch (cudaGetLastError): report it, results are undefined unless it is cudaSuccess.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "../params.h"

namespace aep::kernels::cuda {

cudaError_t launch_global_avg_pool(const GlobalAvgPoolParams& p, cudaStream_t stream);
// `count` poolings of one dtype, one launch for each kPoolsPerLaunch of them. A result depends on its own parameters
// only.
constexpr int kPoolsPerLaunch = 16;
cudaError_t launch_global_avg_pools(const GlobalAvgPoolParams* pools, int64_t count, cudaStream_t stream);

// `count` linear layers of one dtype and of few rows each, one launch for each kSmallLinearsPerLaunch of them. A result
// depends on its own parameters only.
constexpr int kSmallLinearsPerLaunch = 16;
cudaError_t launch_small_linears(const SmallLinearParams* layers, int64_t count, cudaStream_t stream);

cudaError_t launch_ensemble(const EnsembleParams& p, cudaStream_t stream);
cudaError_t launch_ensemble_stats(const EnsembleStatsParams& p, cudaStream_t stream);
// Writes grad_logits and grad_weights, each unless null; grad_weights needs `partials`.
cudaError_t launch_ensemble_backward(const EnsembleBackwardParams& p, cudaStream_t stream);

// result (device, one value): the index of the first label outside 0 .. K-1 and different from *ignore_index (null: no
// such label), else -1.
// For the checked mode; reading the result is the caller's synchronisation.
cudaError_t launch_find_bad_label(const int64_t* target, int64_t stride, int64_t N, int64_t K,
                                  const int64_t* ignore_index, int64_t* result, cudaStream_t stream);
// A label out of range: NaN loss, zero gradient in that row, no read out of bounds.
cudaError_t launch_multi_exit_loss(const MultiExitLossParams& p, cudaStream_t stream);
cudaError_t launch_multi_exit_loss_reduce(const MultiExitLossReduceParams& p, cudaStream_t stream);
// The gradient, with the losses or from what they have kept; the divisors first, where the coefficients point to them.
cudaError_t launch_multi_exit_loss_divisors(const MultiExitLossReduceParams& p, cudaStream_t stream);
cudaError_t launch_multi_exit_loss_grad(const MultiExitLossGradParams& p, cudaStream_t stream);
cudaError_t launch_loss_grad_scale(const LossGradScaleParams& p, cudaStream_t stream);

// Adds to p.counts (integer atomics). A label out of range is wrong at every k.
cudaError_t launch_subset_correct(const SubsetCorrectParams& p, cudaStream_t stream);

// The whole gate (judge, partition, scatter). p.scratch: gate_scratch_bytes(n) bytes of device memory. count_out stays
// on the device.
size_t gate_scratch_bytes(int64_t n);
cudaError_t launch_gate(const GateParams& p, cudaStream_t stream);

}  // namespace aep::kernels::cuda
