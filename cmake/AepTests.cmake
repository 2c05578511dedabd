# One executable for each tests/cpp/*.cpp, without torch, run by ctest.
file(GLOB aep_test_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/*.cpp")
if(CMAKE_CROSSCOMPILING)
  list(FILTER aep_test_sources EXCLUDE REGEX "/test_([^/]*cuda[^/]*|gated_exit|graph)[.]cpp$")
endif()
find_package(Threads REQUIRED)
foreach(source IN LISTS aep_test_sources)
  get_filename_component(name "${source}" NAME_WE)
  add_executable(${name} "${source}")
  target_include_directories(${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc" "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp")
  target_link_libraries(${name} PRIVATE aep_kernels Threads::Threads)
  add_test(NAME ${name} COMMAND ${name})
endforeach()

# The tests of the CPU kernels once more, on the emulated CUDA kernels. (Another processor would show nothing new.)
if(NOT CMAKE_CROSSCOMPILING)
  add_library(aep_emulated_cuda STATIC "${aep_emulation}/backend.cpp")
  target_compile_definitions(aep_emulated_cuda PUBLIC AEP_TEST_CUDA=1)
  target_include_directories(aep_emulated_cuda BEFORE PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp")
  target_link_libraries(aep_emulated_cuda PUBLIC aep_emulated_kernels aep_kernels)
  foreach(name IN ITEMS ensemble gate global_avg_pool joint_cross_entropy small_linear subset_correct)
    add_executable(cuda_${name} "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/test_${name}.cpp")
    target_link_libraries(cuda_${name} PRIVATE aep_emulated_cuda)
    add_test(NAME cuda_${name} COMMAND cuda_${name})
  endforeach()
  target_link_libraries(test_cuda_kernels PRIVATE aep_emulated_cuda)
  target_link_libraries(test_emulated_cuda PRIVATE aep_emulated_cuda)
  target_link_libraries(test_gated_exit PRIVATE aep_emulated_cuda)

  # The composition of the gated graph, on a runtime that records what it is told.
  set(aep_mocked_unit "${CMAKE_CURRENT_BINARY_DIR}/mocked_graph/graph.cpp")
  file(CONFIGURE OUTPUT "${aep_mocked_unit}"
       CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels/cuda/graph.cu\"\n")
  target_sources(test_graph PRIVATE "${aep_mocked_unit}")
  target_include_directories(
    test_graph BEFORE PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/mocked_graph" "${CMAKE_CURRENT_SOURCE_DIR}/csrc"
                              "${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels")
endif()

# test_contract also holds tests/cpp/units/contract.cpp once for every instruction set, each with its own flags.
foreach(isa IN LISTS aep_isa_built)
  if(isa STREQUAL "scalar")
    continue()
  endif()
  add_library(contract_${isa} OBJECT "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/units/contract.cpp")
  target_include_directories(contract_${isa} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  target_compile_definitions(contract_${isa} PRIVATE AEP_UNIT=${isa} "AEP_UNIT_HEADER=\"kernels/cpu/vec_${isa}.h\"")
  target_compile_options(contract_${isa} PRIVATE ${aep_isa_${isa}_flags})
  target_link_libraries(test_contract PRIVATE contract_${isa})
endforeach()

# Counted by benchmarks/callgrind.py; here so that a change of the kernels' interface is not forgotten there.
add_executable(callgrind_kernels "${CMAKE_CURRENT_SOURCE_DIR}/benchmarks/callgrind_kernels.cpp")
target_include_directories(callgrind_kernels PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
target_link_libraries(callgrind_kernels PRIVATE aep_kernels)
add_test(NAME callgrind_kernels COMMAND callgrind_kernels 1)
