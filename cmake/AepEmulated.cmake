# The CUDA kernels, compiled by the C++ compiler and run by an emulation of CUDA's execution model. (Kernels of graphs
# need the toolkit's own API.)
set(aep_emulation "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/emulated_cuda")
file(GLOB aep_emulated_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels/cuda/*.cu")
list(FILTER aep_emulated_sources EXCLUDE REGEX "/graph[^/]*$")
set(aep_emulated_units "")
foreach(source IN LISTS aep_emulated_sources)
  get_filename_component(name "${source}" NAME_WE)
  file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/emulated_cuda/${name}.cpp" CONTENT "#include \"${source}\"\n")
  list(APPEND aep_emulated_units "${CMAKE_CURRENT_BINARY_DIR}/emulated_cuda/${name}.cpp")
endforeach()
add_library(aep_emulated_kernels STATIC ${aep_emulated_units} "${aep_emulation}/emulator.cpp")
target_include_directories(aep_emulated_kernels BEFORE PUBLIC
                           "${aep_emulation}" "${CMAKE_CURRENT_SOURCE_DIR}/csrc"
                           "${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels")
# Unoptimised, half of the tests' time would be spent in the kernels. Optimised further, gcc moves a 16-byte load that
# needs an aligned address in front of the question whether there is one, since its other branch reads the same bytes.
target_compile_options(aep_emulated_kernels PRIVATE -Wno-unknown-pragmas -O1)
set_property(SOURCE "${aep_emulation}/emulator.cpp" PROPERTY COMPILE_OPTIONS -O2 -fno-sanitize=all)
if(AEP_SANITIZE MATCHES "address")
  set_property(SOURCE "${aep_emulation}/emulator.cpp" PROPERTY COMPILE_DEFINITIONS AEP_FIBERS_UNDER_ASAN=1)
endif()
