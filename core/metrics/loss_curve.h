// The course of the loss in fixed memory, drawn in plain characters at the end of a run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dstrain {

class LossCurve {
 public:
  // Losses that are not finite are left out.
  void add(int64_t step, double loss);

  // `rows` lines of `columns` columns and an axis, each ending in a newline; a column shows the
  // mean of its steps. Empty with fewer than `columns` / 2 losses, where a chart says nothing.
  std::string draw(int columns, int rows) const;

 private:
  struct Point {
    int64_t first_step;
    int64_t last_step;
    double sum;
    int64_t count;
  };
  std::vector<Point> points_;  // in order of steps; bounded, see add()
  int64_t steps_per_point_ = 1;
};

}  // namespace dstrain
