// The Python module _C: loading it registers the operators (the other files of this folder, with TORCH_LIBRARY), and it
// holds what is no tensor operation. What is known when it is built is in _build.<SOABI>.json beside the module.
#include <pybind11/pybind11.h>

#include "kernels/cpu/api.h"
#include "labels.h"
#ifdef AEP_WITH_CUDA
#include "cuda/graph.h"
#endif

PYBIND11_MODULE(_C, module) {
  namespace cpu = aep::kernels::cpu;
  module.doc() = "Native operators of aep_ext (torch.ops.aep) and facts about how they run.";
  module.def("isa_in_use", &cpu::isa_in_use, "The instruction set that the CPU kernels run with.");
  module.def("isa_supported", &cpu::isa_supported, "Those that this machine can run, comma-separated.");
  module.def("isa_notice", &cpu::isa_notice, "One line if AEP_ISA asked for one that cannot be had, else ''.");
  module.def("labels_asked", &aep::labels_asked, "Whether labels are checked where that means waiting for a device.");
  module.def("ask_labels", &aep::ask_labels, pybind11::arg("asked"), "For aep_ext.ops.check_labels.");
#ifdef AEP_WITH_CUDA
  aep::register_gated_graph(module);
#endif
}
