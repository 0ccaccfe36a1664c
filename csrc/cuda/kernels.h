// The kernels and what they are launched with: one plain struct each, passed by value, every
// pointer of which is on the device. The interface between kernels and launchers.
#pragma once

#include "cuda/launch.h"

namespace fusedopt::cuda {

// Threads of a block, in every kernel.
constexpr int kThreads = 256;
// Elements of the longest piece.
constexpr int kLongestPiece = 64 * 1024;

// The device's copy of a table. What changes from step to step stands apart from the rows, so that
// it travels in one copy.
struct DeviceTable {
  const TensorRow* tensors;  // their `grad` is not used
  const void* const* grads;  // by tensor
  const GroupRow* groups;
};

// One launch: all pieces of one kernel, one block each.
struct ApplyParams {
  DeviceTable table;
  const Piece* pieces;
  int64_t piece_count;
  const int32_t* rows;  // the tensors of this launch, also those without elements
  int64_t row_count;
  StepInputs inputs;
  const StepControl* control;  // null: the numbers come from `inputs`
  StepControl* record;         // where they are then left; null: nowhere
  const double* clips;         // by tensor, its own norm's coefficient; null: all 1
  uint32_t* ticket;            // 0 between launches
};

// One launch over all pieces, one block each.
struct ReduceParams {
  DeviceTable table;
  const Piece* pieces;
  int64_t piece_count;
  int64_t tensor_count;
  int64_t filled_count;         // tensors that have pieces
  const int64_t* first_piece;   // by tensor
  const int64_t* piece_counts;  // by tensor
  StepInputs inputs;
  double max_grad_norm;
  bool skip_nonfinite;
  bool clamps;               // whether any group limits values
  Partial* partials;         // by piece; at least as many as tensors
  Partial* tensor_totals;    // by tensor: (norm x coefficient)^2; zero where there are no pieces
  double* clips;             // by tensor
  uint32_t* tensor_tickets;  // 0 between launches
  uint32_t* ticket;          // 0 between launches
  StepControl* control;
  double* totals;
};

using ApplyKernel = void (*)(ApplyParams);
using ReduceKernel = void (*)(ReduceParams);

// In reduce.cu. `mixed`: the one for rows of which any computes in float64 and has a gradient that
// is stored otherwise, or the other way round.
ReduceKernel reduce_kernel_of_all_rules(bool mixed);

}  // namespace fusedopt::cuda
