#include "results.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>

#include "checks.h"

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

struct Range {
  uintptr_t begin, end;
};

Range range_of(const Tensor& tensor) {
  if (tensor.numel() == 0) {
    return {0, 0};
  }
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    last += (tensor.size(i) - 1) * tensor.stride(i);
  }
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + (static_cast<uintptr_t>(last) + 1) * tensor.element_size()};
}

std::string name_of_out(const char* name) { return *name ? std::string("out ") + name : "out"; }

void apart(const char* op, const NamedTensor& out, const NamedTensor& other) {
  if (out.tensor == nullptr || other.tensor == nullptr || !other.tensor->defined()) {
    return;
  }
  const Range a = range_of(*out.tensor), b = range_of(*other.tensor);
  TORCH_CHECK_VALUE(a.end <= b.begin || b.end <= a.begin, "aep::", op, ": ", name_of_out(out.name),
                    " must not share memory with ", other.name, ", got overlapping memory");
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

Tensor result(const char* op, const char* name, const Tensor* out, at::IntArrayRef sizes, at::ScalarType type,
              const Tensor& like, at::MemoryFormat format) {
  if (out == nullptr) {
    return fresh(sizes, type, like, format);
  }
  const std::string called = name_of_out(name);
  check_dtype(op, called.c_str(), *out, type);
  check_shape(op, called.c_str(), *out, sizes);
  check_device(op, called.c_str(), *out, like.device());
  TORCH_CHECK_VALUE(out->is_contiguous(format), "aep::", op, ": ", called, " must be contiguous",
                    format == at::MemoryFormat::Contiguous ? "" : " in the memory format of the input",
                    ", got strides ", out->strides());
  return *out;
}

void check_apart(const char* op, std::initializer_list<NamedTensor> outputs,
                 std::initializer_list<NamedTensor> inputs) {
  for (const NamedTensor* out = outputs.begin(); out != outputs.end(); ++out) {
    for (const NamedTensor& input : inputs) {
      apart(op, *out, input);
    }
    for (const NamedTensor* other = out + 1; other != outputs.end(); ++other) {
      const std::string name = name_of_out(other->name);
      apart(op, *out, {name.c_str(), other->tensor});
    }
  }
}

}  // namespace aep
