# aep_facts.json: what was decided here and is shown later by aep_ext.build_info().
string(REPLACE ";" "\", \"" aep_isa_json "${aep_isa_built}")
set(aep_cuda_json "null")
if(AEP_CUDA)
  set(aep_cuda_json "\"${CMAKE_CUDA_COMPILER_VERSION}\"")
endif()
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/aep_facts.json" "{
  \"compiler\": \"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\",
  \"processor\": \"${CMAKE_SYSTEM_PROCESSOR}\",
  \"isa_built\": [\"${aep_isa_json}\"],
  \"parallel\": \"${aep_parallel}\",
  \"sanitize\": \"${AEP_SANITIZE}\",
  \"cuda_compiler\": ${aep_cuda_json}
}
")
