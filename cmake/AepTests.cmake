# One executable for each tests/cpp/*.cpp, without torch, run by ctest.
file(GLOB aep_test_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/*.cpp")
find_package(Threads REQUIRED)
foreach(source IN LISTS aep_test_sources)
  get_filename_component(name "${source}" NAME_WE)
  add_executable(${name} "${source}")
  target_include_directories(${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc" "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp")
  target_link_libraries(${name} PRIVATE aep_kernels Threads::Threads)
  add_test(NAME ${name} COMMAND ${name})
endforeach()

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
