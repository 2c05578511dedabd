// What the operators on the CPU have in common: work shared out over threads, and the check of labels.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "../labels.h"
#include "kernels/cpu/api.h"

namespace aep {

using at::Tensor;

// Elements a thread should at least get: a parallel region costs about a microsecond, and far more on busy cores.
inline constexpr int64_t kGrain = 32768;

// Calls f(begin, end) for parts of `items`, of which each touches `elements` numbers; work for one thread goes to f
// directly, since even entering a parallel region shows at batch 1.
template <class F>
void share(int64_t items, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  if (items <= grain) {
    f(0, items);
  } else {
    at::parallel_for(0, items, grain, f);
  }
}

// Raises for the first label that is neither a class nor (if given) ignored, before anything is written.
inline void check_labels(const char* op, const Tensor& target, int64_t classes, const int64_t* ignore_index) {
  const auto* labels = target.const_data_ptr<int64_t>();
  const int64_t position = kernels::cpu::find_bad_label(labels, target.stride(0), target.size(0), classes, ignore_index);
  if (position >= 0) {
    refuse_label(op, labels[position * target.stride(0)], position, classes, ignore_index != nullptr);
  }
}

}  // namespace aep
