// What all tests find in the environment, whoever starts them.
#include <unistd.h>

#include <cstdlib>

namespace {

// Open MPI starts nothing as root unless told to. Tests of what the program says of that give it their own variables.
[[maybe_unused]] const bool may_start_ranks = [] {
  if (geteuid() != 0) return false;
  return setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0) == 0 && setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0) == 0;
}();

}  // namespace
