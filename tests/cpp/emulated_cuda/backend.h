// The CUDA kernels behind the table of functions that the tests of the CPU kernels call: the same tests run on both.
// A device takes whole problems: the part of a range that begins at 0 stands for all of it.
#pragma once

#include "emulator.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cuda/api.h"

namespace backend {

using namespace aep::kernels;

constexpr bool kCuda = true;

const cpu::KernelTable& table();

void check(cudaError_t error, const char* what);

// The steps that the CPU takes on one thread.
int64_t gate_partition(const GateParams& p);
inline size_t gate_scratch_bytes(int64_t n) { return cuda::gate_scratch_bytes(n); }
void ensemble_backward_weights_finish(const EnsembleBackwardParams& p);
void multi_exit_loss_reduce(const MultiExitLossReduceParams& p);
int64_t find_bad_label(const int64_t* target, int64_t stride, int64_t N, int64_t K, const int64_t* ignore_index);

}  // namespace backend
