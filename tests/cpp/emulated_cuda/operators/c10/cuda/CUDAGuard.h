// In place of torch's header of this name: the one device is current. It says so where a kernel is launched for tensors
// of another.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(c10::Device device) {
    TORCH_CHECK(device.type() == c10::kCPU, "a device guard for ", device, " in an emulation on the CPU");
  }
};

class OptionalCUDAGuard {
 public:
  void set_device(c10::Device device) { CUDAGuard{device}; }
};

}  // namespace c10::cuda
