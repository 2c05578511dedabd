// The kernels for avx2; compiled with -mavx2 -mfma -mf16c.
#define AEP_ISA_NAMESPACE isa_avx2
#define AEP_ISA_TABLE kAvx2Table
#define AEP_ISA_NAME "avx2"

#include "vec_avx2.h"

#include "kernel_table.h"
#include "kernels.inl.h"
