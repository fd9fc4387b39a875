// Places and groups of ranks, written out by hand for several meshes, and the communicators made of
// them.
#include "parallel/mesh.h"

#include <algorithm>

#include "core/backend/cpu_backend.h"
#include "core/config/config_io.h"
#include "parallel/thread_communicator.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {

using Groups = std::vector<std::vector<int>>;

constexpr MeshGroup kAll[] = {MeshGroup::pipeline,       MeshGroup::stage,  MeshGroup::data,
                              MeshGroup::context,        MeshGroup::tensor, MeshGroup::data_context,
                              MeshGroup::tensor_context, MeshGroup::expert, MeshGroup::expert_data,
                              MeshGroup::embedding};
static_assert(std::size(kAll) == kMeshGroups);

MeshShape shape(int pipeline, int data, int context, int tensor, int expert = 1) {
  return {pipeline, data, context, tensor, expert};
}

// Every rank alone.
Groups single(int ranks) {
  Groups groups;
  for (int rank = 0; rank < ranks; ++rank) groups.push_back({rank});
  return groups;
}

Config job(const char* preset) {
  return load_config(std::nullopt, {{"model.preset", preset, ""}}).config;
}

}  // namespace

TEST_CASE("mesh: one rank", "[mesh]") {
  for (const MeshGroup group : kAll) {
    CAPTURE(group_name(group));
    CHECK(mesh_groups(shape(1, 1, 1, 1), group) == Groups{{0}});
  }
}

TEST_CASE("mesh: data 4, expert 2", "[mesh]") {
  const MeshShape s = shape(1, 4, 1, 1, 2);
  const Groups all = {{0, 1, 2, 3}};
  CHECK(mesh_groups(s, MeshGroup::pipeline) == single(4));
  CHECK(mesh_groups(s, MeshGroup::stage) == all);
  CHECK(mesh_groups(s, MeshGroup::data) == all);
  CHECK(mesh_groups(s, MeshGroup::context) == single(4));
  CHECK(mesh_groups(s, MeshGroup::tensor) == single(4));
  CHECK(mesh_groups(s, MeshGroup::data_context) == all);
  CHECK(mesh_groups(s, MeshGroup::tensor_context) == single(4));
  CHECK(mesh_groups(s, MeshGroup::expert) == Groups{{0, 1}, {2, 3}});
  CHECK(mesh_groups(s, MeshGroup::expert_data) == Groups{{0, 2}, {1, 3}});
  CHECK(mesh_groups(s, MeshGroup::embedding) == single(4));
}

TEST_CASE("mesh: data 2 x tensor 4, expert 8", "[mesh]") {
  const MeshShape s = shape(1, 2, 1, 4, 8);
  const Groups all = {{0, 1, 2, 3, 4, 5, 6, 7}};
  CHECK(mesh_groups(s, MeshGroup::pipeline) == single(8));
  CHECK(mesh_groups(s, MeshGroup::stage) == all);
  CHECK(mesh_groups(s, MeshGroup::data) == Groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}});
  CHECK(mesh_groups(s, MeshGroup::context) == single(8));
  CHECK(mesh_groups(s, MeshGroup::tensor) == Groups{{0, 1, 2, 3}, {4, 5, 6, 7}});
  CHECK(mesh_groups(s, MeshGroup::data_context) == Groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}});
  CHECK(mesh_groups(s, MeshGroup::tensor_context) == Groups{{0, 1, 2, 3}, {4, 5, 6, 7}});
  CHECK(mesh_groups(s, MeshGroup::expert) == all);
  CHECK(mesh_groups(s, MeshGroup::expert_data) == single(8));
}

TEST_CASE("mesh: pipeline 3 x context 2 x tensor 2, expert 2", "[mesh]") {
  const MeshShape s = shape(3, 1, 2, 2, 2);
  CHECK(mesh_groups(s, MeshGroup::pipeline) ==
        Groups{{0, 4, 8}, {1, 5, 9}, {2, 6, 10}, {3, 7, 11}});
  CHECK(mesh_groups(s, MeshGroup::stage) == Groups{{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}});
  CHECK(mesh_groups(s, MeshGroup::data) == single(12));
  CHECK(mesh_groups(s, MeshGroup::context) ==
        Groups{{0, 2}, {1, 3}, {4, 6}, {5, 7}, {8, 10}, {9, 11}});
  CHECK(mesh_groups(s, MeshGroup::tensor) ==
        Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}});
  CHECK(mesh_groups(s, MeshGroup::data_context) ==
        Groups{{0, 2}, {1, 3}, {4, 6}, {5, 7}, {8, 10}, {9, 11}});
  CHECK(mesh_groups(s, MeshGroup::tensor_context) ==
        Groups{{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}});
  CHECK(mesh_groups(s, MeshGroup::expert) ==
        Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}});
  CHECK(mesh_groups(s, MeshGroup::expert_data) ==
        Groups{{0, 2}, {1, 3}, {4, 6}, {5, 7}, {8, 10}, {9, 11}});
  CHECK(mesh_groups(s, MeshGroup::embedding) ==
        Groups{{0, 8}, {1, 9}, {2, 10}, {3, 11}, {4}, {5}, {6}, {7}});
}

TEST_CASE("mesh: pipeline 2 x data 2 x context 2 x tensor 2, expert 4", "[mesh]") {
  const MeshShape s = shape(2, 2, 2, 2, 4);
  CHECK(mesh_groups(s, MeshGroup::pipeline) ==
        Groups{{0, 8}, {1, 9}, {2, 10}, {3, 11}, {4, 12}, {5, 13}, {6, 14}, {7, 15}});
  CHECK(mesh_groups(s, MeshGroup::stage) ==
        Groups{{0, 1, 2, 3, 4, 5, 6, 7}, {8, 9, 10, 11, 12, 13, 14, 15}});
  CHECK(mesh_groups(s, MeshGroup::data) ==
        Groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}, {8, 12}, {9, 13}, {10, 14}, {11, 15}});
  CHECK(mesh_groups(s, MeshGroup::context) ==
        Groups{{0, 2}, {1, 3}, {4, 6}, {5, 7}, {8, 10}, {9, 11}, {12, 14}, {13, 15}});
  CHECK(mesh_groups(s, MeshGroup::tensor) ==
        Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}, {12, 13}, {14, 15}});
  CHECK(mesh_groups(s, MeshGroup::data_context) ==
        Groups{{0, 2, 4, 6}, {1, 3, 5, 7}, {8, 10, 12, 14}, {9, 11, 13, 15}});
  CHECK(mesh_groups(s, MeshGroup::tensor_context) ==
        Groups{{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}});
  CHECK(mesh_groups(s, MeshGroup::expert) ==
        Groups{{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}});
  CHECK(mesh_groups(s, MeshGroup::expert_data) ==
        Groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}, {8, 12}, {9, 13}, {10, 14}, {11, 15}});
  CHECK(mesh_groups(s, MeshGroup::embedding) == mesh_groups(s, MeshGroup::pipeline));
}

TEST_CASE("mesh: experts fold over runs that cut across axes", "[mesh]") {
  // data 3 x tensor 4: a run of 6 experts' ranks takes one and a half tensor groups.
  const MeshShape s = shape(1, 3, 1, 4, 6);
  CHECK(mesh_groups(s, MeshGroup::expert) == Groups{{0, 1, 2, 3, 4, 5}, {6, 7, 8, 9, 10, 11}});
  CHECK(mesh_groups(s, MeshGroup::expert_data) ==
        Groups{{0, 6}, {1, 7}, {2, 8}, {3, 9}, {4, 10}, {5, 11}});
  const RankPlace place = place_of(s, 6);
  CHECK((place.data.rank == 1 && place.tensor.rank == 2));
  CHECK((place.expert.rank == 0 && place.expert_data.rank == 1));
}

TEST_CASE("mesh: places count up with tensor innermost and pipeline outermost", "[mesh]") {
  const MeshShape s = shape(2, 3, 2, 4, 8);
  int rank = 0;
  for (int p = 0; p < 2; ++p)
    for (int d = 0; d < 3; ++d)
      for (int c = 0; c < 2; ++c)
        for (int t = 0; t < 4; ++t, ++rank) {
          const RankPlace place = place_of(s, rank);
          REQUIRE((place.pipeline.rank == p && place.pipeline.size == 2));
          REQUIRE((place.data.rank == d && place.data.size == 3));
          REQUIRE((place.context.rank == c && place.context.size == 2));
          REQUIRE((place.tensor.rank == t && place.tensor.size == 4));
          REQUIRE((place.in_stage().rank == rank % 24 && place.in_stage().size == 24));
          REQUIRE((place.in_world().rank == rank && place.in_world().size == 48));
          REQUIRE((place.expert.rank == rank % 8 && place.expert.size == 8));
          REQUIRE((place.expert_data.rank == rank % 24 / 8 && place.expert_data.size == 3));
        }
  CHECK_THROWS(place_of(s, 48));
  CHECK_THROWS(place_of(s, -1));
}

TEST_CASE("ProcessMesh: each communicator joins the ranks of its group, in their order", "[mesh]") {
  const MeshShape s = GENERATE(shape(1, 1, 1, 1), shape(1, 4, 1, 1, 2), shape(3, 1, 2, 2, 2),
                               shape(2, 2, 2, 2, 4), shape(1, 3, 1, 4, 6));
  run_rank_threads(static_cast<int>(s.ranks()), [&](Communicator& world) {
    const auto backend = make_cpu_backend(1);
    ProcessMesh mesh(s, world, *backend), planned(s, world.rank(), *backend);
    std::vector<std::string> faults;
    if (&mesh.world() != &world || mesh.place().in_world().rank != world.rank())
      faults.push_back("world");
    for (const MeshGroup group : kAll) {
      Communicator& communicator = mesh.group(group);
      std::vector<std::string> expected;
      for (const auto& ranks : mesh_groups(s, group))
        if (std::count(ranks.begin(), ranks.end(), world.rank()))
          for (const int rank : ranks) expected.push_back(std::to_string(rank));
      const Communicator& in_plan = planned.group(group);
      if (in_plan.rank() != communicator.rank() || in_plan.size() != communicator.size())
        faults.push_back(std::string("the plan of ") + group_name(group));
      if (communicator.all_gather_text(std::to_string(world.rank())) != expected ||
          expected.at(static_cast<size_t>(communicator.rank())) != std::to_string(world.rank()))
        faults.push_back(group_name(group));
    }
    // Assertions of Catch2 belong to one thread.
    const auto all_faults = world.all_gather_text(faults.empty() ? "" : faults.front());
    if (world.rank() == 0)
      for (const std::string& fault : all_faults) CHECK(fault == "");
  });
}

// On GPUs a communicator has one stream at a time.
TEST_CASE("ProcessMesh: kinds of the same stream and ranks share a communicator", "[mesh]") {
  const auto backend = make_cpu_backend(1);
  const auto shared = [&](const MeshShape& s, MeshGroup a, MeshGroup b) {
    ProcessMesh mesh(s, 0, *backend);
    return &mesh.group(a) == &mesh.group(b);
  };
  const MeshShape data = shape(1, 4, 1, 1), experts = shape(1, 4, 1, 1, 2),
                  tensor = shape(1, 1, 1, 4), context = shape(1, 2, 2, 1);
  for (const MeshGroup kind : kMeshGroupsOfSums) CHECK(shared(data, MeshGroup::stage, kind));
  CHECK(shared(experts, MeshGroup::stage, MeshGroup::data_context));
  CHECK_FALSE(shared(experts, MeshGroup::stage, MeshGroup::expert_data));
  CHECK_FALSE(shared(experts, MeshGroup::expert, MeshGroup::stage));
  CHECK(shared(tensor, MeshGroup::tensor, MeshGroup::tensor_context));
  CHECK_FALSE(shared(tensor, MeshGroup::tensor, MeshGroup::stage));
  CHECK_FALSE(shared(context, MeshGroup::context, MeshGroup::tensor_context));
  CHECK(shared(context, MeshGroup::stage, MeshGroup::data_context));
  CHECK_FALSE(shared(context, MeshGroup::stage, MeshGroup::data));
  CHECK_FALSE(shared(context, MeshGroup::context, MeshGroup::data));
}

TEST_CASE("ProcessMesh: stages are joined for a table only if there is one in both", "[mesh]") {
  const auto backend = make_cpu_backend(1);
  for (const bool shared : {false, true}) {
    CHECK(ProcessMesh(shape(2, 2, 1, 1), 0, *backend, shared).group(MeshGroup::embedding).size() ==
          (shared ? 2 : 1));
    CHECK(ProcessMesh(shape(2, 2, 1, 1), 0, *backend, shared).group(MeshGroup::pipeline).size() ==
          2);
  }
}

TEST_CASE("ProcessMesh: only meshes of the world's size are accepted", "[mesh]") {
  const auto backend = make_cpu_backend(1);
  LocalCommunicator world(*backend);
  CHECK_THROWS_WITH(ProcessMesh(shape(1, 2, 1, 1), world, *backend),
                    Catch::Contains("the layout data 2 is not one of 1 rank"));
}

TEST_CASE("ProcessMesh: the place of one rank of a plan, where nothing moves", "[mesh]") {
  const auto backend = make_cpu_backend(1);
  ProcessMesh mesh(shape(2, 8, 1, 4, 8), 37, *backend);
  CHECK(mesh.place().in_world().rank == 37);
  CHECK(mesh.world().size() == 64);
  Communicator& data = mesh.group(MeshGroup::data);
  CHECK(data.rank() == 1);
  CHECK(data.size() == 8);
  CHECK(mesh.group(MeshGroup::context).size() == 1);
  CHECK(data.all_gather_text("node") == std::vector<std::string>(8, "node"));
  const auto stream = backend->make_stream();
  CHECK_THROWS_WITH(data.all_reduce_sum(*stream, Tensor()),
                    Catch::Contains("all_reduce_sum in a plan"));
  CHECK_THROWS_WITH(data.split(0, 0), Catch::Contains("split in a plan"));
  CHECK_THROWS_WITH(data.barrier(), Catch::Contains("barrier in a plan"));
  CHECK_THROWS_WITH(ProcessMesh(shape(1, 2, 1, 1), 2, *backend), Catch::Contains("outside"));
}

TEST_CASE("draw_mesh: axes, stages and the step in a few lines", "[mesh]") {
  Config config = job("v2-lite");
  config.train.global_batch = 2048;
  config.train.micro_batch = 32;
  CHECK(draw_mesh(config, shape(2, 8, 1, 4, 8)) ==
        "64 ranks: pipeline 2 x data 8 x tensor 4, expert 8\n"
        "  stage 0          ranks 0-31: embedding, blocks 0-13\n"
        "  stage 1          ranks 32-63: blocks 14-26, head\n"
        "  pipeline            32 of 2     {0 32} {1 33} .. {31 63}\n"
        "  data                 8 of 8     {0 4 8 .. 28} {1 5 9 .. 29} .. {35 39 43 .. 63}\n"
        "  tensor              16 of 4     {0-3} {4-7} .. {60-63}\n"
        "  experts              8 of 8     {0-7} {8-15} .. {56-63}\n"
        "  same experts        16 of 4     {0 8 16 24} {1 9 17 25} .. {39 47 55 63}\n"
        "  step             2,048 sequences: on each of 8 data-parallel ranks 8 micro-batches of "
        "32\n");
  CHECK(draw_mesh(job("quickstart-moe"), shape(1, 1, 1, 1)) ==
        "1 rank: data 1\n"
        "  step             16 sequences: 2 micro-batches of 8\n");
  Config interleaved = job("deepseek-v3");
  interleaved.parallel.virtual_stages = 2;
  CHECK_THAT(
      draw_mesh(interleaved, shape(2, 1, 2, 1)),
      Catch::Contains("ranks 0-1: embedding, blocks 0-14, blocks 31-45\n") &&
          Catch::Contains("ranks 2-3: blocks 15-30, blocks 46-60, head, 1 prediction module\n") &&
          Catch::Contains("  context              2 of 2     {0-1} {2-3}\n"));
}
