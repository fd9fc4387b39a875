// What the operating system asks of a run. A thread of its own notes the request; the trainer acts
// between steps.
//   SIGTERM, SIGHUP, SIGUSR2   save a checkpoint and leave with exit code 75
//   SIGINT                     the same; a second one ends the process at once
//   SIGUSR1                    save a checkpoint and go on
// A signal to leave that was ignored when the program started, as SIGHUP is under nohup, stays so.
#pragma once

#include <string>

namespace dstrain {

// From now on the signals above only make the requests below, and SIGPIPE and SIGXFSZ become errors
// of the call that meets them. To be called once, before any other thread is started.
void handle_signals();

// The name of the signal that asked to leave, or empty.
std::string leave_requested();
// Whether a checkpoint was asked for since the last call; a burst counts once.
bool take_save_request();

}  // namespace dstrain
