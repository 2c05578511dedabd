// The vector types, operation by operation: units/contract.cpp, compiled for every instruction set that is built.
#include "testing.h"

using namespace testing;

extern "C" {
#ifdef AEP_HAVE_AVX2
int aep_contract_avx2();
#endif
#ifdef AEP_HAVE_AVX512
int aep_contract_avx512();
#endif
#ifdef AEP_HAVE_NEON
int aep_contract_neon();
#endif
}

int main() {
  const auto check = [](const char* name, int (*contract)()) {
    if (cpu::find_table(name)) CHECK(contract() == 0, "%s", name);
  };
  CHECK(cpu::find_table("scalar") != nullptr);
#ifdef AEP_HAVE_AVX2
  check("avx2", aep_contract_avx2);
#endif
#ifdef AEP_HAVE_AVX512
  check("avx512", aep_contract_avx512);
#endif
#ifdef AEP_HAVE_NEON
  check("neon", aep_contract_neon);
#endif
  (void)check;
  return finish("test_contract");
}
