#include "parallel/planned_nccl.h"

#include <map>
#include <string>

#include "core/backend/cpu_backend.h"
#include "parallel/rank_job.h"
#include "test/support/catch.h"
#include "test/support/layout_jobs.h"

namespace dstrain {
namespace {

using Values = std::map<std::string, std::string>;

ReadVariable reader(const Values& values) {
  return [&](const char* name) -> const char* {
    const auto at = values.find(name);
    return at == values.end() ? nullptr : at->second.c_str();
  };
}

NcclChannels channels(int max_ctas, const Values& values) {
  return nccl_channels(max_ctas, reader(values));
}

// "collective exchange"
std::string text_of(const Values& values) {
  const NcclChannels found = channels(24, values);
  return std::to_string(found.collective) + " " + std::to_string(found.exchange);
}

}  // namespace

TEST_CASE("planned nccl: exchanges take the next power of two of a collective's channels") {
  CHECK(text_of({}) == "24 32");
  CHECK(channels(8, {}).exchange == 8);
  CHECK(channels(1, {}).exchange == 1);
  CHECK(channels(33, {}).exchange == 64);
  CHECK(channels(1000, {}).collective == 64);
}

TEST_CASE("planned nccl: NCCL_MAX_CTAS comes before what the program asks for") {
  CHECK(text_of({{"NCCL_MAX_CTAS", "16"}}) == "16 16");
  CHECK(text_of({{"NCCL_MAX_CTAS", "0x9"}}) == "9 16");
  CHECK(text_of({{"NCCL_MAX_CTAS", "32"}}) == "32 32");
  CHECK(text_of({{"NCCL_MAX_CTAS", "9999999999"}}) == "64 64");
  for (const char* ignored : {"", "0", "-3", "many", "99999999999999999999999"})
    CHECK(text_of({{"NCCL_MAX_CTAS", ignored}}) == "24 32");
  CHECK(text_of({{"NCCL_MIN_CTAS", "30"}}) == "24 32");
}

TEST_CASE("planned nccl: numbers of channels that the environment asks for") {
  CHECK(text_of({{"NCCL_MAX_NCHANNELS", "4"}}) == "4 4");
  CHECK(text_of({{"NCCL_MAX_NRINGS", "4"}}) == "4 4");
  CHECK(text_of({{"NCCL_MAX_NRINGS", "4"}, {"NCCL_MAX_NCHANNELS", "6"}}) == "6 8");
  CHECK(text_of({{"NCCL_MAX_NCHANNELS", "0"}}) == "1 1");
  CHECK(text_of({{"NCCL_MIN_NCHANNELS", "28"}, {"NCCL_MAX_CTAS", "16"}}) == "28 32");
  CHECK(text_of({{"NCCL_MAX_P2P_NCHANNELS", "8"}}) == "24 8");
  CHECK(text_of({{"NCCL_MAX_P2P_NCHANNELS", "0"}}) == "24 1");
  CHECK(text_of({{"NCCL_MIN_P2P_NCHANNELS", "40"}}) == "24 64");
  CHECK(text_of({{"NCCL_MIN_P2P_NCHANNELS", "12"}, {"NCCL_MAX_P2P_NCHANNELS", "8"}}) == "24 16");
}

TEST_CASE("planned nccl: a rank's communicators and connections, in MiB") {
  constexpr int kTables = (2 + 3 * 32) * 2, kRing = 24 * (2 + 10), kExchange = 32 * (2 + 10);
  constexpr int kOne = kTables + kRing, kPair = 2 * (2 + 3 * 8) * 2 + 8 * (2 + 10);
  const Config job = test::tiny_moe_job(4);
  // "communicators MiB"
  const auto planned = [](const Config& config, const MeshShape& shape, const Values& values = {}) {
    const auto backend = make_cpu_backend(1);
    RankJob plan(config, shape, 0, *backend, /*training=*/true);
    const NcclMemory memory = planned_nccl_memory(plan.mesh(), reader(values));
    CHECK(memory.bytes % (1 << 20) == 0);
    return std::to_string(memory.communicators) + " " + std::to_string(memory.bytes >> 20);
  };
  const auto text = [](int count, int mib) {
    return std::to_string(count) + " " + std::to_string(mib);
  };
  CHECK(planned(job, {1, 1, 1, 1, 1}) == "0 0");
  // All ranks, and those of the stage, which sum everything.
  CHECK(planned(job, {1, 2, 1, 1, 1}) == text(2, 2 * kOne));
  CHECK(planned(job, {1, 8, 1, 1, 1}) == text(2, 2 * kOne));
  // A stage with a tensor part of two, whose sums over sequences have the same ranks.
  CHECK(planned(job, {1, 1, 1, 2, 1}) == text(3, 3 * kOne));
  // Experts travel to three other ranks.
  CHECK(planned(job, {1, 4, 1, 1, 4}) == text(3, 3 * kOne + 3 * kExchange));
  // So do keys of the same sequences, beside which there are sums over their tokens.
  CHECK(planned(job, {1, 1, 4, 1, 1}) == text(4, 4 * kOne + 3 * kExchange));
  // Messages in two directions, with three communicators each; beside all ranks those of the
  // pipeline.
  CHECK(planned(job, {2, 1, 1, 1, 1}) == text(2 + 6, 2 * kOne + 3 * kPair));
  // To the next and from the previous stage are different ranks, and two communicators are enough.
  CHECK(planned(job, {4, 1, 1, 1, 1}) == text(2 + 8, 2 * kOne + 4 * kPair));
  // The first and the last stage, where both have the table of embeddings.
  for (const bool tied : {false, true}) {
    Config shared = job;
    shared.model.tie_word_embeddings = tied;
    shared.model.num_nextn_predict_layers = tied ? 0 : 1;
    CHECK(planned(shared, {2, 1, 1, 1, 1}) == text(3 + 6, 3 * kOne + 3 * kPair));
  }
  Config compressed = job;
  compressed.compression.method = CompressionMethod::int8;
  CHECK(planned(compressed, {1, 2, 1, 1, 1}) == text(2, 2 * kOne + kExchange));

  CHECK(planned(job, {1, 2, 1, 1, 1}, {{"NCCL_MAX_CTAS", "8"}}) ==
        text(2, 2 * ((2 + 3 * 8) * 2 + 8 * (2 + 10))));
  CHECK(planned(job, {1, 2, 1, 1, 1}, {{"NCCL_BUFFSIZE", "1048576"}}) ==
        text(2, 2 * (kTables + 24 * (2 + 8))));
}

}  // namespace dstrain
