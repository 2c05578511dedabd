// Put before each file of csrc/torch: what is registered for CUDA tensors gets those of the CPU, which take every turn
// that is CUDA's.
#pragma once

#include "torch_headers.h"

#define CUDA CPU         // TORCH_LIBRARY_IMPL(aep, CUDA, ...)
#define is_cpu is_meta   // no
#define is_cuda defined  // yes
