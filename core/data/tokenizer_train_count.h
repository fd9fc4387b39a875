// Counts the words of text files, in parallel and in bounded memory; the first half of train_bpe.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/data/tokenizer_train.h"

namespace dstrain {

using WordCounts = std::vector<std::pair<std::string, int64_t>>;  // sorted by word

// Fills the fields of report but vocab_size. Errors as for train_bpe.
WordCounts count_words(const BpeTrainOptions& options, BpeTrainReport& report);

// Where text, the front part of a longer one, can be cut so that all preset pre-tokenizers give
// the same pieces as uncut: before the space of "letter, space, letter" or behind the newline of
// "no whitespace, newline, letter", letters being ASCII in the first case. The last such place, or
// 0 if there is none. text may end inside a character.
size_t safe_cut(std::string_view text);

}  // namespace dstrain
