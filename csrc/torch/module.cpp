// The Python module _C: loading it registers the operators (the other files of this folder, with TORCH_LIBRARY), and it
// holds what is no tensor operation. What is known when it is built is in _build.<SOABI>.json beside the module.
#include <pybind11/pybind11.h>

#include "kernels/cpu/api.h"
#ifdef AEP_WITH_CUDA
#include "cuda/graph.h"
#endif

PYBIND11_MODULE(_C, module) {
  namespace cpu = aep::kernels::cpu;
  module.doc() = "Native operators of aep_ext (torch.ops.aep) and facts about how they run.";
  module.def("isa_in_use", &cpu::isa_in_use, "The instruction set that the CPU kernels run with.");
  module.def("isa_supported", &cpu::isa_supported, "Those that this machine can run, comma-separated.");
  module.def("isa_notice", &cpu::isa_notice, "One line if AEP_ISA asked for one that cannot be had, else ''.");
#ifdef AEP_WITH_CUDA
  aep::register_gated_graph(module);
#endif
}
