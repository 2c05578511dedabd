#include "results.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace aep {

namespace {

// From 32 MiB on (the highest value of glibc's moving threshold) every allocation is a mapping of its own: its pages are
// new each time, and a fault per 4 KiB costs more than the kernels. Ask for large pages; it is a hint and may be
// ignored.
constexpr size_t kOwnMapping = size_t{32} << 20, kLargePage = size_t{2} << 20;

void ask_for_large_pages(void* memory, size_t bytes) {
#ifdef __linux__
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (begin < end) {
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace

Tensor fresh(at::IntArrayRef sizes, at::ScalarType type, const Tensor& like, at::MemoryFormat format) {
  if (!like.is_cpu()) {
    return at::empty(sizes, like.options().dtype(type), format);
  }
  // Straight from the allocator: by way of the dispatcher it takes twice as long, which shows at batch 1.
  const Tensor tensor = at::detail::empty_cpu(sizes, type, /*pin_memory=*/false, format);
  if (tensor.nbytes() >= kOwnMapping) {
    ask_for_large_pages(tensor.mutable_data_ptr(), tensor.nbytes());
  }
  return tensor;
}

}  // namespace aep
