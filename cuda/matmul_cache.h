// The algorithms that were found fastest, kept on disk so that the next run of the same shapes need
// not measure. One text file for each GPU, library and driver. The file is a convenience: nothing
// here throws, and one that cannot be read or written costs a line in the log and the measurements
// once more. No CUDA here.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace dstrain {

struct MatmulChoice {
  std::array<uint64_t, 8> algorithm = {};  // opaque: the library's own description
  double ms = 0;                           // of one product when it was measured
  double waves = 0;                        // of thread blocks, as the library estimates

  bool operator==(const MatmulChoice&) const = default;
};

// By key_text() of the product.
using MatmulChoices = std::map<std::string, MatmulChoice>;

class MatmulCache {
 public:
  // `machine` names all that an algorithm depends on beside the product: GPU, library, driver.
  MatmulCache(const std::string& folder, std::string machine);

  const std::string& path() const { return path_; }

  // What the file holds; empty where it is missing or damaged.
  MatmulChoices load() const;

  // Adds to the file what it lacks and returns all that it then holds. A choice that is there
  // already stays: of several ranks that measured the same products at once, all end with the
  // choices of the first. Safe beside other processes that do the same; gives up after a second of
  // waiting for them.
  MatmulChoices merge(const MatmulChoices& choices) const;

 private:
  std::string folder_, path_, machine_;
};

// The file's text, and what it says. Parsing throws DataError: not such a file, of another machine,
// damaged.
std::string format_choices(const MatmulChoices& choices, std::string_view machine);
MatmulChoices parse_choices(std::string_view text, std::string_view machine);

}  // namespace dstrain
