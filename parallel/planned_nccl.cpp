#include "parallel/planned_nccl.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <set>

#include "parallel/mesh.h"
#include "parallel/nccl_communicator.h"
#include "parallel/pipeline_schedule.h"
#include "parallel/planned_communicator.h"

namespace dstrain {
namespace {

constexpr long long kMostChannels = 64;

// NCCL reads whatever number a text begins with, in C's notation, and ignores what is too large to
// be one.
long long number_in(const ReadVariable& read, const char* name, long long otherwise) {
  const char* const text = read(name);
  if (!text || !*text) return otherwise;
  errno = 0;
  const long long number = std::strtoll(text, nullptr, 0);
  return errno == 0 ? number : otherwise;
}

// Of two names for the same, the newer one counts.
long long number_in(const ReadVariable& read, const char* name, const char* older_name,
                    long long otherwise) {
  return number_in(read, name, number_in(read, older_name, otherwise));
}

// Every allocation of NCCL has pages of its own, which GPUs can share with each other.
constexpr int64_t kPage = int64_t{2} << 20;
constexpr int64_t in_pages(int64_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}
// A connection over one channel in one direction has a buffer for each of three protocols at one of
// its ends, and at both what they tell each other.
constexpr int64_t kLowLatencyBuffers = (512 << 10) + (4800 << 10), kControl = 4096;
constexpr int64_t kBuffer = int64_t{4} << 20;

class NcclPlan {
 public:
  explicit NcclPlan(const ReadVariable& read) : read_(read) {
    const long long buffer = number_in(read, "NCCL_BUFFSIZE", kBuffer);
    receiver_ = in_pages(kControl + kLowLatencyBuffers + std::max(buffer, 0LL));
  }

  void add(const PlannedCommunicator& ranks) {
    const NcclChannels channels = nccl_channels(NcclOptions().max_ctas, read_);
    add_communicator(channels);
    memory_.bytes += channels.collective * both_ways();  // the ring: to the next, from the previous
    if (ranks.exchanges()) memory_.bytes += (ranks.size() - 1) * channels.exchange * both_ways();
    if (!ranks.messages()) return;
    const NcclChannels of_messages = nccl_channels(kMessageCtas, read_);
    const int neighbours = ranks.size() == 2 ? 1 : 2;
    for (int lane = 0; lane < neighbours * messages_under_way(ranks.size()); ++lane) {
      add_communicator(of_messages);  // for what is sent
      add_communicator(of_messages);  // and for what is received
      memory_.bytes += of_messages.exchange * both_ways();
    }
  }
  NcclMemory memory() const { return memory_; }

 private:
  int64_t both_ways() const { return in_pages(kControl) + receiver_; }
  // Its own tables, and three of each channel.
  void add_communicator(const NcclChannels& channels) {
    ++memory_.communicators;
    memory_.bytes += (2 + 3 * std::max(channels.collective, channels.exchange)) * kPage;
  }

  const ReadVariable& read_;
  int64_t receiver_ = 0;
  NcclMemory memory_;
};

}  // namespace

NcclChannels nccl_channels(int max_ctas, const ReadVariable& read) {
  const auto ctas = [&](const char* name, long long otherwise) {
    const long long number = number_in(read, name, otherwise);
    return std::min(number > 0 ? number : otherwise, kMostChannels);
  };
  const long long most_ctas = ctas("NCCL_MAX_CTAS", max_ctas);
  const long long fewest_ctas = std::min(ctas("NCCL_MIN_CTAS", 1), most_ctas);
  const long long most = std::clamp(
      number_in(read, "NCCL_MAX_NCHANNELS", "NCCL_MAX_NRINGS", kMostChannels), 1LL, kMostChannels);
  const long long fewest =
      std::clamp(number_in(read, "NCCL_MIN_NCHANNELS", "NCCL_MIN_NRINGS", 0), 0LL, kMostChannels);
  // Minima count last: NCCL then uses some of its connections twice.
  const long long collective = std::max({std::min(most, most_ctas), fewest_ctas, fewest});

  const long long exchange = std::clamp(
      std::max(std::min(collective, number_in(read, "NCCL_MAX_P2P_NCHANNELS", kMostChannels)),
               number_in(read, "NCCL_MIN_P2P_NCHANNELS", 1)),
      1LL, kMostChannels);
  return {static_cast<int>(collective),
          static_cast<int>(std::bit_ceil(static_cast<unsigned>(exchange)))};
}

NcclMemory planned_nccl_memory(ProcessMesh& mesh, const ReadVariable& read) {
  std::set<const Communicator*> all = {&mesh.world()};
  for (int kind = 0; kind < kMeshGroups; ++kind)
    all.insert(&mesh.group(static_cast<MeshGroup>(kind)));
  NcclPlan plan(read);
  for (const Communicator* ranks : all)
    if (const auto* planned = dynamic_cast<const PlannedCommunicator*>(ranks))
      if (planned->size() > 1) plan.add(*planned);
  return plan.memory();
}

}  // namespace dstrain
