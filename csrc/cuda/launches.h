// Which launches a table needs: one for each kernel in it. Host only.
#pragma once

#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace fusedopt::cuda {

// The rows and pieces of one launch; both are runs within those of all launches.
struct Launch {
  ApplyKernel kernel;
  std::string name;  // for messages
  int64_t first_row;
  int64_t row_count;
  int64_t first_piece;
  int64_t piece_count;
};

struct Launches {
  std::vector<Launch> launches;
  std::vector<int32_t> rows;          // tensors in the order of the launches
  std::vector<Piece> pieces;          // theirs, in the order of the launches
  std::vector<int64_t> first_piece;   // by tensor, where its pieces begin in `pieces`
  std::vector<int64_t> piece_counts;  // by tensor
};

Launches cut_launches(size_t rule, const Table& table);

}  // namespace fusedopt::cuda
