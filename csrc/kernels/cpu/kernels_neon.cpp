// The kernels for neon; compiled with the baseline of AArch64, of which NEON is a part.
#define AEP_ISA_NAMESPACE isa_neon
#define AEP_ISA_TABLE kNeonTable
#define AEP_ISA_NAME "neon"

#include "vec_neon.h"

#include "kernel_table.h"
#include "kernels.inl.h"
