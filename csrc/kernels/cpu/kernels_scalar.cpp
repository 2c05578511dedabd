// The kernels for scalar; compiled with the baseline of the target: runs anywhere, on any architecture.
#define AEP_ISA_NAMESPACE isa_scalar
#define AEP_ISA_TABLE kScalarTable
#define AEP_ISA_NAME "scalar"

#include "vec_scalar.h"

#include "kernel_table.h"
#include "kernels.inl.h"
