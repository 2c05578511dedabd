// The choice of the instruction set. It is made once in a process: each wish is tried in a child of its own, forked
// before the first call (and not started anew, which an emulator of another processor would not follow).
#include <sys/wait.h>

#include "testing.h"

using namespace testing;

namespace {

bool holds_in_a_child(const std::string& wish) {
  const pid_t child = fork();
  if (child != 0) {
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  setenv("AEP_ISA", wish.c_str(), 1);
  const std::string got = cpu::isa_in_use();
  const bool available = cpu::find_table(wish.c_str()) != nullptr;
  const bool granted = got == wish && strlen(cpu::isa_notice()) == 0;
  const bool explained = got != wish && strstr(cpu::isa_notice(), wish.c_str()) != nullptr;
  _exit((available ? granted : explained) ? 0 : 1);
}

}  // namespace

int main() {
  for (const char* wish : {"scalar", "avx2", "avx512", "neon", "nonsense"}) {
    CHECK(holds_in_a_child(wish), "AEP_ISA=%s", wish);
  }
  unsetenv("AEP_ISA");
  printf("in use %s, built %s, supported %s\n", cpu::isa_in_use(), cpu::isa_built(), cpu::isa_supported());
  CHECK(strstr(cpu::isa_built(), "scalar") == cpu::isa_built());
  CHECK(strstr(cpu::isa_supported(), "scalar") == cpu::isa_supported());
  CHECK(cpu::find_table("scalar") != nullptr && cpu::find_table("nonsense") == nullptr);
  CHECK(cpu::find_table(cpu::isa_in_use()) == &cpu::active_table());
  // The best comes last in these lists, and without a wish the best of both is taken.
  std::string best;
  for (const KernelTable* table : tables()) best = table->name;
  CHECK(best == cpu::isa_in_use(), "%s, not %s", cpu::isa_in_use(), best.c_str());
#ifdef __aarch64__
  CHECK(best == "neon" && std::string(cpu::isa_built()) == "scalar,neon");
#else
  CHECK(strstr(cpu::isa_built(), "neon") == nullptr && strstr(cpu::isa_supported(), "neon") == nullptr);
#endif
  return finish("test_dispatch");
}
