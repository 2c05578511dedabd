// The choice of the instruction set. Runs itself again with AEP_ISA set, since the choice is made once in a process.
#include "testing.h"

using namespace testing;

int main(int argc, char** argv) {
  if (argc > 1) {  // the child: what was asked for, and what must be in use ("" = only not what was asked)
    const std::string asked = argv[1], got = cpu::isa_in_use();
    const bool available = cpu::find_table(asked.c_str()) != nullptr;
    if (available) return got == asked && strlen(cpu::isa_notice()) == 0 ? 0 : 1;
    return got != asked && strstr(cpu::isa_notice(), asked.c_str()) != nullptr ? 0 : 1;
  }
  printf("in use %s, built %s, supported %s\n", cpu::isa_in_use(), cpu::isa_built(), cpu::isa_supported());
  CHECK(strstr(cpu::isa_built(), "scalar") == cpu::isa_built());
  CHECK(strstr(cpu::isa_supported(), "scalar") == cpu::isa_supported());
  CHECK(cpu::find_table("scalar") != nullptr && cpu::find_table("nonsense") == nullptr);
  CHECK(cpu::find_table(cpu::isa_in_use()) == &cpu::active_table());
  for (const char* isa : {"scalar", "avx2", "avx512", "nonsense"}) {
    setenv("AEP_ISA", isa, 1);
    const std::string command = std::string("\"") + argv[0] + "\" " + isa;
    CHECK(system(command.c_str()) == 0, "AEP_ISA=%s", isa);
  }
  return finish("test_dispatch");
}
