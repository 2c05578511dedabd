// A stream of one's own to capture on, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace aep {

void register_capture_stream(pybind11::module_& module);

}  // namespace aep
