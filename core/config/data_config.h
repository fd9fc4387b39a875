// The section `data`: the tokenizer and the token datasets.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/config/field.h"

namespace dstrain {

struct DataSourceConfig {
  std::string path;
  double weight = 1.0;

  static void fields(auto& field, auto& c) {
    field("path", c.path, required(),
          "a dataset of `data build`, a Megatron .bin/.idx prefix or an llm.c .bin");
    field("weight", c.weight, above(0.0), "share of this source in the blend");
  }
};

struct DataConfig {
  std::string tokenizer;
  std::vector<DataSourceConfig> train;
  std::vector<DataSourceConfig> valid;
  int64_t seq_len = 256;
  bool document_mask = true;
  bool shuffle = true;
  int64_t prefetch = 4;

  static void fields(auto& field, auto& c) {
    field("tokenizer", c.tokenizer, any(), "a Hugging Face tokenizer.json");
    field("train", c.train, any(), "training sources with weights");
    field("valid", c.valid, any(), "held-out sources");
    field("seq_len", c.seq_len, in_range(1, 1 << 20), "tokens per sequence");
    field("document_mask", c.document_mask, any(),
          "packed documents do not see each other; false lets attention cross them");
    field("shuffle", c.shuffle, any(), "a new random order each epoch; false reads in file order");
    field("prefetch", c.prefetch, in_range(1, 1024), "micro-batches the reader thread keeps ready");
  }
};

}  // namespace dstrain
