// Named places where a test can end, fail or slow the program: the fault tests kill it at each one
// and then resume. Compiled to nothing unless DSTRAIN_FAILPOINTS is defined.
#pragma once

#include <string>
#include <string_view>

namespace dstrain {

// Every name that DSTRAIN_FAILPOINT may use, in the order of a save, retention and a restore.
inline constexpr std::string_view kFailpointNames[] = {
    "snapshot.before_copy",  // AsyncSaver, training thread
    "snapshot.after_copy",
    "snapshot.before_write",  // AsyncSaver, writer thread
    "save.before_folder",     // nothing of this save exists yet
    "save.after_folder",
    "save.after_shard_create",
    "save.after_shard_tensor",  // once per tensor
    "save.before_shard_sync",
    "save.after_shard_sync",
    "save.after_shard_close",
    "save.before_manifest",
    "save.after_manifest_create",
    "save.after_manifest_write",
    "save.after_manifest_fsync",  // committed in the temporary folder
    "save.after_folder_fsync",
    "save.after_rename",        // visible under its final name
    "save.after_parent_fsync",  // committed
    "save.before_replaced_removed",
    "save.before_abandon",  // a failed save, before its files are removed
    "retention.before_rename",
    "retention.after_rename",
    "retention.after_parent_fsync",
    "remove.after_unlink",  // once per file of a folder that is removed
    "remove.before_rmdir",
    "restore.before_scan",
    "restore.before_check",  // once per candidate
    "restore.after_check",
    "restore.after_slice",  // once per tensor slice that is read
};

// spec: "name@nth=action", several separated by commas; without "@nth" every pass counts. Actions:
// kill (SIGKILL), exit (status 1, no clean-up), throw (StorageError), sleep:MILLISECONDS.
// Replaces what was configured; an empty spec turns all off. UsageError for a malformed spec, an
// unknown name, or a program without failpoints.
void configure_failpoints(const std::string& spec);

#ifdef DSTRAIN_FAILPOINTS
void failpoint_reached(std::string_view name);
#define DSTRAIN_FAILPOINT(name) ::dstrain::failpoint_reached(name)
#else
#define DSTRAIN_FAILPOINT(name) ((void)0)
#endif

}  // namespace dstrain
