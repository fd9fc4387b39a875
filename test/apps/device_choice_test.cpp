#include "apps/device_choice.h"

#include "apps/planned_gpu.h"
#include "core/base/error.h"
#include "parallel/rank_job.h"
#include "test/support/catch.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

using Catch::Contains;

const VisibleGpus kOne{1, "", {}, false}, kEight{8, "", {}, false},
    kNone{0, "there is no NVIDIA driver", {}, false},
    kSilent{8, "",
            [] { return "ranks on GPUs exchange data through NCCL, which this build lacks"; },
            false};
const JobSize kAlone, kTwo{2, 2}, kFour{4, 4}, kEightHosts{64, 8};

Config job(Device device, ComputeType compute = ComputeType::automatic,
           MomentType moments = MomentType::fp32) {
  Config config;
  config.run.device = device;
  config.precision.compute = compute;
  config.precision.moments = moments;
  return config;
}

}  // namespace

TEST_CASE("device choice: auto takes a GPU that is visible, else the CPU", "[device]") {
  CHECK(choose_device(job(Device::automatic), kAlone, kOne).gpu);
  CHECK(choose_device(job(Device::automatic), kAlone, kEight).gpu);
  CHECK(choose_device(job(Device::cuda), kAlone, kOne).gpu);
  CHECK_FALSE(choose_device(job(Device::cpu), kAlone, kOne).gpu);
  const DeviceChoice none = choose_device(job(Device::automatic), kAlone, kNone);
  CHECK_FALSE(none.gpu);
  CHECK(none.note == "");
  CHECK(
      choose_device(job(Device::automatic, ComputeType::bf16, MomentType::bf16), kAlone, kOne).gpu);
}

TEST_CASE("device choice: a GPU that cannot be had is refused with the reason", "[device]") {
  CHECK_THROWS_WITH(
      choose_device(job(Device::cuda), kAlone, kNone),
      "run.device: cuda cannot be had: there is no NVIDIA driver; run.device: auto or cpu trains "
      "without a GPU");
  try {
    choose_device(job(Device::cuda), kFour, kSilent);
    FAIL("accepted four ranks that cannot exchange data");
  } catch (const Error& e) {
    CHECK(e.code() == ExitCode::bad_config);
    CHECK_THAT(e.what(), Contains("for a job of 4 ranks") && Contains("NCCL"));
  }
}

TEST_CASE("device choice: every rank has a GPU of its own", "[device]") {
  CHECK(choose_device(job(Device::cuda), kFour, kEight).gpu);
  CHECK(choose_device(job(Device::automatic), kEightHosts, kEight).gpu);
  CHECK_THROWS_WITH(choose_device(job(Device::cuda), kTwo, kOne),
                    Contains("run.device: cuda cannot be had for a job of 2 ranks: a rank needs a "
                             "GPU of its own, and 2 ranks share a host with 1 GPU;") &&
                        Contains("fewer ranks"));
  CHECK_FALSE(choose_device(job(Device::automatic), {16, 16}, kEight).gpu);
  // srun may show each rank one GPU.
  VisibleGpus own = kOne;
  own.are_chosen = true;
  CHECK(choose_device(job(Device::cuda), kTwo, own).gpu);
}

TEST_CASE("device choice: what no CPU computes is refused where the job gets no GPU", "[device]") {
  for (const ComputeType compute : {ComputeType::bf16, ComputeType::tf32})
    CHECK_THROWS_WITH(
        choose_device(job(Device::automatic, compute), kAlone, kNone),
        Contains("precision.compute: ") && Contains("needs a GPU") && Contains("NVIDIA driver"));
  CHECK_THROWS_WITH(choose_device(job(Device::automatic, ComputeType::bf16), kTwo, kSilent),
                    Contains("NCCL"));
  CHECK_THROWS_WITH(choose_device(job(Device::cpu, ComputeType::bf16), kAlone, kOne),
                    Contains("run.device is cpu"));
  CHECK_THROWS_WITH(
      choose_device(job(Device::automatic, ComputeType::fp32, MomentType::bf16), kAlone, kNone),
      Contains("precision.moments: bf16 needs a GPU"));
}

TEST_CASE("device choice: several ranks under auto compute on CPUs, and one line says why",
          "[device]") {
  const DeviceChoice choice = choose_device(job(Device::automatic), kFour, kSilent);
  CHECK_FALSE(choice.gpu);
  CHECK_THAT(choice.note, Contains("takes the CPU for a job of 4 ranks") && Contains("NCCL"));
  CHECK(choose_device(job(Device::automatic), kFour, kNone).note == "");
  CHECK(choose_device(job(Device::cpu), kFour, kEight).note == "");
}

TEST_CASE("device choice: more experts than a GPU routes to are refused with the limit",
          "[device]") {
  Config config = job(Device::cuda);
  config.model.n_routed_experts = 512;
  config.model.num_experts_per_tok = 32;
  CHECK(choose_device(config, kAlone, kOne).gpu);
  config.model.n_routed_experts = 640;
  CHECK_THROWS_WITH(choose_device(config, kAlone, kOne),
                    Contains("run.device: cuda cannot be had: model.n_routed_experts is 640, and a "
                             "GPU takes at most 512"));
  config.run.device = Device::automatic;
  const DeviceChoice choice = choose_device(config, kAlone, kOne);
  CHECK_FALSE(choice.gpu);
  CHECK(choice.note ==
        "run.device: auto takes the CPU: model.n_routed_experts is 640, and a GPU takes at most "
        "512");
  config.model.n_routed_experts = 64;
  config.model.num_experts_per_tok = 33;
  CHECK_THAT(choose_device(config, kAlone, kOne).note, Contains("model.num_experts_per_tok is 33"));
}

TEST_CASE("device choice: what a plan is made for", "[device]") {
  CHECK(is_gpu_job(job(Device::cuda), kAlone, kNone));
  CHECK(is_gpu_job(job(Device::cuda), kEightHosts, kOne));
  CHECK(is_gpu_job(job(Device::automatic, ComputeType::bf16), kAlone, kNone));
  CHECK(is_gpu_job(job(Device::automatic), kAlone, kOne));
  CHECK(is_gpu_job(job(Device::automatic), kFour, kEight));
  CHECK_FALSE(is_gpu_job(job(Device::automatic), kTwo, kOne));
  CHECK_FALSE(is_gpu_job(job(Device::automatic), kTwo, kSilent));
  CHECK_FALSE(is_gpu_job(job(Device::automatic), kAlone, kNone));
  CHECK_FALSE(is_gpu_job(job(Device::cpu, ComputeType::bf16), kAlone, kOne));
}

TEST_CASE("device choice: a model of a GPU run is used on whatever is here", "[device]") {
  const Config on_gpu =
      for_any_device(job(Device::cuda, ComputeType::bf16, MomentType::bf16), kOne);
  CHECK(on_gpu.run.device == Device::automatic);
  CHECK(on_gpu.precision.compute == ComputeType::bf16);
  for (const Device device : {Device::cuda, Device::automatic, Device::cpu}) {
    const Config here = for_any_device(job(device, ComputeType::bf16, MomentType::bf16), kNone);
    CHECK_FALSE(choose_device(here, kAlone, kNone).gpu);
    CHECK(here.precision.compute == ComputeType::automatic);
  }
  CHECK(for_any_device(job(Device::cpu), kOne).run.device == Device::cpu);
}

TEST_CASE("device choice: a job is planned for a GPU that is not here", "[device][memory]") {
  PlannedGpu gpu;
  Config config;
  config.model = tiny_moe();
  config.data.seq_len = 16;
  RankJob job(config, MeshShape{}, 0, gpu, /*training=*/true);
  const EngineOptions& options = job.engine().options();
  CHECK(options.dtype == DType::bf16);
  CHECK(options.loaded_batches == 2);
  CHECK(job.engine().host_memory_bytes() > 0);
  CHECK(job.engine().host_memory_bytes() < job.engine().memory_bytes());
  config.precision.compute = ComputeType::tf32;
  config.precision.moments = MomentType::bf16;
  RankJob wide(config, MeshShape{}, 0, gpu, /*training=*/true);
  CHECK(wide.engine().options().dtype == DType::f32);
  CHECK(wide.engine().options().moments == DType::bf16);
  CHECK_THROWS(wide.engine().allocate());
}

}  // namespace dstrain::test
