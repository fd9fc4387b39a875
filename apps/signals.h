// What the operating system asks of a run. A thread of its own notes the request; the trainer acts
// between steps.
//   SIGTERM, SIGHUP, SIGUSR2   save a checkpoint and leave with exit code 75
//   SIGINT                     the same; a second one ends the process at once
//   SIGUSR1                    save a checkpoint and go on; of several ranks the first has to get it
// A signal to leave that was ignored when the program started, as SIGHUP is under nohup, stays so.
#pragma once

#include <string>

namespace dstrain {

// Blocks the signals above in this thread and all that it starts, as CUDA does when it is first
// used: a signal to the process would otherwise reach a thread that knows nothing of it, and end
// the process. They wait for handle_signals() or the launcher, one of which has to come soon.
// Threads that libraries started while they were loaded make the program start itself once more.
void hold_signals();

// From now on the signals above only make the requests below, and SIGPIPE and SIGXFSZ become errors
// of the call that meets them. To be called once, before any other thread is started but those that
// began after hold_signals().
void handle_signals();

// The name of the signal that asked to leave, or empty.
std::string leave_requested();
// Whether a checkpoint was asked for since the last call; a burst counts once.
bool take_save_request();

}  // namespace dstrain
