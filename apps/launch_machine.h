// What the launcher has to know about the machine it runs on, looked up once.
#pragma once

#include <string>

#include "apps/launch_plan.h"

namespace dstrain {

Machine look_at_machine(const Variables& variables);

// The mpirun to use: DSTRAIN_MPIRUN, or mpirun in PATH. Runs it once to ask for its version.
// RuntimeFailure if there is none, it is not Open MPI's, or it does not answer within `answer_s`
// seconds; `reason` begins the sentence and says what it is needed for: "launch.ranks: 4".
Mpirun find_mpirun(const Variables& variables, const std::string& reason, double answer_s = 10);

// The path of this program's file.
std::string program_path();
// The folder for temporary files: TMPDIR or /tmp.
std::string temporary_folder(const Variables& variables);

}  // namespace dstrain
