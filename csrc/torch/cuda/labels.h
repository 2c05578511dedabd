// The check of labels on CUDA, for whoever asks for it.
#pragma once

#include <ATen/core/Tensor.h>

namespace aep {

using at::Tensor;

// Where aep_ext.ops.check_labels is on: raises for the first label that is neither a class nor (if given) ignored, as
// the CPU does. This waits for the current stream of the current device, which must be the target's; a stream that is
// being captured cannot be waited for, so that is an error of its own. Otherwise nothing happens, and nothing waits.
void check_labels_if_asked(const char* op, const Tensor& target, int64_t classes, const int64_t* ignore_index);

}  // namespace aep
