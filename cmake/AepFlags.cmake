# Flags that every file of the project is compiled with.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# -O3 is ours to give: CMake's own Release flags add nothing else but NDEBUG, which the C++ tests must not have.
set(CMAKE_CXX_FLAGS_RELEASE "-O3")

# C++20 is what the headers of torch 2.13 and later ask for. Given as a flag, since CMake before 3.26 refuses CUDA20 for
# compilers that have it.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-std=c++20> $<$<COMPILE_LANGUAGE:CUDA>:--std=c++20>)

# No contraction: a weighted sum is rounded products added in order, so that native sums equal the reference's bit for bit.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off> $<$<COMPILE_LANGUAGE:CXX>:-fno-math-errno>
                    $<$<COMPILE_LANGUAGE:CXX>:-Wall>)

if(AEP_SANITIZE)
  set(aep_sanitize_flags -fsanitize=${AEP_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  if(CMAKE_BUILD_TYPE STREQUAL "Release")
    # With -O3 the vector units, templates all, take half an hour and gigabytes to compile under sanitizers.
    list(APPEND aep_sanitize_flags -O1 -g1 -fno-var-tracking)
  endif()
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${aep_sanitize_flags}>")
  add_link_options(-fsanitize=${AEP_SANITIZE})
endif()
