#include "test/support/communicator_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/base/rng.h"

namespace dstrain::test {
namespace {

// The element types and their serial sums, written apart from the code under test.
struct Bf16 {
  uint16_t bits = 0;
};

float to_float(Bf16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}

// The nearer of the two neighbours, the even one if both are as near.
Bf16 nearest_bf16(float x) {
  const uint32_t below = std::bit_cast<uint32_t>(x) >> 16;
  const Bf16 low{static_cast<uint16_t>(below)}, high{static_cast<uint16_t>(below + 1)};
  const double to_low = std::abs(double{x} - to_float(low));
  const double to_high = std::abs(double{to_float(high)} - x);
  if (to_low != to_high) return to_low < to_high ? low : high;
  return below % 2 == 0 ? low : high;
}

// Of sizes so different that another order of summation shows.
double random_value(int rank, int64_t i, uint64_t seed) {
  const uint64_t bits = random_u64(seed, static_cast<uint64_t>(rank), static_cast<uint64_t>(i));
  const double unit = static_cast<double>(bits >> 11) * 0x1p-53 - 0.5;
  return std::ldexp(unit, static_cast<int>(bits % 16));
}

template <class T>
T make_value(int rank, int64_t i, uint64_t seed) {
  const double x = random_value(rank, i, seed);
  if constexpr (std::is_same_v<T, Bf16>) {
    return nearest_bf16(static_cast<float>(x));
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(x * 1000);
  } else {
    return static_cast<T>(x);
  }
}

template <class T>
T serial_sum(int ranks, int64_t i, uint64_t seed) {
  if constexpr (std::is_same_v<T, Bf16>) {
    float sum = to_float(make_value<T>(0, i, seed));
    for (int r = 1; r < ranks; ++r) sum += to_float(make_value<T>(r, i, seed));
    return nearest_bf16(sum);
  } else {
    T sum = make_value<T>(0, i, seed);
    for (int r = 1; r < ranks; ++r) sum += make_value<T>(r, i, seed);
    return sum;
  }
}

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, Bf16>) {
    return DType::bf16;
  } else {
    return DTypeOf<T>::value;
  }
}

template <class T>
Tensor tensor_of(std::vector<T>& values) {
  return Tensor(values.data(), dtype_of<T>(), {static_cast<int64_t>(values.size())});
}

template <class T>
std::vector<T> input(int rank, int64_t n, uint64_t seed) {
  std::vector<T> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = make_value<T>(rank, i, seed);
  return values;
}

template <class T>
std::vector<T> expected_sum(int ranks, int64_t n, uint64_t seed) {
  std::vector<T> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = serial_sum<T>(ranks, i, seed);
  return values;
}

template <class T>
void require_bits(const std::vector<T>& got, const std::vector<T>& wanted,
                  const std::string& what) {
  rank_check(got.size() == wanted.size(), what + ": the length");
  for (size_t i = 0; i < got.size(); ++i)
    rank_check(
        std::memcmp(&got[i], &wanted[i], sizeof(T)) == 0,
        fmt::format("{} of {}: element {} of {}", what, dtype_name(dtype_of<T>()), i, got.size()));
}

// A part and its place in the whole, as two tensors or as one.
template <class T>
void check_scatter(RankContext& rank, int64_t part, bool in_place) {
  Communicator& world = rank.world;
  const int64_t n = part * world.size();
  auto whole = input<T>(world.rank(), n, 5);
  std::vector<T> out(static_cast<size_t>(part));
  const auto begin = whole.begin() + world.rank() * part;
  Tensor target = in_place ? tensor_of(whole).rows(world.rank() * part, (world.rank() + 1) * part)
                           : tensor_of(out);
  world.reduce_scatter_sum(rank.stream, tensor_of(whole), target);
  if (in_place) out.assign(begin, begin + part);
  const auto sum = expected_sum<T>(world.size(), n, 5);
  const auto mine = sum.begin() + world.rank() * part;
  require_bits(out, std::vector<T>(mine, mine + part), "reduce_scatter_sum");
}

template <class T>
void check_sums_of(RankContext& rank) {
  Communicator& world = rank.world;
  for (const int64_t n : {0, 1, 2, 7, 1000, 4099, 13001}) {
    auto x = input<T>(world.rank(), n, 3);
    world.all_reduce_sum(rank.stream, tensor_of(x));
    require_bits(x, expected_sum<T>(world.size(), n, 3), "all_reduce_sum");
  }
  for (const int64_t part : {0, 1, 13, 2700})
    for (const bool in_place : {false, true}) check_scatter<T>(rank, part, in_place);
}

template <class T>
void check_max_of(RankContext& rank) {
  Communicator& world = rank.world;
  for (const int64_t n : {0, 1, 5, 6007}) {
    auto x = input<T>(world.rank(), n, 9);
    world.all_reduce_max(rank.stream, tensor_of(x));
    std::vector<T> wanted = input<T>(0, n, 9);
    for (int r = 1; r < world.size(); ++r) {
      const auto other = input<T>(r, n, 9);
      for (size_t i = 0; i < other.size(); ++i) wanted[i] = std::max(wanted[i], other[i]);
    }
    require_bits(x, wanted, "all_reduce_max");
  }
}

// Element i has its NaN on rank i; one more has minus infinity everywhere.
template <class T>
void check_max_keeps_nan(RankContext& rank) {
  Communicator& world = rank.world;
  std::vector<T> x(static_cast<size_t>(world.size()), static_cast<T>(world.rank()));
  x[static_cast<size_t>(world.rank())] = std::numeric_limits<T>::quiet_NaN();
  x.push_back(-std::numeric_limits<T>::infinity());
  world.all_reduce_max(rank.stream, tensor_of(x));
  for (int r = 0; r < world.size(); ++r)
    rank_check(std::isnan(x[static_cast<size_t>(r)]), "a maximum over a NaN");
  rank_check(x.back() == -std::numeric_limits<T>::infinity(), "a maximum of minus infinities");
}

template <class T>
void check_gather(RankContext& rank, int64_t part, bool in_place) {
  Communicator& world = rank.world;
  auto mine = input<T>(world.rank(), part, 21);
  std::vector<T> whole(static_cast<size_t>(part * world.size())), wanted;
  const int64_t begin = world.rank() * part;
  std::copy(mine.begin(), mine.end(), whole.begin() + (in_place ? begin : 0));
  const Tensor source = in_place ? tensor_of(whole).rows(begin, begin + part) : tensor_of(mine);
  world.all_gather(rank.stream, source, tensor_of(whole));
  for (int r = 0; r < world.size(); ++r) {
    const auto other = input<T>(r, part, 21);
    wanted.insert(wanted.end(), other.begin(), other.end());
  }
  require_bits(whole, wanted, "all_gather");
}

template <class T>
void check_broadcast(RankContext& rank, int64_t n) {
  for (int root = 0; root < rank.world.size(); ++root) {
    auto x = input<T>(rank.world.rank(), n, 31);
    rank.world.broadcast(rank.stream, tensor_of(x), root);
    require_bits(x, input<T>(root, n, 31), "broadcast");
  }
}

// Rank a sends (a * 3 + b * 5) % 4 * scale rows to rank b; none at all if scale is 0. Segments lie
// with a gap before them, so that offsets are not counts.
void check_rows_exchange(RankContext& rank, int64_t scale, int64_t columns) {
  Communicator& world = rank.world;
  const int me = world.rank(), size = world.size();
  const auto rows = [&](int from, int to) { return (from * 3 + to * 5) % 4 * scale; };
  const auto value = [](int from, int to, int64_t i) {
    return make_value<float>(from * 100 + to, i, 41);
  };
  std::vector<int64_t> send_offsets{2}, recv_offsets{1};
  std::vector<float> send(static_cast<size_t>(2 * columns)), wanted(static_cast<size_t>(columns));
  for (int r = 0; r < size; ++r) {
    for (int64_t i = 0; i < rows(me, r) * columns; ++i) send.push_back(value(me, r, i));
    for (int64_t i = 0; i < rows(r, me) * columns; ++i) wanted.push_back(value(r, me, i));
    send_offsets.push_back(send_offsets.back() + rows(me, r));
    recv_offsets.push_back(recv_offsets.back() + rows(r, me));
  }
  std::vector<float> recv(wanted.size());
  world.all_to_all(rank.stream, Tensor(send.data(), DType::f32, {send_offsets.back(), columns}),
                   send_offsets, Tensor(recv.data(), DType::f32, {recv_offsets.back(), columns}),
                   recv_offsets);
  require_bits(recv, wanted, "all_to_all");
}

}  // namespace

void check_reductions(RankContext& rank) {
  check_sums_of<float>(rank);
  check_sums_of<double>(rank);
  check_sums_of<int32_t>(rank);
  check_sums_of<int64_t>(rank);
  check_sums_of<Bf16>(rank);
  check_max_of<float>(rank);
  check_max_of<double>(rank);
  check_max_of<int64_t>(rank);
}

void check_maxima_keep_nan(RankContext& rank) {
  check_max_keeps_nan<float>(rank);
  check_max_keeps_nan<double>(rank);
}

void check_exchanges(RankContext& rank) {
  for (const int64_t n : {0, 1, 17, 9001}) {
    for (const bool in_place : {false, true}) {
      check_gather<float>(rank, n, in_place);
      check_gather<uint8_t>(rank, n, in_place);
      check_gather<Bf16>(rank, n, in_place);
    }
    check_broadcast<double>(rank, n);
    check_broadcast<int32_t>(rank, n);
    check_broadcast<uint8_t>(rank, n);
  }
  for (const int64_t scale : {0, 1, 300})
    for (const int64_t columns : {1, 33}) check_rows_exchange(rank, scale, columns);
  rank.world.barrier();
  const auto texts =
      rank.world.all_gather_text(std::string(static_cast<size_t>(rank.world.rank()), 'x'));
  rank_check(static_cast<int>(texts.size()) == rank.world.size(), "one text from each rank");
  for (size_t r = 0; r < texts.size(); ++r) rank_check(texts[r] == std::string(r, 'x'), "a text");
}

// Around a ring, several messages ahead of the receiver, twice so that memory is used again.
void check_messages(RankContext& rank) {
  Communicator& world = rank.world;
  if (world.size() == 1) return;
  const int next = (world.rank() + 1) % world.size();
  const int previous = (world.rank() + world.size() - 1) % world.size();
  for (int round = 0; round < 2; ++round) {
    std::vector<std::vector<float>> sent;
    for (const int64_t n : {0, 1, 70000, 3, 70000})
      sent.push_back(input<float>(world.rank(), n, static_cast<uint64_t>(50 + n)));
    for (auto& message : sent) world.send(rank.stream, tensor_of(message), next);
    for (const int64_t n : {0, 1, 70000, 3, 70000}) {
      std::vector<float> message(static_cast<size_t>(n));
      world.recv(rank.stream, tensor_of(message), previous);
      require_bits(message, input<float>(previous, n, static_cast<uint64_t>(50 + n)), "a message");
    }
    for (auto& message : sent) {  // each may change once it is gone, whatever the next rank does
      if (round == 0) world.wait_send(rank.stream, tensor_of(message));
      if (round == 0) std::fill(message.begin(), message.end(), -1.0f);
    }
    world.wait_sends(rank.stream);
  }
}

void check_splits(RankContext& rank) {
  Communicator& world = rank.world;
  const int columns = world.size() % 2 == 0 ? 2 : 1, rows = world.size() / columns;
  const int row = world.rank() / columns, column = world.rank() % columns;
  const auto in_row = world.split(row, column);
  const auto in_column = world.split(column, -row);  // backwards
  const auto alone = world.split(world.rank(), 0);
  const auto same = world.split(7, 7);  // ties: by rank
  rank_check(in_row->size() == columns && in_row->rank() == column, "the place in a row");
  rank_check(in_column->size() == rows && in_column->rank() == rows - 1 - row,
             "the place in a column");
  rank_check(alone->size() == 1 && alone->rank() == 0, "a set of one rank");
  rank_check(same->size() == world.size() && same->rank() == world.rank(),
             "the order of equal keys");

  for (int repeat = 0; repeat < 3; ++repeat) {
    std::vector<int64_t> x{world.rank()}, y{world.rank()}, z{world.rank()};
    in_row->all_reduce_sum(rank.stream, tensor_of(x));
    in_column->all_reduce_sum(rank.stream, tensor_of(y));
    alone->all_reduce_sum(rank.stream, tensor_of(z));
    rank_check(x[0] == columns * row * columns + columns * (columns - 1) / 2, "the sum of a row");
    rank_check(y[0] == rows * column + columns * rows * (rows - 1) / 2, "the sum of a column");
    rank_check(z[0] == world.rank(), "the sum of one rank");
  }
  std::vector<float> whole(static_cast<size_t>(rows)), part{static_cast<float>(world.rank())};
  in_column->all_gather(rank.stream, tensor_of(part), tensor_of(whole));
  for (int r = 0; r < rows; ++r)
    rank_check(
        whole[static_cast<size_t>(r)] == static_cast<float>((rows - 1 - r) * columns + column),
        "the order within a column");
  const auto halves = in_column->split(in_column->rank() % 2, in_column->rank());
  std::vector<int64_t> one{1};
  halves->all_reduce_sum(rank.stream, tensor_of(one));
  rank_check(one[0] == halves->size(), "a set split twice");
}

void check_bytes_sent(RankContext& rank) {
  Communicator& world = rank.world;
  const int64_t me = world.rank(), size = world.size();
  const auto fresh = world.split(0, world.rank());
  Communicator& c = *fresh;
  int64_t wanted = 0;
  const auto sent = [&](int64_t bytes, const char* call) {
    wanted += bytes;
    rank_check(c.bytes_sent() == wanted,
               fmt::format("{} bytes sent after {}, not {}", wanted, call, c.bytes_sent()));
  };
  sent(0, "nothing");
  std::vector<float> part(10), whole(static_cast<size_t>(10 * size));
  c.all_gather(rank.stream, tensor_of(part), tensor_of(whole));
  sent((size - 1) * 40, "all_gather");
  c.reduce_scatter_sum(rank.stream, tensor_of(whole), tensor_of(part));
  sent((size - 1) * 40, "reduce_scatter_sum");
  c.all_reduce_sum(rank.stream, tensor_of(whole));
  sent(2 * (size - 1) * 40, "all_reduce_sum");
  std::vector<double> one(1);  // the last rank sums it: the others send it, that one sends the sum
  c.all_reduce_max(rank.stream, tensor_of(one));
  sent(size == 1 ? 0 : me == size - 1 ? (size - 1) * 8 : 8, "all_reduce_max of one element");
  c.broadcast(rank.stream, tensor_of(part), 0);
  sent(me == 0 ? (size - 1) * 40 : 0, "broadcast");
  std::vector<int64_t> offsets;
  for (int64_t r = 0; r <= size; ++r) offsets.push_back(r);
  std::vector<float> from(static_cast<size_t>(3 * size)), to(static_cast<size_t>(3 * size));
  c.all_to_all(rank.stream, Tensor(from.data(), DType::f32, {size, 3}), offsets,
               Tensor(to.data(), DType::f32, {size, 3}), offsets);
  sent((size - 1) * 12, "all_to_all");
  c.barrier();
  sent(0, "barrier");
  if (size == 1) return;
  if (me == 0) c.send(rank.stream, tensor_of(part), 1);
  if (me == 1) c.recv(rank.stream, tensor_of(part), 0);
  c.wait_sends(rank.stream);
  sent(me == 0 ? 40 : 0, "send");
}

}  // namespace dstrain::test
