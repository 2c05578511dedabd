// The Python module _C of the emulation: as csrc/torch/module.cpp, whose facts are about kernels that are not in here.
#include <pybind11/pybind11.h>

#include <stdlib.h>
#include <string.h>

#include "emulator.h"
#include "torch/labels.h"

namespace {

// The tensors that a kernel writes are not known to the emulation, so that each runs once, in this order.
emulated::Order wanted_order() {
  const char* name = getenv("AEP_EMULATED_ORDER");
  if (name && strcmp(name, "reverse") == 0) return emulated::Order::reverse;
  if (name && strcmp(name, "shuffled") == 0) return emulated::Order::shuffled;
  return emulated::Order::forward;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  emulated::order_without_regions = wanted_order();
  module.doc() = "The CUDA operators of aep_ext on CPU tensors, their kernels run by an emulation. For tests.";
  module.def("isa_in_use", [] { return "cuda-emulated"; });
  module.def("isa_supported", [] { return "cuda-emulated"; });
  module.def("isa_notice", [] { return ""; });
  module.def("labels_asked", &aep::labels_asked);
  module.def("ask_labels", &aep::ask_labels);
  module.def("launches", &emulated::launches, "Kernels launched since the start.");
}
