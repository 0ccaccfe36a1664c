// How large the pieces are that one block works on.
#include <algorithm>
#include <bit>

#include "cuda/launch.h"
#include "cuda/tuning.h"

namespace fusedopt::cuda {

int32_t choose_piece_length(int64_t elements, int64_t tensors, int multiprocessors) {
  // One access of 4 elements by each of 256 threads; 64 Ki elements of Adam are 1.8 MB, hundreds of
  // times a block's start.
  constexpr int64_t kShortest = 1024;
  constexpr int64_t kLongest = 64 * 1024;
  // 4 resident blocks in a multiprocessor, 16 times over: when the last ones run out, 1/16 of the
  // time is at stake, and most of that is still spent at full bandwidth, because a third of the
  // blocks can keep memory busy.
  const int64_t wanted = int64_t{64} * std::max(multiprocessors, 1);
  // Every tensor begins a piece anyway; but leave enough cuts to spread one large tensor among many
  // small ones.
  const int64_t cuts = std::max(wanted - tensors, wanted / 4);
  const int64_t wanted_length = tuned("FUSEDOPT_PIECE_LENGTH", (elements + cuts - 1) / cuts);
  const int64_t length = std::clamp(wanted_length, kShortest, kLongest);
  return static_cast<int32_t>(std::bit_ceil(static_cast<uint64_t>(length)));
}

}  // namespace fusedopt::cuda
