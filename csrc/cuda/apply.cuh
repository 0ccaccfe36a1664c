// The apply pass: reads parameter, gradient and states once, writes parameter and states once, with
// one block for each piece. A block a piece rather than a grid of resident blocks that walk the
// pieces: the hardware then hands the next piece to whichever multiprocessor is free, and the
// pieces (choose_piece_length) are long enough to hide a block's start behind the other blocks'
// traffic.
#pragma once

#include <new>

#include "core/control.h"
#include "core/scalars.h"
#include "cuda/access.cuh"
#include "cuda/block.cuh"

namespace fusedopt::cuda {

// What one thread of a block works out for all.
template <typename Types>
struct PieceNumbers {
  using T = typename Types::Compute;
  typename Types::Rule::template Constants<T> constants;
  GradTransform<T> transform;
  int clamps;
  int scales;
};

template <typename Rule>
FUSEDOPT_DEVICE typename Rule::Hyper read_hyper(const GroupRow& group) {
  using Hyper = typename Rule::Hyper;
  static_assert(sizeof(Hyper) <= sizeof(group.hyper));
  Hyper hyper = reinterpret_cast<const Hyper&>(group.hyper);
  if (group.lr != nullptr) hyper.common.lr = read_number(group.lr, group.lr_type);
  return hyper;
}

template <typename T>
FUSEDOPT_DEVICE GradTransform<T> make_transform(const ApplyParams& params, const GroupRow& group,
                                                int32_t tensor) {
  const bool given = params.control != nullptr;
  return {T(given ? params.control->unscale : read_unscale(params.inputs)), T(group.max_grad_value),
          T(params.clips != nullptr ? params.clips[tensor] : 1.0),
          T(given ? params.control->clip : 1.0)};
}

// By the block that came last, for all: counters, and before them what they lead to.
template <typename Rule>
FUSEDOPT_DEVICE void advance_counters(const ApplyParams& params) {
  constexpr int kScalars = rules::kScalarCount<Rule>;
  for (int64_t i = threadIdx.x; i < params.row_count; i += kThreads) {
    const int32_t tensor = params.rows[i];
    if (params.table.grads[tensor] == nullptr) continue;
    const TensorRow& row = params.table.tensors[tensor];
    if constexpr (kScalars > 0) {
      auto scalars = load_scalars<kScalars>(row);
      Rule::advance(read_hyper<Rule>(params.table.groups[row.group]), next_step(row), scalars);
      store_scalars(row, scalars);
    }
    advance_step(row);
  }
}

template <typename Types>
__global__ void __launch_bounds__(kThreads, Types::kBlocks)
    apply_kernel(const __grid_constant__ ApplyParams params) {
  using Rule = typename Types::Rule;
  using T = typename Types::Compute;
  const bool skip =
      params.control != nullptr ? params.control->skip != 0.0 : found_inf(params.inputs);
  if (params.record != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    *params.record = StepControl{read_unscale(params.inputs), 1.0, 0.0, 0.0, skip ? 1.0 : 0.0};
  }
  if (skip) return;

  // A launch whose tensors are all empty has one block and no piece. After a reduce pass the pieces
  // are taken backwards: the gradients that were read last are still in the second-level cache.
  const bool has_piece = blockIdx.x < params.piece_count;
  const int64_t index =
      params.control != nullptr ? params.piece_count - 1 - blockIdx.x : int64_t{blockIdx.x};
  const Piece piece = has_piece ? params.pieces[index] : Piece{0, 0, params.rows[0]};
  const TensorRow& row = params.table.tensors[piece.tensor];
  const void* const grad = params.table.grads[piece.tensor];
  PieceAccess<Types>::prefetch(row, grad, piece);

  alignas(PieceNumbers<Types>) __shared__ unsigned char shared[sizeof(PieceNumbers<Types>)];
  auto* address = reinterpret_cast<PieceNumbers<Types>*>(shared);
  // With three states of 8 elements there is no register left for it.
  if constexpr (Types::kRegisters < 40) address = hold_shared_address(address);
  PieceNumbers<Types>& numbers = *address;
  // A row without a gradient may have no counter yet.
  if (threadIdx.x == 0 && grad != nullptr) {
    const GroupRow& group = params.table.groups[row.group];
    const GradTransform<T> transform = make_transform<T>(params, group, piece.tensor);
    const auto scalars = load_scalars<rules::kScalarCount<Rule>>(row);
    new (shared) PieceNumbers<Types>{
        make_constants<Rule, T>(read_hyper<Rule>(group), next_step(row), scalars), transform,
        transform.clamps(), transform.scales()};
  }
  __syncthreads();

  const PieceAccess<Types> access(row, grad, piece);
  uint32_t ticket = 0;
  if (threadIdx.x == 0) ticket = add_acquire_release(params.ticket, 1u);
#pragma unroll 1
  for (int i = threadIdx.x; i < access.count(); i += kThreads) {
    Elements<Types> elements = {};
    access.load(i, elements);
    elements.update(numbers);
    access.store(i, elements);
  }

  // The counters advance when every block has read its own.
  __shared__ bool last_block;
  if (threadIdx.x == 0) {
    last_block = ticket + 1 == gridDim.x;
    if (last_block) *params.ticket = 0;
  }
  __syncthreads();
  if (last_block) advance_counters<Rule>(params);
}

}  // namespace fusedopt::cuda
