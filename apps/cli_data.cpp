// data build | inspect, tokenizer train | encode | decode.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "apps/cli_commands.h"

namespace dstrain {
namespace {

void declare_data(Command root, CommandOptions& options) {
  Command data = root.add_command("data", "text to token datasets: build, inspect");
  Command build = data.add_command("build", "turns text or JSON lines into a token dataset");
  build.add_arguments("inputs", "INPUT", ".txt and .jsonl files, or folders of them",
                      Presence::required);
  build.add_text("--tokenizer", options.data_build.tokenizer, "FILE", "tokenizer.json",
                 Presence::required);
  build.add_text("--output", options.data_build.output, "PREFIX",
                 "writes PREFIX.bin and PREFIX.idx", Presence::required);
  build.add_text("--field", options.data_build.field, "NAME",
                 "key of a JSON line that holds the text (default text)");
  build.add_choice<DocumentSplit>("--split", options.data_build.split,
                                  {{"file", DocumentSplit::file},
                                   {"line", DocumentSplit::line},
                                   {"blank_line", DocumentSplit::blank_line}},
                                  "what a document is in a text file (default file)");
  build.add_flag("--no-eos", options.data_build.append_eos,
                 "do not end documents with the end-of-sequence token", /*value=*/false);
  build.add_text("--eos", options.data_build.eos, "TOKEN",
                 "that token's text (default: the tokenizer's)");
  build.add_integer("--workers", options.data_build.workers, in_range(0, 4096),
                    "threads (default: all cores)");
  build.add_flag("--overwrite", options.data_build.overwrite, "replace an existing dataset");
  build.on_given([&options](const ScannedLine& line) {
    options.data_build.inputs = line.arguments;
    return invoke_once("data build", options.data_build, cmd_data_build);
  });

  Command inspect = data.add_command("inspect", "shows what is in a token dataset");
  inspect.add_text("path", options.data_inspect.path, "PATH", "dataset prefix or file",
                   Presence::required);
  inspect.add_text("--tokenizer", options.data_inspect.tokenizer, "FILE",
                   "decodes the documents shown");
  inspect.add_integer("--limit", options.data_inspect.limit, in_range(0, 1e9),
                      "documents to show (default 3)");
  inspect.add_text("--bigram", options.data_inspect.bigram_train, "TRAIN_PATH",
                   "print the loss of a table of token pairs counted in this dataset");
  inspect.on_given([&options](const ScannedLine&) {
    return invoke("data inspect", options.data_inspect, cmd_data_inspect);
  });
}

void declare_tokenizer(Command root, CommandOptions& options) {
  Command tokenizer = root.add_command("tokenizer", "byte-level BPE: train, encode, decode");
  Command train = tokenizer.add_command("train", "learns a tokenizer.json from text");
  train.add_arguments("inputs", "INPUT", "text files", Presence::required);
  train.add_integer("--vocab-size", options.tokenizer_train.vocab_size, in_range(257, 1 << 24),
                    "tokens, special ones included", Presence::required);
  train.add_text("--output", options.tokenizer_train.output, "FILE", "tokenizer.json to write",
                 Presence::required);
  train.add_choice<std::string>(
      "--pattern", options.tokenizer_train.pattern,
      {{"gpt2", "gpt2"}, {"llama3", "llama3"}, {"qwen2", "qwen2"}, {"deepseek_v3", "deepseek_v3"}},
      "how text is cut into words (default gpt2)");
  train.add_texts("--special", options.tokenizer_train.special_tokens, "TOKEN",
                  "a special token; may be repeated");
  train.on_given([&options](const ScannedLine& line) {
    options.tokenizer_train.inputs = line.arguments;
    return invoke_once("tokenizer train", options.tokenizer_train, cmd_tokenizer_train);
  });

  const auto add_code = [&](const char* name, const char* meaning,
                            int (*run)(const TokenizerCodeOptions&)) {
    Command app = tokenizer.add_command(name, meaning);
    app.add_text("--tokenizer", options.tokenizer_code.tokenizer, "FILE", "tokenizer.json",
                 Presence::required);
    app.add_arguments("text", "TEXT", "what to convert; standard input if absent",
                      Presence::optional);
    app.on_given([&options, name, run](const ScannedLine& line) {
      if (!line.arguments.empty())
        options.tokenizer_code.text = fmt::format("{}", fmt::join(line.arguments, " "));
      return invoke(std::string("tokenizer ") + name, options.tokenizer_code, run);
    });
  };
  add_code("encode", "prints the token ids of a text", cmd_tokenizer_encode);
  add_code("decode", "prints the text of token ids", cmd_tokenizer_decode);
}

}  // namespace

void declare_data_commands(Command root, CommandOptions& options) {
  declare_data(root, options);
  declare_tokenizer(root, options);
}

}  // namespace dstrain
