#include "parallel/mpi_communicator.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "parallel/host_collectives.h"

namespace dstrain {
namespace {

// So short a tensor goes to every rank whole, and each adds it all up: one exchange instead of two.
constexpr int64_t kAtOnceBytes = 4096;

int rank_in(MPI_Comm comm) {
  int rank = 0;
  check_mpi(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");
  return rank;
}

}  // namespace

MpiCommunicator::MpiCommunicator(MpiJob& job, MPI_Comm comm, std::vector<int> world_ranks)
    : job_(job),
      comm_(comm),
      world_ranks_(std::move(world_ranks)),
      rank_(rank_in(comm)),
      size_(static_cast<int>(world_ranks_.size())) {}

// After a failure the other ranks may be anywhere.
MpiCommunicator::~MpiCommunicator() {
  if (!job_.failed()) MPI_Comm_free(&comm_);
}

void MpiCommunicator::post_send(MpiRequests& pending, Tag tag, const void* data, int64_t bytes,
                                int to) {
  for (int64_t begin = 0; begin < bytes;) {
    const int length = static_cast<int>(std::min(bytes - begin, job_.options().max_message_bytes));
    MPI_Request request = MPI_REQUEST_NULL;
    check_mpi(MPI_Isend(bytes_at(data, begin), length, MPI_BYTE, to, static_cast<int>(tag), comm_,
                        &request),
              "MPI_Isend");
    pending.add(request, world_rank(to), -1);
    begin += length;
  }
}

void MpiCommunicator::post_receive(MpiRequests& pending, Tag tag, void* data, int64_t bytes,
                                   int from) {
  for (int64_t begin = 0; begin < bytes;) {
    const int length = static_cast<int>(std::min(bytes - begin, job_.options().max_message_bytes));
    MPI_Request request = MPI_REQUEST_NULL;
    check_mpi(MPI_Irecv(bytes_at(data, begin), length, MPI_BYTE, from, static_cast<int>(tag), comm_,
                        &request),
              "MPI_Irecv");
    pending.add(request, world_rank(from), length);
    begin += length;
  }
}

void MpiCommunicator::all_reduce_sum(Stream&, const Tensor& x) {
  all_reduce("all_reduce_sum", Reduction::sum, x);
}

void MpiCommunicator::all_reduce_max(Stream&, const Tensor& x) {
  all_reduce("all_reduce_max", Reduction::max, x);
}

void MpiCommunicator::all_reduce(const char* call, Reduction reduction, const Tensor& x) {
  check_tensor(call, x);
  bytes_sent_ += all_reduce_bytes(x, rank_, size_);
  if (x.bytes() <= kAtOnceBytes) return all_reduce_at_once(call, reduction, x);
  pieces_.clear();
  for (int r = 0; r < size_; ++r)
    pieces_.push_back({piece_begin(x.numel(), r, size_), piece_begin(x.numel(), r + 1, size_)});
  const int64_t element = dtype_bytes(x.dtype());
  const auto place = [&](int r) { return bytes_at(x.raw(), piece(r).begin * element); };
  const auto bytes = [&](int r) { return (piece(r).end - piece(r).begin) * element; };
  reduce_pieces(call, reduction, x, place(rank_));
  for (int r = 0; r < size_; ++r)
    if (r != rank_) post_receive(pending_, Tag::collective, place(r), bytes(r), r);
  for (int r = 0; r < size_; ++r)
    if (r != rank_) post_send(pending_, Tag::collective, place(rank_), bytes(rank_), r);
  job_.wait(pending_, call);
}

void MpiCommunicator::all_reduce_at_once(const char* call, Reduction reduction, const Tensor& x) {
  std::byte* const staging = job_.staging(size_ * x.bytes());
  copy_bytes(staging + rank_ * x.bytes(), x.raw(), x.bytes());
  gather_in_place(call, staging, x.bytes());
  sources_.clear();
  for (int r = 0; r < size_; ++r) sources_.push_back(staging + r * x.bytes());
  reduce_in_order(reduction, x.dtype(), sources_, x.numel(), x.raw());
}

// out = this rank's piece, which the other ranks do not read.
void MpiCommunicator::reduce_pieces(const char* call, Reduction reduction, const Tensor& whole,
                                    void* out) {
  const int64_t element = dtype_bytes(whole.dtype());
  const int64_t others = std::max(size_ - 1, 1);
  const int64_t length = std::max(job_.options().staging_bytes / others / element, int64_t{1});
  int64_t longest = 0;
  for (const Piece& p : pieces_) longest = std::max(longest, p.end - p.begin);
  for (int64_t begin = 0; begin < longest; begin += length)
    reduce_slice(call, reduction, whole, begin, length, bytes_at(out, begin * element));
}

// Elements [begin, begin + length) of each rank's piece, as far as it has them.
void MpiCommunicator::reduce_slice(const char* call, Reduction reduction, const Tensor& whole,
                                   int64_t begin, int64_t length, void* out) {
  const int64_t element = dtype_bytes(whole.dtype());
  const auto slice = [&](int r) {
    const int64_t first = std::min(piece(r).begin + begin, piece(r).end);
    return Piece{first, std::min(first + length, piece(r).end)};
  };
  const Piece mine = slice(rank_);
  const int64_t count = mine.end - mine.begin;
  std::byte* arrived = job_.staging((size_ - 1) * count * element);
  sources_.clear();
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) {
      sources_.push_back(bytes_at(whole.raw(), mine.begin * element));
      continue;
    }
    post_receive(pending_, Tag::collective, arrived, count * element, r);
    sources_.push_back(arrived);
    arrived += count * element;
  }
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    const Piece theirs = slice(r);
    post_send(pending_, Tag::collective, bytes_at(whole.raw(), theirs.begin * element),
              (theirs.end - theirs.begin) * element, r);
  }
  job_.wait(pending_, call);
  reduce_in_order(reduction, whole.dtype(), sources_, count, out);
}

void MpiCommunicator::reduce_scatter_sum(Stream&, const Tensor& whole, const Tensor& part) {
  check_part("reduce_scatter_sum", part, whole, size_);
  bytes_sent_ += (size_ - 1) * part.bytes();
  pieces_.clear();
  for (int r = 0; r < size_; ++r) pieces_.push_back({r * part.numel(), (r + 1) * part.numel()});
  reduce_pieces("reduce_scatter_sum", Reduction::sum, whole, part.raw());
}

void MpiCommunicator::gather_in_place(const char* call, void* base, int64_t bytes) {
  for (int r = 0; r < size_; ++r)
    if (r != rank_) post_receive(pending_, Tag::collective, bytes_at(base, r * bytes), bytes, r);
  for (int r = 0; r < size_; ++r)
    if (r != rank_) post_send(pending_, Tag::collective, bytes_at(base, rank_ * bytes), bytes, r);
  job_.wait(pending_, call);
}

void MpiCommunicator::all_gather(Stream&, const Tensor& part, const Tensor& whole) {
  check_part("all_gather", part, whole, size_);
  bytes_sent_ += (size_ - 1) * part.bytes();
  copy_bytes(bytes_at(whole.raw(), rank_ * part.bytes()), part.raw(), part.bytes());
  gather_in_place("all_gather", whole.raw(), part.bytes());
}

void MpiCommunicator::broadcast(Stream&, const Tensor& x, int root) {
  check_tensor("broadcast", x);
  DSTRAIN_CHECK(root >= 0 && root < size_, "broadcast from a rank that is not in the set");
  if (rank_ == root) {
    bytes_sent_ += (size_ - 1) * x.bytes();
    for (int r = 0; r < size_; ++r)
      if (r != rank_) post_send(pending_, Tag::collective, x.raw(), x.bytes(), r);
  } else {
    post_receive(pending_, Tag::collective, x.raw(), x.bytes(), root);
  }
  job_.wait(pending_, "broadcast");
}

void MpiCommunicator::all_to_all(Stream&, const Tensor& send, std::span<const int64_t> send_offsets,
                                 const Tensor& recv, std::span<const int64_t> recv_offsets) {
  check_exchange("all_to_all", send, send_offsets, recv, recv_offsets, rank_, size_);
  const RowsByRank from(send, send_offsets), to(recv, recv_offsets);
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    post_receive(pending_, Tag::collective, to.data(r), to.bytes(r), r);
  }
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    post_send(pending_, Tag::collective, from.data(r), from.bytes(r), r);
    bytes_sent_ += from.bytes(r);
  }
  copy_bytes(to.data(rank_), from.data(rank_), from.bytes(rank_));
  job_.wait(pending_, "all_to_all");
}

void MpiCommunicator::send(Stream&, const Tensor& x, int to) {
  check_tensor("send", x);
  check_peer("send", to, rank_, size_);
  job_.throw_if_failed();
  Sending* sending = nullptr;
  for (Sending& entry : sends_)
    if (entry.data == x.raw()) sending = &entry;
  for (Sending& entry : sends_)
    if (!sending && !entry.data) sending = &entry;
  if (!sending) sending = &sends_.emplace_back();
  sending->data = x.raw();
  post_send(sending->requests, Tag::message, x.raw(), x.bytes(), to);
  bytes_sent_ += x.bytes();
}

void MpiCommunicator::recv(Stream&, const Tensor& x, int from) {
  check_tensor("recv", x);
  check_peer("recv", from, rank_, size_);
  post_receive(pending_, Tag::message, x.raw(), x.bytes(), from);
  job_.wait(pending_, "the send that recv waits for");
}

void MpiCommunicator::wait_send(Stream&, const Tensor& x) {
  for (Sending& entry : sends_) {
    if (entry.data != x.raw()) continue;
    job_.wait(entry.requests, "the recv that wait_send waits for");
    entry.data = nullptr;
  }
}

void MpiCommunicator::wait_sends(Stream&) {
  for (Sending& entry : sends_) {
    job_.wait(entry.requests, "the recv that wait_sends waits for");
    entry.data = nullptr;
  }
}

void MpiCommunicator::barrier() {
  const char here = 0;
  std::byte* const others = job_.staging(size_);
  for (int r = 0; r < size_; ++r)
    if (r != rank_) post_receive(pending_, Tag::collective, others + r, 1, r);
  for (int r = 0; r < size_; ++r)
    if (r != rank_) post_send(pending_, Tag::collective, &here, 1, r);
  job_.wait(pending_, "barrier");
}

std::vector<std::string> MpiCommunicator::all_gather_text(const std::string& text) {
  std::vector<int64_t> lengths(static_cast<size_t>(size_));
  lengths[static_cast<size_t>(rank_)] = static_cast<int64_t>(text.size());
  gather_in_place("all_gather_text", lengths.data(), sizeof(int64_t));
  std::vector<std::string> texts(static_cast<size_t>(size_));
  for (int r = 0; r < size_; ++r) {
    std::string& other = texts[static_cast<size_t>(r)];
    other.resize(static_cast<size_t>(lengths[static_cast<size_t>(r)]));
    if (r == rank_) other = text;
    if (r != rank_)
      post_receive(pending_, Tag::collective, other.data(), static_cast<int64_t>(other.size()), r);
  }
  const int64_t bytes = static_cast<int64_t>(text.size());
  for (int r = 0; r < size_; ++r)
    if (r != rank_) post_send(pending_, Tag::collective, text.data(), bytes, r);
  job_.wait(pending_, "all_gather_text");
  bytes_sent_ += (size_ - 1) * bytes;
  return texts;
}

// MPI_Comm_split knows no time-out; after the gathering all ranks are here. It takes no negative
// colors, and keys as int: it gets places instead.
std::unique_ptr<Communicator> MpiCommunicator::split(int color, int key) {
  std::vector<std::array<int, 2>> choices(static_cast<size_t>(size_));
  choices[static_cast<size_t>(rank_)] = {color, key};
  gather_in_place("split", choices.data(), sizeof(choices[0]));
  std::vector<std::pair<int, int>> members;  // key, rank here
  for (int r = 0; r < size_; ++r)
    if (choices[static_cast<size_t>(r)][0] == color)
      members.emplace_back(choices[static_cast<size_t>(r)][1], r);
  std::sort(members.begin(), members.end());
  std::vector<int> world_ranks;
  for (const auto& [ignored, r] : members) world_ranks.push_back(world_rank(r));
  const int first = members[0].second;
  const auto me = std::find(members.begin(), members.end(), std::pair(key, rank_));
  MPI_Comm comm = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split(comm_, first, static_cast<int>(me - members.begin()), &comm),
            "MPI_Comm_split");
  return std::make_unique<MpiCommunicator>(job_, comm, std::move(world_ranks));
}

}  // namespace dstrain
