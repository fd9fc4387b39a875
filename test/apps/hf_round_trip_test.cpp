// A Hugging Face folder comes back from import and export: types and bits of every tensor, config.json; the
// types also after training.
#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "core/checkpoint/safetensors.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;
using nlohmann::json;
namespace fs = std::filesystem;

struct Stored {
  std::string type, bytes;
  bool operator==(const Stored&) const = default;
};

std::map<std::string, Stored> tensors_of(const std::string& model) {
  std::map<std::string, Stored> out;
  for (const auto& file : fs::directory_iterator(model)) {
    if (file.path().extension() != ".safetensors") continue;
    const SafetensorsReader reader(file.path());
    for (const SafetensorsEntry& entry : reader.tensors()) {
      Stored& stored = out[entry.name];
      stored.type = safetensors_type_name(entry.type);
      stored.bytes.resize(static_cast<size_t>(entry.bytes));
      reader.read(entry, stored.bytes.data());
    }
  }
  return out;
}

std::map<std::string, std::string> types_of(const std::string& model) {
  std::map<std::string, std::string> out;
  for (const auto& [name, stored] : tensors_of(model)) out[name] = stored.type;
  return out;
}

// The F32 model of `from` in `to`: two shards, types in turn, the router's bias in BF16.
void write_mixed(const std::string& from, const std::string& to) {
  constexpr SafetensorsType kTypes[] = {SafetensorsType::f16, SafetensorsType::bf16,
                                        SafetensorsType::f32};
  const SafetensorsReader source(from + "/model.safetensors");
  json weight_map;
  for (const std::string shard : {"a.safetensors", "b.safetensors"}) {
    std::vector<SafetensorsSpec> specs;
    for (size_t i = 0; i < source.tensors().size(); ++i) {
      const SafetensorsEntry& entry = source.tensors()[i];
      if ((i % 2 == 0) != (shard[0] == 'a')) continue;
      const bool is_bias = entry.name.ends_with("e_score_correction_bias");
      specs.push_back({entry.name, is_bias ? SafetensorsType::bf16 : kTypes[i % 3], entry.shape});
      weight_map[entry.name] = shard;
    }
    std::stable_sort(specs.begin(), specs.end(), [](const auto& x, const auto& y) {
      return safetensors_type_bytes(x.type) > safetensors_type_bytes(y.type);
    });
    SafetensorsWriter writer(File::create_new(to + "/" + shard), specs, {});
    for (const SafetensorsSpec& spec : specs) {
      const SafetensorsEntry& entry = source.at(spec.name);
      std::vector<float> values(static_cast<size_t>(entry.bytes) / sizeof(float));
      source.read(entry, values.data());
      std::string raw(values.size() * static_cast<size_t>(safetensors_type_bytes(spec.type)), '\0');
      REQUIRE(convert_from_f32(spec.type, values.data(), std::ssize(values), raw.data()));
      writer.append(raw.data(), std::ssize(raw));
    }
    writer.finish();
  }
  write_file(to + "/model.safetensors.index.json", json{{"weight_map", weight_map}}.dump());
}

}  // namespace

TEST_CASE("hf round trip: mixed types, config.json and what lies beside them", "[flow]") {
  const TinyJob job(latent_attention());
  const std::string& here = job.folder();
  const auto ok = [&](const std::vector<std::string>& args) {
    const Finished finished = run_program(args, here);
    INFO(finished.text());
    REQUIRE(finished.code == 0);
  };
  job.must_train({"--set", "train.steps=2"});
  ok({"export", "runs/tiny", "--output", "hf"});
  const std::string mixed = here + "/mixed";
  fs::create_directory(mixed);
  write_mixed(here + "/hf", mixed);
  json config = json::parse(read_file(here + "/hf/config.json"));
  config.erase("torch_dtype");
  config.update({{"dtype", "float16"}, {"eos_token_id", {1, 2}}, {"unknown_key", {{"a", nullptr}}}});
  write_file(mixed + "/config.json", config.dump(3));
  fs::copy(here + "/hf/tokenizer.json", mixed + "/tokenizer.json");
  write_file(mixed + "/generation_config.json", "{\"eos_token_id\": [1, 2]}\n");
  const std::map<std::string, Stored> tensors = tensors_of(mixed);
  REQUIRE(tensors.size() > 30);
  REQUIRE(tensors.at("model.layers.1.mlp.gate.e_score_correction_bias").type == "BF16");

  ok({"import", "mixed", "--output", "runs/imported"});
  ok({"export", "runs/imported", "--output", "again"});
  CHECK((tensors_of(here + "/again") == tensors));
  for (const char* file : {"/config.json", "/tokenizer.json", "/generation_config.json"}) {
    CAPTURE(file);
    CHECK(read_file(here + "/again" + file) == read_file(mixed + file));
  }

  // One type where it is asked for, and the config.json says so.
  ok({"export", "runs/imported", "--output", "bf16", "--dtype", "bf16"});
  for (const auto& [name, type] : types_of(here + "/bf16"))
    CHECK(type == (name.ends_with("e_score_correction_bias") ? "F32" : "BF16"));
  config["dtype"] = "bfloat16";
  CHECK(json::parse(read_file(here + "/bf16/config.json")) == config);

  // Trained on in two runs, the second of which goes on from a checkpoint of the first.
  for (const std::string steps : {"2", "4"})
    job.must_train({"--set", "run.name=tuned", "--set", "model.from=mixed", "--set", "train.steps=" + steps,
                    "--resume", "latest"});
  ok({"export", "runs/tuned", "--output", "tuned"});
  CHECK(types_of(here + "/tuned") == types_of(mixed));
  CHECK_FALSE((tensors_of(here + "/tuned") == tensors));
  CHECK(json::parse(read_file(here + "/tuned/config.json"))["unknown_key"] == config["unknown_key"]);
}

TEST_CASE("hf round trip: an export that fails leaves no part of a model", "[flow]") {
  const TinyJob job;  // grouped-query attention with experts: no family computes it
  job.must_train({"--set", "train.steps=1"});
  const Finished finished = run_program({"export", "runs/tiny", "--output", "hf"}, job.folder());
  CHECK(finished.code == 78);
  CHECK_THAT(finished.err, Contains("experts need MLA"));
  CHECK_FALSE(fs::exists(job.folder() + "/hf"));
}

}  // namespace dstrain::test
