// How large the pieces are that one block works on.
#include <algorithm>
#include <bit>

#include "cuda/kernels.h"
#include "cuda/tuning.h"

namespace fusedopt::cuda {

int32_t choose_piece_length(int64_t elements, int64_t tensors, int multiprocessors) {
  // One access of 4 elements by each of 256 threads.
  constexpr int64_t kShortest = 1024;
  // Four such accesses hide a block's start, once every multiprocessor has its 4 blocks.
  constexpr int64_t kShort = 4 * kShortest;
  multiprocessors = std::max(multiprocessors, 1);
  const int64_t each = std::clamp<int64_t>(elements / (4 * multiprocessors), kShortest, kShort);
  const auto shortest = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(each)));
  // 4 resident blocks in a multiprocessor, 16 times over: when the last ones run out, 1/16 of the
  // time is at stake, and most of that is still spent at full bandwidth, because a third of the
  // blocks can keep memory busy.
  const int64_t wanted = int64_t{64} * multiprocessors;
  // Every tensor begins a piece anyway; but leave enough cuts to spread one large tensor among many
  // small ones.
  const int64_t cuts = std::max(wanted - tensors, wanted / 4);
  const int64_t even = std::max((elements + cuts - 1) / cuts, shortest);
  const int64_t length =
      std::clamp<int64_t>(tuned("FUSEDOPT_PIECE_LENGTH", even), kShortest, kLongestPiece);
  return static_cast<int32_t>(std::bit_ceil(static_cast<uint64_t>(length)));
}

}  // namespace fusedopt::cuda
