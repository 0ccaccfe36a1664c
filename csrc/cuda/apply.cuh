// The apply pass: reads parameter, gradient and states once, writes parameter and states once, with
// one block for each piece. A block a piece rather than a grid of resident blocks that walk the
// pieces: the hardware then hands the next piece to whichever multiprocessor is free, and the
// pieces (choose_piece_length) are long enough to hide a block's start behind the other blocks'
// traffic.
#pragma once

#include <new>

#include "core/control.h"
#include "cuda/access.cuh"
#include "cuda/block.cuh"

namespace fusedopt::cuda {

// What one thread of a block works out for all.
template <typename Types>
struct PieceNumbers {
  using T = typename Types::Compute;
  typename Types::Rule::template Constants<T> constants;
  GradTransform<T> transform;
  bool last_block;
};

template <typename Types>
FUSEDOPT_DEVICE typename Types::Rule::template Constants<typename Types::Compute> make_constants(
    const GroupRow& group, double step) {
  using Hyper = typename Types::Rule::Hyper;
  static_assert(sizeof(Hyper) <= sizeof(group.hyper));
  Hyper hyper = reinterpret_cast<const Hyper&>(group.hyper);
  if (group.lr != nullptr) hyper.common.lr = read_number(group.lr, group.lr_type);
  return {hyper, step};
}

template <typename T>
FUSEDOPT_DEVICE GradTransform<T> make_transform(const ApplyParams& params, const GroupRow& group,
                                                int32_t tensor) {
  const bool given = params.control != nullptr;
  return {T(given ? params.control->unscale : read_unscale(params.inputs)), T(group.max_grad_value),
          T(params.clips != nullptr ? params.clips[tensor] : 1.0),
          T(given ? params.control->clip : 1.0)};
}

// Once the last block holds its ticket every block has read its counter, so that block may advance
// them all.
FUSEDOPT_DEVICE void advance_counters(const ApplyParams& params) {
  for (int64_t i = threadIdx.x; i < params.row_count; i += kThreads) {
    const int32_t tensor = params.rows[i];
    if (params.table.grads[tensor] != nullptr) advance_step(params.table.tensors[tensor]);
  }
}

template <typename Types>
__global__ void __launch_bounds__(kThreads, 3)
    apply_kernel(const __grid_constant__ ApplyParams params) {
  using T = typename Types::Compute;
  const bool skip =
      params.control != nullptr ? params.control->skip != 0.0 : found_inf(params.inputs);
  if (params.record != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    *params.record = StepControl{read_unscale(params.inputs), 1.0, 0.0, 0.0, skip ? 1.0 : 0.0};
  }
  if (skip) return;

  // A launch whose tensors are all empty has one block and no piece.
  const bool has_piece = blockIdx.x < params.piece_count;
  const Piece piece = has_piece ? params.pieces[blockIdx.x] : Piece{0, 0, params.rows[0]};
  const TensorRow& row = params.table.tensors[piece.tensor];

  alignas(PieceNumbers<Types>) __shared__ unsigned char shared[sizeof(PieceNumbers<Types>)];
  PieceNumbers<Types>& numbers = reinterpret_cast<PieceNumbers<Types>&>(shared);
  if (threadIdx.x == 0) {
    const GroupRow& group = params.table.groups[row.group];
    const double step = next_step(row);
    new (shared) PieceNumbers<Types>{make_constants<Types>(group, step),
                                     make_transform<T>(params, group, piece.tensor),
                                     take_last_ticket(params.ticket, gridDim.x)};
  }
  __syncthreads();
  if (numbers.last_block) advance_counters(params);

  const PieceAccess<Types> access(row, params.table.grads[piece.tensor], piece);
#pragma unroll 1
  for (int i = threadIdx.x; i < access.count(); i += kThreads) {
    Elements<Types> elements = {};
    access.load(i, elements);
    elements.update(numbers.constants, numbers.transform);
    access.store(i, elements);
  }
}

}  // namespace fusedopt::cuda
