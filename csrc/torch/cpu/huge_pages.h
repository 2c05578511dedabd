// Large results in huge pages. The C library gives memory of this size fresh from the system, and touching it in pages
// of 4 KB costs far more than filling it.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace aep {

// From this size on, malloc maps memory for one allocation alone and unmaps it with it (the largest value that glibc's
// own threshold grows to): the advice ends with the tensor.
constexpr size_t kHugePagesFrom = size_t{32} << 20;

// Advice only: where the system has none to give, nothing changes. Call before the first write.
inline void advise_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (fresh.nbytes() < kHugePagesFrom) {
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + page - 1) & ~(page - 1), last = (begin + fresh.nbytes()) & ~(page - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace aep
