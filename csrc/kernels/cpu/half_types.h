// Storage-only types of two bytes. Conversions live in each instruction set's own namespace (vec_*.h), never here.
#pragma once

#include <stdint.h>

namespace aep::kernels::cpu {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace aep::kernels::cpu
