# _C: the Python module. torch's paths are handed over by setup.py from torch.utils.cpp_extension: torch's own CMake
# package fails where the CUDA toolkit is partial, even for a CPU build.
foreach(name IN ITEMS AEP_TORCH_INCLUDE_DIRS AEP_TORCH_LIBRARY_DIRS AEP_PYTHON_INCLUDE_DIR AEP_MODULE_SUFFIX)
  if(NOT ${name})
    message(FATAL_ERROR "AEP_BUILD_TORCH=ON needs -D${name}=...; `pip install -e . --no-build-isolation` passes it")
  endif()
endforeach()

file(GLOB aep_module_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/torch/*.cpp"
     "${CMAKE_CURRENT_SOURCE_DIR}/csrc/torch/cpu/*.cpp")
# Nearly all the time is torch's headers and the templates they bring, the same in every file: so these files are compiled
# as one (some 45 s of CPU time instead of 200). Names in anonymous namespaces must therefore differ between files.
set_source_files_properties(${aep_module_sources} PROPERTIES UNITY_GROUP cpu)
if(AEP_CUDA)
  file(GLOB aep_module_cuda_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/torch/cuda/*.cpp")
  list(APPEND aep_module_sources ${aep_module_cuda_sources})
endif()

add_library(_C MODULE ${aep_module_sources})
set_target_properties(_C PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
if(NOT AEP_CUDA)
  # That one takes longest, and ninja would begin with the kernels: they leave a core to it.
  cmake_host_system_information(RESULT aep_cores QUERY NUMBER_OF_LOGICAL_CORES)
  if(aep_cores GREATER 1)
    math(EXPR aep_cores "${aep_cores} - 1")
  endif()
  set_property(GLOBAL APPEND PROPERTY JOB_POOLS aep_kernels=${aep_cores})
  set_property(TARGET aep_kernels PROPERTY JOB_POOL_COMPILE aep_kernels)
endif()
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX "${AEP_MODULE_SUFFIX}" SKIP_BUILD_RPATH ON)
target_link_libraries(_C PRIVATE aep_kernels)
target_include_directories(_C PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
target_include_directories(_C SYSTEM PRIVATE ${AEP_TORCH_INCLUDE_DIRS} "${AEP_PYTHON_INCLUDE_DIR}")
target_compile_definitions(_C PRIVATE NDEBUG TORCH_EXTENSION_NAME=_C _GLIBCXX_USE_CXX11_ABI=${AEP_TORCH_CXX11_ABI})
target_link_directories(_C PRIVATE ${AEP_TORCH_LIBRARY_DIRS})
target_link_libraries(_C PRIVATE c10 torch torch_cpu torch_python)
if(AEP_CUDA)
  target_link_libraries(_C PRIVATE c10_cuda torch_cuda)
  # Headers that ATen pulls in (cusparse.h and others) may be in pip's wheels only. They are searched last: the toolkit's
  # own headers must match its compiler.
  foreach(dir IN LISTS AEP_CUDA_EXTRA_INCLUDE_DIRS)
    target_compile_options(_C PRIVATE "SHELL:-idirafter \"${dir}\"")
  endforeach()
endif()

# at::parallel_for is a header template and silently serial without -fopenmp. Only the compiler gets the flag: the symbols
# of OpenMP then resolve to the libgomp that torch has loaded, and no second runtime with its own threads comes in.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(_C PRIVATE -fopenmp)
  set(aep_parallel "OpenMP (torch's libgomp)")
else()
  set(aep_parallel "serial: ${CMAKE_CXX_COMPILER_ID} has another OpenMP runtime than torch; build with GCC for threads")
endif()
if(APPLE)
  target_link_options(_C PRIVATE -undefined dynamic_lookup)
endif()
