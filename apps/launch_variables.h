// The environment variables between the launcher and its ranks, and the one that users may set.
#pragma once

namespace dstrain {

// Read by the launcher: the mpirun to start, a path or a name in PATH. Default: mpirun.
constexpr const char* kMpirunVariable = "DSTRAIN_MPIRUN";

// Set by the launcher for its ranks. The file in which each rank of the launcher's host says where
// it is; ranks on other hosts find no file there and say nothing.
constexpr const char* kBoardVariable = "DSTRAIN_RANK_BOARD";
// Columns of the terminal that the launcher writes to; not set if that is no terminal.
constexpr const char* kColumnsVariable = "DSTRAIN_COLUMNS";

}  // namespace dstrain
