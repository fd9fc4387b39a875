// Whole models against what Hugging Face transformers computed for them (test/data/parity), at the
// limits that every configuration has to meet.
#include "apps/reference_check.h"

#include <filesystem>
#include <string>

#include "core/backend/cpu_backend.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "test/support/catch.h"
#include "test/support/temp_folder.h"

namespace dstrain {
namespace {

const char* const kParity = DSTRAIN_TEST_DATA "/parity/";

// A copy of a reference folder whose files may be changed.
class CopiedReference {
 public:
  explicit CopiedReference(const std::string& name) {
    for (const auto& entry : std::filesystem::directory_iterator(kParity + name)) {
      const std::string copy = file(entry.path().filename());
      std::filesystem::copy_file(entry.path(), copy);
      std::filesystem::permissions(copy, std::filesystem::perms::owner_write,
                                   std::filesystem::perm_options::add);
    }
  }
  const std::string& path() const { return folder_.path(); }
  std::string file(const std::string& name) const { return folder_ / name; }
  std::string read(const std::string& name) const { return read_small_file(file(name), 1 << 24); }
  void replace(const std::string& name, const std::string& from, const std::string& to) const {
    std::string text = read(name);
    const size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    write_file_atomic(file(name), text.replace(at, from.size(), to));
  }

 private:
  test::TempFolder folder_;
};

std::string failing_rows(const ReferenceReport& report) {
  std::string kinds;
  for (const ReferenceRow& row : report.rows)
    if (!row.ok()) kinds += row.kind + " at " + row.where + "\n";
  return kinds;
}

}  // namespace

TEST_CASE("reference_check: models agree with transformers in every recompute mode", "[parity]") {
  const std::string name =
      GENERATE("deepseek_v3_tiny", "deepseek_v3_odd", "deepseek_v3_groups", "deepseek_v2_yarn",
               "llama_tiny", "llama_yarn_bias", "llama_llama3", "qwen2_tiny");
  const Recompute recompute = GENERATE(Recompute::none, Recompute::selective, Recompute::full);
  CAPTURE(name, static_cast<int>(recompute));
  const auto backend = make_cpu_backend(2);
  const ReferenceReport report = check_reference(*backend, kParity + name, recompute);

  CHECK(report.ok());
  REQUIRE(report.rows.size() == 7);
  const double limits[] = {1e-5, 1e-5, 1e-5, 1e-4, 1e-4, 1e-3, 8e-3};
  for (size_t i = 0; i < report.rows.size(); ++i) {
    const ReferenceRow& row = report.rows[i];
    CAPTURE(row.kind, row.where, row.worst);
    CHECK(row.compared > 0);
    CHECK(row.worst > 0);  // another program's floating point never gives the same bits throughout
    CHECK(row.worst <= row.limit);
    CHECK(row.limit == Catch::Approx(limits[i]).epsilon(1e-12));
  }
}

TEST_CASE("reference_check: another model than the reference's is noticed", "[parity]") {
  struct Change {
    const char *folder, *from, *to;
  };
  const Change change = GENERATE(
      Change{"deepseek_v3_tiny", "\"routed_scaling_factor\": 2.5",
             "\"routed_scaling_factor\": 2.499"},
      Change{"deepseek_v3_tiny", "\"topk_group\": 1", "\"topk_group\": 2"},
      Change{"deepseek_v3_tiny", "\"norm_topk_prob\": true", "\"norm_topk_prob\": false"},
      Change{"deepseek_v3_tiny", "\"rope_interleave\": true", "\"rope_interleave\": false"},
      Change{"deepseek_v2_yarn", "group_limited_greedy", "greedy"},
      Change{"deepseek_v2_yarn", "\"mscale_all_dim\": 0.707", "\"mscale_all_dim\": 0.72"},
      Change{"deepseek_v3_odd", "\"factor\": 8.0", "\"factor\": 8.1"},
      Change{"llama_yarn_bias", "\"beta_fast\": 4", "\"beta_fast\": 7"},
      Change{"deepseek_v3_groups", "\"factor\": 2.5", "\"factor\": 2.51"},
      Change{"deepseek_v3_groups", "\"topk_group\": 2", "\"topk_group\": 3"},
      Change{"llama_llama3", "\"low_freq_factor\": 1.0", "\"low_freq_factor\": 1.05"},
      Change{"llama_llama3", "\"high_freq_factor\": 4.0", "\"high_freq_factor\": 4.2"},
      Change{"llama_tiny", "\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 2e-05"},
      Change{"llama_tiny", "\"rope_theta\": 10000.0", "\"rope_theta\": 10010.0"});
  CAPTURE(change.to);
  const CopiedReference reference(change.folder);
  reference.replace("config.json", change.from, change.to);
  const auto backend = make_cpu_backend(1);
  const ReferenceReport report = check_reference(*backend, reference.path());
  CHECK_FALSE(report.ok());
  CHECK(failing_rows(report).find("gradient") != std::string::npos);
}

TEST_CASE("reference_check: a weight that is not a number fails every comparison", "[parity]") {
  const CopiedReference reference("llama_tiny");
  std::string weights = reference.read("model.safetensors");
  const char nan[] = {0, 0, '\xc0', '\x7f'};
  weights.replace(weights.size() - sizeof nan, sizeof nan, nan, sizeof nan);
  write_file_atomic(reference.file("model.safetensors"), weights);
  const auto backend = make_cpu_backend(1);
  const ReferenceReport report = check_reference(*backend, reference.path());
  for (const ReferenceRow& row : report.rows) {
    CAPTURE(row.kind, row.where);
    CHECK_FALSE(row.ok());
  }
}

TEST_CASE("reference_check: what is no reference is an error that says why", "[parity]") {
  const auto backend = make_cpu_backend(1);
  CHECK_THROWS_AS(check_reference(*backend, "/nonexistent"), NotFoundError);

  const CopiedReference reference("llama_tiny");
  SECTION("no reference file") {
    std::filesystem::remove(reference.file("reference.safetensors"));
    CHECK_THROWS_AS(check_reference(*backend, reference.path()), NotFoundError);
  }
  SECTION("ids beyond the vocabulary") {
    reference.replace("config.json", "\"vocab_size\": 256", "\"vocab_size\": 128");
    CHECK_THROWS_AS(check_reference(*backend, reference.path()), DataError);
  }
  SECTION("no labels") {
    reference.replace("reference.safetensors", "\"labels\"", "\"labelz\"");
    CHECK_THROWS_WITH(check_reference(*backend, reference.path()),
                      Catch::Contains("labels") && Catch::Contains("reference.safetensors"));
  }
  SECTION("no gradient for a parameter") {
    reference.replace("reference.safetensors", "grad.model.norm.weight", "grad.model.norm.weighT");
    CHECK_THROWS_WITH(check_reference(*backend, reference.path()),
                      Catch::Contains("model.norm.weight"));
  }
}

}  // namespace dstrain
