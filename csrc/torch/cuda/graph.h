// The gated CUDA graph for Python: a handle that holds no tensor operation of its own but launches.
#pragma once

#include <pybind11/pybind11.h>

namespace aep {

void register_gated_graph(pybind11::module_& module);

}  // namespace aep
