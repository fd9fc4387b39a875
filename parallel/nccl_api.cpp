#include "parallel/nccl_api.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <stdlib.h>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr const char* kLibrary = "libnccl.so.2";
// Configurations of communicators have names since then.
constexpr int kLeastVersion = 22700;

void* open_library() {
  // Read by NCCL when it is first called. What the user has set stays.
  setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  setenv("NCCL_ALGO", "Ring", /*overwrite=*/0);
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (!library)
    throw RuntimeFailure(
        fmt::format("NCCL cannot be loaded ({}); install it, or name the folder of {} in "
                    "LD_LIBRARY_PATH",
                    dlerror(), kLibrary));
  return library;
}

template <class Function>
void look_up(void* library, const char* name, Function& function) {
  void* const address = dlsym(library, name);
  if (!address)
    throw RuntimeFailure(fmt::format("{} has no function {}; it is not NCCL's", kLibrary, name));
  function = reinterpret_cast<Function>(address);
}

std::string version_text(int code) {
  return fmt::format("{}.{}.{}", code / 10000, code / 100 % 100, code % 100);
}

NcclApi load() {
  void* const library = open_library();
  NcclApi api;
  look_up(library, "ncclGetVersion", api.get_version);
  int version = 0;
  if (api.get_version(&version) != ncclSuccess || version < kLeastVersion)
    throw RuntimeFailure(fmt::format("{} is NCCL {}, and {} or later is needed", kLibrary,
                                     version_text(version), version_text(kLeastVersion)));
  api.version = version_text(version);
  look_up(library, "ncclGetErrorString", api.get_error_string);
  look_up(library, "ncclGetLastError", api.get_last_error);
  look_up(library, "ncclGetUniqueId", api.get_unique_id);
  look_up(library, "ncclCommInitRankConfig", api.comm_init_rank_config);
  look_up(library, "ncclCommGetAsyncError", api.comm_get_async_error);
  look_up(library, "ncclCommFinalize", api.comm_finalize);
  look_up(library, "ncclCommDestroy", api.comm_destroy);
  look_up(library, "ncclCommAbort", api.comm_abort);
  look_up(library, "ncclGroupStart", api.group_start);
  look_up(library, "ncclGroupEnd", api.group_end);
  look_up(library, "ncclAllReduce", api.all_reduce);
  look_up(library, "ncclReduceScatter", api.reduce_scatter);
  look_up(library, "ncclAllGather", api.all_gather);
  look_up(library, "ncclBroadcast", api.broadcast);
  look_up(library, "ncclSend", api.send);
  look_up(library, "ncclRecv", api.recv);
  return api;
}

}  // namespace

const NcclApi& nccl_api() {
  static const NcclApi api = load();
  return api;
}

}  // namespace dstrain
