// Loading, layers, origins, round trips, comparing, explaining and the schema.
#include "core/config/config_io.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/config/field_tree.h"
#include "core/config/presets.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {

// A folder of job files that is removed at the end of the test.
class JobFolder {
 public:
  JobFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "dstrain-config-XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~JobFolder() { std::filesystem::remove_all(path_); }

  std::string write(const std::string& name, const std::string& text) const {
    const std::string path = path_ + "/" + name;
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }

 private:
  std::string path_;
};

Override set(const std::string& key, const std::string& value) {
  return {key, value, "--set " + key + "=" + value};
}

std::string error_of(const std::optional<std::string>& path,
                     const std::vector<Override>& overrides) {
  try {
    load_config(path, overrides);
  } catch (const Error& e) {
    return e.what();
  }
  return "(accepted)";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A value unlike the default for every field, so that one that is lost shows.
struct Perturb {
  int64_t next = 3;
  void operator()(const char* name, auto& member, const Range& range, const char*) {
    change(name, member, range);
  }
  void change(const char*, bool& v, const Range&) { v = !v; }
  void change(const char*, std::optional<bool>& v, const Range&) { v = true; }
  void change(const char*, int64_t& v, const Range& r) {
    v = std::min<int64_t>(++next, int64_t(std::min(r.high, 1e9)));
  }
  void change(const char*, AutoInt& v, const Range&) { v.value = ++next; }
  void change(const char*, double& v, const Range& r) {
    v = std::min(r.high, 1.0) / 3.0 + (r.low >= 1 ? r.low : 0);
  }
  void change(const char*, std::pair<double, double>& v, const Range&) { v = {1.0 / 7, 1.0 / 9}; }
  void change(const char*, StepCount& v, const Range&) {
    v = next % 2 ? StepCount{12.5, true} : StepCount{double(++next), false};
  }
  void change(const char* name, std::string& v, const Range&) {
    v = std::string("a \"quoted\" \\ text: # of ") + name + " \xC3\xA9";
  }
  void change(const char*, std::vector<std::string>& v, const Range&) {
    v = {"null", "- x", "", "true", "[a]"};
  }
  template <NamedEnum E>
  void change(const char*, E& v, const Range&) {
    const E first = kEnumNames<E>.front().value;
    v = v == first ? kEnumNames<E>.back().value : first;
  }
  template <FieldStruct S>
  void change(const char*, S& v, const Range&) {
    S::fields(*this, v);
  }
  template <FieldStruct S>
  void change(const char*, std::vector<S>& v, const Range&) {
    v.resize(2);
    for (S& element : v) S::fields(*this, element);
  }
};

}  // namespace

TEST_CASE("config: quickstart.yaml loads", "[config]") {
  const LoadedConfig loaded =
      load_config(std::string(DSTRAIN_SOURCE_DIR) + "/configs/quickstart.yaml");
  CHECK(loaded.config.run.name == "kjv-moe");
  CHECK(loaded.config.model.is_mla());
  CHECK(loaded.config.model.n_routed_experts == 16);
  CHECK(loaded.config.model.q_lora_rank == 0);
  REQUIRE(loaded.config.data.train.size() == 1);
  CHECK(loaded.config.data.train[0].weight == 1.0);
  CHECK(loaded.config.schedule.warmup.percent);
}

TEST_CASE("config: the dump loads back to the same values", "[config]") {
  Config config;
  Perturb perturb;
  Config::fields(perturb, config);
  const std::string dump = dump_config(config);
  CAPTURE(dump);
  const Config back = parse_config_text(dump, "dump");
  CHECK(dump_config(back) == dump);
  CHECK(diff_config(config, back).empty());
  CHECK(back.optimizer.lr == config.optimizer.lr);
  CHECK(back.optimizer.betas == config.optimizer.betas);
  CHECK(back.run.name == config.run.name);
  CHECK(back.launch.hosts == config.launch.hosts);
  CHECK(back.schedule.warmup == config.schedule.warmup);
  CHECK(back.schedule.decay == config.schedule.decay);
  CHECK(back.model.rope_interleave == config.model.rope_interleave);
  // Every field differs from the default, else the round trip proved nothing for it.
  const FieldNode defaults = describe(Config{});
  for_each_leaf(describe(back), [&](const FieldNode& leaf) {
    CAPTURE(leaf.path);
    if (leaf.path == "optimizer.name") return;  // has one value only
    CHECK(leaf.value != find_field(defaults, leaf.path)->value);
  });
}

TEST_CASE("config: doubles survive the dump bit for bit", "[config]") {
  for (const double value :
       {0.1, 1.0 / 3, 1e-8, 5e-324, 1.7976931348623157e308, 123456789012345680.0, 3e-4}) {
    Config config;
    config.optimizer.lr = value;
    CHECK(parse_config_text(dump_config(config), "dump").optimizer.lr == value);
  }
}

TEST_CASE("config: forms of values that are accepted", "[config]") {
  const auto parse = [](const std::string& text) { return parse_config_text(text, "job.yaml"); };
  CHECK(parse("optimizer: {lr: 1e-3}").optimizer.lr == 1e-3);
  CHECK(parse("optimizer: {lr: +1.5E+2}").optimizer.lr == 150);
  CHECK(parse("optimizer: {lr: .5}").optimizer.lr == 0.5);
  CHECK(parse("optimizer: {lr: 5.}").optimizer.lr == 5);
  CHECK(parse("optimizer: {lr: 3}").optimizer.lr == 3);
  CHECK(parse("train: {steps: +7}").train.steps == 7);
  CHECK(parse("train: {steps: 0}").train.steps == 0);
  CHECK(parse("schedule: {warmup: 100}").schedule.warmup == StepCount{100, false});
  CHECK(parse("schedule: {warmup: \"2.5%\"}").schedule.warmup == StepCount{2.5, true});
  CHECK(parse("parallel: {data: auto}").parallel.data.is_auto());
  CHECK(parse("parallel: {data: 4}").parallel.data.value == 4);
  CHECK(parse("run: {name: 123}").run.name == "123");
  CHECK(parse("run: {name: 'yes'}").run.name == "yes");
  CHECK(parse("run: {device: \"cpu\"}").run.device == Device::cpu);
  CHECK(parse("run: {name: a}\r\ntrain:\r\n  steps: 3\r\n").train.steps == 3);
  CHECK(parse("---\nrun: {name: a}\n...\n").run.name == "a");
  CHECK(parse("launch:\n  hosts:\n  - a\n  - b\n").launch.hosts ==
        std::vector<std::string>{"a", "b"});
  CHECK(parse("launch: {hosts: []}").launch.hosts.empty());
  CHECK(parse("model: {q_lora_rank: null, rope_scaling: null, rope_interleave: null}")
            .model.q_lora_rank == 0);
  CHECK(parse("model: {rope_interleave: false}").model.rope_interleave ==
        std::optional<bool>(false));
}

TEST_CASE("config: layers override each other in order and leave their origin", "[config]") {
  const JobFolder folder;
  folder.write("base/common.yaml",
               "run: {name: base, seed: 1}\nmodel: {num_hidden_layers: 4}\ntrain: {steps: 5, "
               "global_batch: 64}\n");
  const std::string job = folder.write("job.yaml",
                                       "extends: base/common.yaml\nmodel: {preset: v2-lite, "
                                       "vocab_size: 1000}\nrun: {name: job}\ntrain:\n  steps: 7\n");
  const LoadedConfig loaded = load_config(
      job,
      {set("train.steps", "9"), {"optimizer.lr", "2e-4", "--lr 2e-4"}, set("train.steps", "11")});
  const Config& c = loaded.config;
  CHECK(c.model.hidden_size == 2048);     // preset
  CHECK(c.model.num_hidden_layers == 4);  // extended file over preset
  CHECK(c.model.vocab_size == 1000);      // job over preset
  CHECK(c.run.seed == 1);
  CHECK(c.run.name == "job");
  CHECK(c.train.steps == 11);
  CHECK(c.optimizer.lr == 2e-4);
  CHECK(loaded.origin("model.hidden_size").text == "preset v2-lite");
  CHECK(loaded.origin("model.hidden_size").kind == Origin::Kind::preset);
  CHECK(contains(loaded.origin("model.num_hidden_layers").text, "base/common.yaml:2:28"));
  CHECK(loaded.origin("model.vocab_size").text == job + ":2:38");
  CHECK(loaded.origin("train.steps").text == "--set train.steps=11");
  CHECK(loaded.origin("optimizer.lr").text == "--lr 2e-4");
  CHECK(loaded.origin("optimizer.eps").text == "default");
  CHECK_FALSE(loaded.is_set("optimizer.eps"));
  CHECK(contains(loaded.resolved_yaml(), "  lr: 0.0002  # --lr 2e-4\n"));
  CHECK(dump_config(parse_config_text(loaded.resolved_yaml(), "resolved")) == dump_config(c));
}

TEST_CASE("config: a list replaces the one below it, its elements can be set alone", "[config]") {
  const JobFolder folder;
  folder.write("base.yaml", "data: {train: [{path: a, weight: 2}, {path: b}]}\n");
  const std::string job =
      folder.write("job.yaml", "extends: base.yaml\ndata: {train: [{path: c}]}\n");
  CHECK(load_config(job).config.data.train.size() == 1);
  CHECK(load_config(job).config.data.train[0].weight == 1.0);

  const LoadedConfig loaded =
      load_config(job, {set("data.train[0].weight", "3"), set("data.train.1.path", "d"),
                        set("launch.hosts", "[x, y]"), set("launch.hosts[0]", "z")});
  REQUIRE(loaded.config.data.train.size() == 2);
  CHECK(loaded.config.data.train[0].path == "c");
  CHECK(loaded.config.data.train[0].weight == 3);
  CHECK(loaded.config.data.train[1].path == "d");
  CHECK(loaded.config.launch.hosts == std::vector<std::string>{"z", "y"});
  CHECK(loaded.origin("data.train[0].weight").text == "--set data.train[0].weight=3");
  CHECK(load_config(std::nullopt, {set("data.train", "[{path: p, weight: 0.5}]")})
            .config.data.train[0]
            .weight == 0.5);
  // The parts of a new element may come in any order.
  const Config built =
      load_config(std::nullopt, {set("data.valid[0].weight", "2"), set("data.valid[0].path", "v")})
          .config;
  CHECK(built.data.valid.at(0).path == "v");
  CHECK(built.data.valid.at(0).weight == 2);
  CHECK(load_config(std::nullopt, {set("data.train", "[]")}).config.data.train.empty());
}

TEST_CASE("config: overrides are checked like files", "[config]") {
  const auto error = [](const std::string& key, const std::string& value) {
    return error_of(std::nullopt, {set(key, value)});
  };
  CHECK(contains(
      error("optimizer.lrr", "1"),
      "--set optimizer.lrr=1: error: unknown key 'lrr' in 'optimizer'\nhint: did you mean 'lr'?"));
  CHECK(contains(error("optimizer.lr", "abc"),
                 "--set optimizer.lr=abc: error: optimizer.lr expects a number, got 'abc'"));
  CHECK(contains(error("optimizer", "3"), "optimizer expects keys with values"));
  CHECK(contains(error("optimizer.lr.x", "3"), "optimizer.lr expects a number, got a section"));
  CHECK(contains(error("", "3"), "'' is not a key"));
  CHECK(contains(error("a..b", "3"), "is not a key"));
  CHECK(contains(error(std::string(5000, '.'), "3"), "is not a key"));
  CHECK(contains(error("data.train[1].path", "x"), "has 0 elements; index 1 is beyond its end"));
  CHECK(contains(error("data.train[99999999999].path", "x"), "is beyond its end"));
  CHECK(contains(error("data.train[0].weight", "x"), "expects a number"));
  CHECK(contains(error("data.train", "x"), "expects a list"));
  CHECK(contains(error("data.train", "[{path: &a x}]"), "anchors"));
  CHECK(contains(error("optimizer.betas", "[0.9, "), "cannot be read"));
  CHECK(
      contains(error("train.steps[0]", "1"), "train.steps expects a whole number, got an element"));
  CHECK(contains(error("run.name", "\xFF"), "not valid UTF-8"));
  CHECK(contains(error("run.name", "a\nb"), "control character"));
  CHECK(contains(error("extends", "x.yaml"), "unknown key 'extends'"));
  CHECK(load_config(std::nullopt, {set("run.name", "a: b # c")}).config.run.name == "a: b # c");
  CHECK(check_override({"optimizer.lr", "1", "--lr 1"}).empty());
  CHECK(check_override({"optimizer.lr", "x", "--lr x"}).list().size() == 1);
  // Problems of files and of the command line come together.
  const JobFolder folder;
  const std::string both =
      error_of(folder.write("job.yaml", "train: {steps: x}\n"), {set("run.seed", "-1")});
  CHECK(contains(both, "job.yaml:1:16: error"));
  CHECK(contains(both, "--set run.seed=-1: error"));
}

TEST_CASE("config: extends is relative, may chain, and cannot run in circles", "[config]") {
  const JobFolder folder;
  const std::string a = folder.write("a.yaml", "extends: sub/b.yaml\n");
  folder.write("sub/b.yaml", "extends: ../a.yaml\n");
  CHECK(contains(error_of(a, {}), "sub/b.yaml:1:10: error: extends runs in a circle"));
  const std::string self = folder.write("self.yaml", "extends: self.yaml\n");
  CHECK(contains(error_of(self, {}), "self.yaml:1:10: error: extends runs in a circle"));
  const std::string lost = folder.write("lost.yaml", "extends: nowhere.yaml\n");
  CHECK(contains(error_of(lost, {}), "lost.yaml:1:10: error: extends: cannot open"));
  CHECK(
      contains(error_of(folder.write("l.yaml", "extends: [a]\n"), {}), "extends expects the path"));
  CHECK(contains(error_of(folder.write("m.yaml", "extends:\nrun: {name: a}\n"), {}),
                 "m.yaml:1:1: error: extends expects the path"));
  folder.write("broken.yaml", "run: {nam: a}\n");
  CHECK(contains(error_of(folder.write("ok.yaml", "extends: broken.yaml\n"), {}),
                 "broken.yaml:1:7: error: unknown key 'nam'"));

  folder.write("c0.yaml", "run: {name: root}\n");
  for (int i = 1; i <= 9; ++i)
    folder.write("c" + std::to_string(i) + ".yaml",
                 "extends: c" + std::to_string(i - 1) + ".yaml\n");
  const std::string folder_path = a.substr(0, a.rfind('/'));
  CHECK(load_config(folder_path + "/c8.yaml").config.run.name == "root");
  CHECK(contains(error_of(folder_path + "/c9.yaml", {}), "more than 8 files"));
}

TEST_CASE("config: files that cannot be read have their own exit codes", "[config]") {
  const JobFolder folder;
  CHECK_THROWS_AS(load_config(std::string("/nonexistent/job.yaml")), NotFoundError);
  CHECK_THROWS_AS(load_config(std::string("/")), ConfigError);
  CHECK_THROWS_AS(load_config(std::string("/dev/zero")), ConfigError);
  CHECK_THROWS_AS(load_config(std::nullopt, {set("model.from", "/nonexistent")}), NotFoundError);
}

TEST_CASE("config: presets and a name for a run without a file", "[config]") {
  const LoadedConfig loaded =
      load_config(std::nullopt, {{"model.preset", "deepseek-72b", "--model deepseek-72b"}});
  CHECK(loaded.config.run.name == "deepseek-72b");
  CHECK(loaded.config.model.hidden_size == 4096);
  CHECK(loaded.origin("model.preset").text == "--model deepseek-72b");
  CHECK(contains(error_of(std::nullopt, {set("model.preset", "v2-lit")}),
                 "there is no preset 'v2-lit'\nhint: did you mean 'v2-lite'?"));
  CHECK(contains(error_of(std::nullopt, {set("model.preset", "v2-lite"), set("model.from", "x")}),
                 "keep one"));
  const JobFolder folder;
  const std::string job = folder.write("job.yaml", "model: {preset: dense-1b}\n");
  CHECK(load_config(job).config.run.name.empty());
  CHECK(load_config(job, {set("model.preset", "qwen-1.5b")}).config.model.hidden_size == 1536);
  CHECK(load_config(job, {set("model.preset", "")}).config.model.hidden_size ==
        ModelConfig{}.hidden_size);
}

TEST_CASE("config: model.from takes a Hugging Face config.json below the job file", "[config]") {
  const JobFolder folder;
  const std::string json = folder.write(
      "hf/config.json",
      R"({"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2,
                          "intermediate_size": 128, "num_attention_heads": 4})");
  const std::string hf = json.substr(0, json.rfind('/'));
  const LoadedConfig loaded =
      load_config(std::nullopt, {set("model.from", hf), set("model.num_hidden_layers", "1")});
  CHECK(loaded.config.model.vocab_size == 300);
  CHECK(loaded.config.model.num_hidden_layers == 1);
  CHECK(loaded.origin("model.vocab_size").text == json);
  // The stamp of such a run does not read the folder again.
  std::filesystem::remove(json);
  CHECK(parse_config_text(dump_config(loaded.config), "stamp").model.vocab_size == 300);
}

TEST_CASE("config: null takes a section back to its defaults", "[config]") {
  const LoadedConfig loaded = load_config(
      std::nullopt, {set("model.preset", "v2-lite"), set("model.rope_scaling", "null")});
  CHECK(loaded.config.model.rope_scaling.type == RopeType::none);
  CHECK(loaded.origin("model.rope_scaling.type").text == "default");
  CHECK(loaded.origin("model.hidden_size").text == "preset v2-lite");
}

TEST_CASE("config: overrides on top of a stamp", "[config]") {
  Config stamp;
  stamp.train.steps = 77;
  stamp.data.train = {{"a", 1.0}};
  const Config changed =
      apply_overrides(stamp, {set("optimizer.lr", "0.5"), set("data.train[0].path", "b")}).config;
  CHECK(changed.train.steps == 77);
  CHECK(diff_config(stamp, changed) ==
        std::vector<std::string>{"data.train[0].path: a -> b", "optimizer.lr: 0.001 -> 0.5"});
}

TEST_CASE("config: differences name keys, old and new values", "[config]") {
  Config before, after;
  CHECK(diff_config(before, after).empty());
  after.optimizer.lr = 3e-4;
  after.run.device = Device::cpu;
  after.data.train = {{"x", 1.0}};
  CHECK(diff_config(before, after) ==
        std::vector<std::string>{"run.device: auto -> cpu", "data.train[0].path: (absent) -> x",
                                 "data.train[0].weight: (absent) -> 1",
                                 "optimizer.lr: 0.001 -> 0.0003"});
  CHECK(diff_config(after, before).back() == "data.train[0].weight: 1 -> (absent)");
}

TEST_CASE("config: explain says all about a key", "[config]") {
  const LoadedConfig loaded = load_config(std::nullopt, {{"optimizer.lr", "2e-4", "--lr 2e-4"}});
  CHECK(explain(loaded, "optimizer.lr") ==
        "optimizer.lr\n  value:    0.0002\n  default:  0.001\n  type:     number\n  range:    at "
        "least 0\n"
        "  meaning:  peak learning rate\n  set by:   --lr 2e-4\n");
  CHECK(contains(explain(loaded, "run.device"), "auto, cpu or cuda"));
  CHECK(contains(explain(loaded, "optimizer"), "optimizer.weight_decay"));
  CHECK(contains(explain(loaded, "data.train"), "data.train.path"));
  CHECK(contains(explain(loaded, "data.train.weight"), "share of this source"));
  CHECK(contains(explain(loaded, "data.train[3].weight"), "share of this source"));
  CHECK(contains(explain(loaded, ""), "checkpoint"));
  CHECK(contains(explain(loaded, "model.preset"), "SYNTHETIC"));
  const auto error = [&](const std::string& key) -> std::string {
    try {
      return explain(loaded, key);
    } catch (const UsageError& e) {
      return e.what();
    }
  };
  CHECK(contains(error("lr"), "hint: did you mean 'optimizer.lr'?"));
  CHECK(contains(error("optimizer.lrr"), "hint: did you mean 'lr'?"));
  CHECK(contains(error("optimzer.lr"), "hint: did you mean 'optimizer.lr'?"));
  CHECK(contains(error("train.batch_size"), "hint: did you mean 'train.global_batch'?"));
  CHECK(contains(error("a.b[0].c"), "there is no key"));
  CHECK(contains(error("optimizer.lr.x"), "there is no key"));
  CHECK(contains(error("..."), "there is no key"));
  // Every key explains itself.
  for_each_leaf(
      describe(Config{}),
      [&](const FieldNode& leaf) {
        CHECK(contains(explain(loaded, leaf.path), "meaning:"));
        CHECK_FALSE(leaf.meaning.empty());
      },
      /*prototypes=*/true);
}

TEST_CASE("config: the schema is JSON that covers every key and nothing else", "[config]") {
  const nlohmann::json schema = nlohmann::json::parse(config_schema());
  CHECK(schema["$schema"] == "http://json-schema.org/draft-07/schema#");
  CHECK(schema["properties"]["extends"]["type"] == "string");
  int64_t leaves = 0;
  for_each_leaf(
      describe(Config{}),
      [&](const FieldNode& leaf) {
        const nlohmann::json* node = &schema;
        std::string rest = leaf.path;
        while (true) {
          const size_t dot = rest.find('.');
          if (node->at("type") == "array") node = &node->at("items");
          CHECK(node->at("additionalProperties") == false);
          node = &node->at("properties").at(rest.substr(0, dot));
          if (dot == std::string::npos) break;
          rest = rest.substr(dot + 1);
        }
        CHECK(node->contains("description"));
        ++leaves;
      },
      /*prototypes=*/true);
  CHECK(leaves > 80);
  const auto& properties = schema["properties"];
  CHECK(properties["optimizer"]["properties"]["eps"]["exclusiveMinimum"] == 0);
  CHECK(properties["parallel"]["properties"]["zero"]["maximum"] == 3);
  CHECK(properties["run"]["properties"]["device"]["enum"] ==
        nlohmann::json({"auto", "cpu", "cuda"}));
  CHECK(properties["model"]["properties"]["q_lora_rank"]["type"] ==
        nlohmann::json({"integer", "null"}));
  CHECK(properties["data"]["properties"]["train"]["items"]["required"] == nlohmann::json({"path"}));
}
