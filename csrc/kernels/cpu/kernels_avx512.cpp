// The kernels for avx512; compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#define AEP_ISA_NAMESPACE isa_avx512
#define AEP_ISA_TABLE kAvx512Table
#define AEP_ISA_NAME "avx512"

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics: "__Y is used uninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "vec_avx512.h"

#include "kernel_table.h"
#include "kernels.inl.h"
