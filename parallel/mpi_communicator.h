// Communicator over MPI on host memory. Includes mpi.h: use it through MpiSession
// (parallel/mpi_session.h).
//
// Everything is made of point-to-point messages between the ranks concerned, sent all at once: sums
// do not depend on the reduction algorithm of a library, and a rank that does not come has a name.
// A sum is the exchange of all ranks' pieces, added up in rank order by their owner, and for an
// all-reduce their gathering.
#pragma once

#include <mpi.h>

#include <memory>
#include <vector>

#include "core/dist/communicator.h"
#include "parallel/mpi_job.h"
#include "parallel/rank_sums.h"

namespace dstrain {

class MpiCommunicator : public Communicator {
 public:
  // Takes over `comm`. world_ranks: of its ranks, in order. The job must outlive this.
  MpiCommunicator(MpiJob& job, MPI_Comm comm, std::vector<int> world_ranks);
  ~MpiCommunicator() override;
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void all_reduce_sum(Stream&, const Tensor& x) override;
  void all_reduce_max(Stream&, const Tensor& x) override;
  void reduce_scatter_sum(Stream&, const Tensor& whole, const Tensor& part) override;
  void all_gather(Stream&, const Tensor& part, const Tensor& whole) override;
  void broadcast(Stream&, const Tensor& x, int root) override;
  void all_to_all(Stream&, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override;
  void send(Stream&, const Tensor& x, int to) override;
  void recv(Stream&, const Tensor& x, int from) override;
  void wait_send(Stream&, const Tensor& x) override;
  void wait_sends(Stream&) override;
  void barrier() override;
  std::vector<std::string> all_gather_text(const std::string& text) override;
  std::unique_ptr<Communicator> split(int color, int key) override;
  int64_t bytes_sent() const override { return bytes_sent_; }

 private:
  enum class Tag : int { collective = 1, message = 2 };
  // Elements [begin, end) of a tensor, for each rank.
  struct Piece {
    int64_t begin = 0, end = 0;
  };
  // The sends of one tensor that are under way.
  struct Sending {
    const void* data = nullptr;  // null: not in use
    MpiRequests requests;
  };

  const Piece& piece(int rank) const { return pieces_[static_cast<size_t>(rank)]; }
  int world_rank(int rank) const { return world_ranks_[static_cast<size_t>(rank)]; }
  void post_send(MpiRequests& pending, Tag tag, const void* data, int64_t bytes, int to);
  void post_receive(MpiRequests& pending, Tag tag, void* data, int64_t bytes, int from);
  // Fixed-size pieces of all ranks, at base + r * bytes; this rank's is there already.
  void gather_in_place(const char* call, void* base, int64_t bytes);

  void all_reduce(const char* call, Reduction reduction, const Tensor& x);
  void all_reduce_at_once(const char* call, Reduction reduction, const Tensor& x);
  void reduce_pieces(const char* call, Reduction reduction, const Tensor& whole, void* out);
  void reduce_slice(const char* call, Reduction reduction, const Tensor& whole, int64_t begin,
                    int64_t length, void* out);

  MpiJob& job_;
  MPI_Comm comm_;
  const std::vector<int> world_ranks_;
  const int rank_, size_;
  int64_t bytes_sent_ = 0;
  MpiRequests pending_;               // of the call under way
  std::vector<Sending> sends_;        // of send(), by tensor; entries are used again
  std::vector<Piece> pieces_;         // of the sum under way, by rank
  std::vector<const void*> sources_;  // scratch of sums
};

}  // namespace dstrain
