// The tensors that operators write: new ones, or those that the caller gave (the `out` overloads).
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace aep {

using at::Tensor;

// A new dense tensor on the device of `like`, for kernels that write all of it.
Tensor fresh(at::IntArrayRef sizes, at::ScalarType type, const Tensor& like,
             at::MemoryFormat format = at::MemoryFormat::Contiguous);

// `name`: which of several results, "" for the only one.
// `out` after checks (dtype, shape, device, dense in `format`; nothing is resized), or a new tensor where it is null.
Tensor result(const char* op, const char* name, const Tensor* out, at::IntArrayRef sizes, at::ScalarType type,
              const Tensor& like, at::MemoryFormat format = at::MemoryFormat::Contiguous);

struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // null: not there
};
// Raises where the memory of an output may meet that of an input or of another output. What counts is the range from a
// tensor's first to its last element.
void check_apart(const char* op, std::initializer_list<NamedTensor> outputs, std::initializer_list<NamedTensor> inputs);

}  // namespace aep
