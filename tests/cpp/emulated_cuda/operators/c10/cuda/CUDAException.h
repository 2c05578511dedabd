// In place of torch's header of this name: a failed launch raises, with what the emulation found.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <string>

#include "emulator.h"

#define C10_CUDA_CHECK(expression)                                                                        \
  do {                                                                                                    \
    const cudaError_t aep_error = (expression);                                                           \
    if (aep_error != cudaSuccess) {                                                                       \
      const std::string aep_fault = emulated::fault();                                                    \
      emulated::clear_fault();                                                                            \
      TORCH_CHECK(false, "emulated CUDA: error ", static_cast<int>(aep_error), " ", aep_fault);           \
    }                                                                                                     \
  } while (0)
