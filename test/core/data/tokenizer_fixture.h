// Files and reference ids that the tokenizer tests share.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "core/base/error.h"
#include "core/data/tokenizer.h"
#include "test/support/catch.h"

namespace dstrain::test {

inline std::string tokenizer_path(const std::string& name) {
  return std::string(DSTRAIN_TEST_DATA) + "/tokenizers/" + name;
}

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file.good());
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

inline std::vector<nlohmann::json> read_json_lines(const std::string& path) {
  std::istringstream lines(read_text(path));
  std::vector<nlohmann::json> values;
  for (std::string line; std::getline(lines, line);) values.push_back(nlohmann::json::parse(line));
  REQUIRE(!values.empty());
  return values;
}

// Every id and every decoded text of a refs.jsonl.
inline void check_references(const Tokenizer& tokenizer, const std::string& path) {
  TokenEncoder encoder(tokenizer);
  for (const nlohmann::json& line : read_json_lines(path)) {
    const auto text = line.at("text").get<std::string>();
    CAPTURE(text);
    const auto expected = line.at("ids").get<std::vector<int32_t>>();
    const std::vector<int32_t> ids = tokenizer.encode(text);
    CHECK(ids == expected);
    CHECK(tokenizer.decode(ids) == line.at("decoded").get<std::string>());
    std::vector<int32_t> appended{-7};  // the encoder with a cache, behind ids of another text
    encoder.append(text, appended);
    CHECK(std::vector<int32_t>(appended.begin() + 1, appended.end()) == expected);
  }
}

template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace dstrain::test
