// The tensors that operators write.
#pragma once

#include <ATen/core/Tensor.h>

namespace aep {

using at::Tensor;

// A new dense tensor on the device of `like`, for kernels that write all of it.
Tensor fresh(at::IntArrayRef sizes, at::ScalarType type, const Tensor& like,
             at::MemoryFormat format = at::MemoryFormat::Contiguous);

}  // namespace aep
