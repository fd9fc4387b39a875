// How attention is cut into tasks: the segment table, blocks of queries, and runs of segments that
// share key rows. All of it follows from the table alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/backend/cpu_gemm.h"
#include "core/backend/cpu_parallel.h"

namespace dstrain {

struct Segment {
  int64_t query, queries, key, keys;
  bool causal;
  // How many keys query i sees; they are the first ones.
  int64_t visible(int64_t i) const { return causal ? keys - queries + i + 1 : keys; }
  // The first query that sees key j.
  int64_t first_query(int64_t j) const {
    return causal ? std::max<int64_t>(0, j - (keys - queries)) : 0;
  }
  int64_t key_end() const { return key + keys; }
};

// Reads and checks the segment table.
class Segments {
 public:
  Segments(const AttentionSegments& segments, int64_t T, int64_t U) : causal_(segments.causal) {
    const Tensor& table = segments.table_N4;
    expect(table, "the segment table", DType::i32, {table.size(0), 4});
    DSTRAIN_CHECK(segments.count_1.defined() && segments.count_1.dtype() == DType::i32,
                  "the segment count must be an i32");
    rows_ = table.data<int32_t>();
    count_ = *segments.count_1.data<int32_t>();
    DSTRAIN_CHECK(count_ >= 0 && count_ <= table.size(0), "more segments than the table has rows");
    for (int64_t n = 0; n < count_; ++n) {
      const Segment s = (*this)[n];
      DSTRAIN_CHECK(s.query >= 0 && s.queries >= 0 && s.query + s.queries <= T && s.key >= 0 &&
                        s.keys >= (causal_ ? s.queries : 1) && s.key_end() <= U,
                    "segment " + std::to_string(n) + " lies outside of the queries or keys");
      queries_ += s.queries;
    }
    DSTRAIN_CHECK(queries_ <= T, "a query row is in more than one segment");
  }
  int64_t count() const { return count_; }
  int64_t queries() const { return queries_; }  // of all segments
  Segment operator[](int64_t n) const {
    const int32_t* const row = rows_ + 4 * n;
    return {row[0], row[1], row[2], row[3], causal_};
  }

 private:
  bool causal_;
  const int32_t* rows_ = nullptr;
  int64_t count_ = 0;
  int64_t queries_ = 0;
};

// The queries of every segment in blocks of kRows.
class QueryBlocks {
 public:
  static constexpr int64_t kRows = 64;  // wide enough for gemm(), narrow at the causal edge

  struct Block {
    Segment segment;
    int64_t first, rows;  // within the segment
    int64_t keys() const { return segment.visible(first + rows - 1); }
  };

  QueryBlocks(const Segments& segments, int64_t* storage)
      : segments_(segments), first_block_(storage) {
    first_block_[0] = 0;
    for (int64_t n = 0; n < segments.count(); ++n)
      first_block_[n + 1] = first_block_[n] + (segments[n].queries + kRows - 1) / kRows;
  }
  int64_t count() const { return first_block_[segments_.count()]; }
  Block operator[](int64_t index) const {
    const int64_t* const begin = first_block_;
    const int64_t n =
        std::upper_bound(begin, begin + segments_.count() + 1, index) - first_block_ - 1;
    return block(segments_[n], (index - first_block_[n]) * kRows);
  }
  // add(rows, keys) for each block and head.
  template <class Add>
  void log(MatmulLog* log, int64_t heads, const Add& add) const {
    if (!log) return;
    for (int64_t i = 0; i < count() * heads; ++i) {
      const Block b = (*this)[i / heads];
      add(b.rows, b.keys());
    }
  }
  static Block block(const Segment& segment, int64_t first) {
    return {segment, first, std::min(kRows, segment.queries - first)};
  }

 private:
  const Segments& segments_;
  int64_t* first_block_;
};

// Runs of segments in table order whose key ranges do not meet those of other runs, so that each
// run's dk and dv have one writer.
class KeyRuns {
 public:
  // storage: 2 (count + 1) numbers.
  KeyRuns(const Segments& segments, int64_t U, int64_t* storage)
      : segments_(segments), U_(U), first_segment_(storage) {
    const int64_t N = segments.count();
    int64_t* const lowest_after = storage + N + 1;  // first key of segments n..
    lowest_after[N] = U;
    for (int64_t n = N - 1; n >= 0; --n)
      lowest_after[n] = std::min(lowest_after[n + 1], segments[n].key);
    int64_t highest = 0, cost = 0;
    for (int64_t n = 0; n < N; ++n) {
      const Segment s = segments[n];
      if (n == 0 || highest <= lowest_after[n]) {
        first_segment_[count_++] = n;
        cost = 0;
      }
      highest = std::max(highest, s.key_end());
      cost += s.queries * s.keys;
      total_cost_ += s.queries * s.keys;
      largest_cost_ = std::max(largest_cost_, cost);
    }
    first_segment_[count_] = N;
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t run) const { return first_segment_[run]; }
  int64_t end(int64_t run) const { return first_segment_[run + 1]; }
  // Key rows that only this run may write; together the runs cover all rows.
  int64_t key_begin(int64_t run) const { return run == 0 ? 0 : lowest_key(run); }
  int64_t key_end(int64_t run) const { return run + 1 == count_ ? U_ : lowest_key(run + 1); }
  // Whether one task per run and head gives eight threads even loads.
  bool balanced(int64_t heads) const { return largest_cost_ * 8 <= total_cost_ * heads; }

 private:
  int64_t lowest_key(int64_t run) const {
    int64_t lowest = U_;
    for (int64_t n = begin(run); n < end(run); ++n) lowest = std::min(lowest, segments_[n].key);
    return lowest;
  }

  const Segments& segments_;
  int64_t U_;
  int64_t* first_segment_;
  int64_t count_ = 0, total_cost_ = 0, largest_cost_ = 0;
};

}  // namespace dstrain
