# A _C of csrc/torch without csrc/torch/cpu, whose CUDA operators are registered for CPU tensors and whose kernels are
# run by the emulation: the CUDA path of the operators, but for graphs, tested where no GPU is (tests/emulated).
file(GLOB aep_operator_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/torch/*.cpp"
     "${CMAKE_CURRENT_SOURCE_DIR}/csrc/torch/cuda/*.cpp")
list(FILTER aep_operator_sources EXCLUDE REGEX "/(module|graph[^/]*)[.]cpp$")
set(aep_stand_ins "${aep_emulation}/operators")

add_library(emulated_operators OBJECT ${aep_operator_sources})
set_target_properties(emulated_operators PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
target_compile_options(emulated_operators PRIVATE "SHELL:-include \"${aep_stand_ins}/as_cuda.h\"")
add_library(emulated_C MODULE "${aep_stand_ins}/module.cpp" $<TARGET_OBJECTS:emulated_operators>)
target_link_libraries(emulated_C PRIVATE aep_emulated_kernels c10 torch torch_cpu torch_python)
target_link_directories(emulated_C PRIVATE ${AEP_TORCH_LIBRARY_DIRS})
set_target_properties(emulated_C PROPERTIES PREFIX "" OUTPUT_NAME _C SUFFIX "${AEP_MODULE_SUFFIX}" SKIP_BUILD_RPATH ON
                                            LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/emulated_module")
foreach(target IN ITEMS emulated_operators emulated_C)
  target_include_directories(${target} BEFORE PRIVATE "${aep_stand_ins}" "${aep_emulation}"
                                                      "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  target_include_directories(${target} SYSTEM PRIVATE ${AEP_TORCH_INCLUDE_DIRS} "${AEP_PYTHON_INCLUDE_DIR}")
  target_compile_definitions(${target} PRIVATE NDEBUG TORCH_EXTENSION_NAME=_C
                                               _GLIBCXX_USE_CXX11_ABI=${AEP_TORCH_CXX11_ABI})
  # Most of the time is torch's headers; what is left is not what takes time when it runs.
  target_compile_options(${target} PRIVATE -O0)
endforeach()
