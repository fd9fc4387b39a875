#include "core/metrics/loss_curve.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace dstrain {
namespace {

constexpr size_t kMaxPoints = 1024;

}  // namespace

// Once full, neighbours are merged and each point stands for twice the steps.
void LossCurve::add(int64_t step, double loss) {
  if (!std::isfinite(loss)) return;
  if (!points_.empty() && points_.back().count < steps_per_point_) {
    Point& last = points_.back();
    last.last_step = step;
    last.sum += loss;
    ++last.count;
    return;
  }
  if (points_.size() == kMaxPoints) {
    for (size_t i = 0; i < kMaxPoints / 2; ++i) {
      const Point& a = points_[2 * i];
      const Point& b = points_[2 * i + 1];
      points_[i] = {a.first_step, b.last_step, a.sum + b.sum, a.count + b.count};
    }
    points_.resize(kMaxPoints / 2);
    steps_per_point_ *= 2;
  }
  points_.push_back({step, step, loss, 1});
}

std::string LossCurve::draw(int columns, int rows) const {
  if (columns < 2 || rows < 2 || points_.size() < static_cast<size_t>(columns) / 2) return "";
  const size_t width = std::min(static_cast<size_t>(columns), points_.size());
  std::vector<double> means;
  for (size_t column = 0; column < width; ++column) {
    double sum = 0;
    int64_t count = 0;
    for (size_t i = column * points_.size() / width; i < (column + 1) * points_.size() / width;
         ++i) {
      sum += points_[i].sum;
      count += points_[i].count;
    }
    means.push_back(sum / static_cast<double>(count));
  }
  const auto [low, high] = std::minmax_element(means.begin(), means.end());
  const double span = *high - *low;
  std::vector<std::string> chart(static_cast<size_t>(rows), std::string(width, ' '));
  for (size_t column = 0; column < width; ++column) {
    const double depth = span > 0 ? (*high - means[column]) / span : 1.0;
    chart[static_cast<size_t>(std::lround(depth * (rows - 1)))][column] = '*';
  }
  std::string out;
  for (int row = 0; row < rows; ++row) {
    const double level = *high - span * row / (rows - 1);
    const bool labelled = row == 0 || row == rows - 1;
    std::string line = labelled ? fmt::format("{:>9.4g} |", level) : std::string(9, ' ') + " |";
    line += chart[static_cast<size_t>(row)];
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  const std::string first = fmt::format("step {}", points_.front().first_step);
  const std::string last = fmt::format("{}", points_.back().last_step);
  const size_t used = first.size() + last.size();
  out += std::string(11, ' ') + first + std::string(width > used ? width - used : 1, ' ') + last +
         "\n";
  return out;
}

}  // namespace dstrain
