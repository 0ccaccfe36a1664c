// The reduce pass: reads every gradient once. The last block of each tensor turns its partial sums
// into its norm and clip coefficient; the last tensor's adds up the total and writes the step
// control. No floating-point atomics: everything is added up in the order of core/sum_order.h.
#include "core/control.h"
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/squares.cuh"

namespace fusedopt::cuda {
namespace {

// What one block, then one tensor has found.
struct Found {
  double sum_squares = 0.0;
  int nonfinite = 0;
};

// What the block finds in a piece of a gradient, for all threads.
template <typename Storage>
FUSEDOPT_DEVICE Found reduce_grad(const void* grad, const TensorRow& row, const Piece& piece,
                                  const ReduceParams& params, double unscale, double* sums) {
  const OperandAccess<Storage> operand(Operand{const_cast<void*>(grad), row.grad.type});
  bool nonfinite;
  if (params.clamps) {
    Squares<Storage> squares(unscale, params.table.groups[row.group].max_grad_value, sums);
    squares.template add<true>(operand, row.layout, piece);
    nonfinite = squares.nonfinite();
  } else {
    Squares<Storage> squares(unscale, INFINITY, sums);
    squares.template add<false>(operand, row.layout, piece);
    nonfinite = squares.nonfinite();
  }
  const int any_nonfinite = __syncthreads_or(nonfinite);
  const int thread = threadIdx.x;
  return {add_over_block(thread * kGranule < piece.length ? sums[thread] : 0.0), any_nonfinite};
}

// The same for a gradient of any type; nothing without one. The squares are those of the numbers
// that the apply pass computes with: kMixed where a row computes in float64 and its gradient is not
// stored so, or the other way round.
template <bool kMixed>
FUSEDOPT_DEVICE Found reduce_piece(const ReduceParams& params, const Piece& piece, double unscale) {
  const TensorRow& row = params.table.tensors[piece.tensor];
  const void* grad = params.table.grads[piece.tensor];
  if (grad == nullptr) return {};
  static_assert(kLongestPiece <= kThreads * kGranule);
  __shared__ double sums[kThreads];
  if constexpr (kMixed) {
    return computes_in_float64(row)
               ? reduce_grad<Mixed<double>>(grad, row, piece, params, unscale, sums)
               : reduce_grad<Mixed<float>>(grad, row, piece, params, unscale, sums);
  }
  switch (row.grad.type) {
    case DType::kFloat32:
      return reduce_grad<float>(grad, row, piece, params, unscale, sums);
    case DType::kFloat64:
      return reduce_grad<double>(grad, row, piece, params, unscale, sums);
    case DType::kFloat16:
      return reduce_grad<Float16>(grad, row, piece, params, unscale, sums);
    case DType::kBFloat16:
      return reduce_grad<BFloat16>(grad, row, piece, params, unscale, sums);
  }
  return {};
}

// Adds up partial results, neighbours first, for all threads. Where a block cannot do so at once,
// the sums of runs go to `scratch`, which may be the partial results themselves.
FUSEDOPT_DEVICE Found add_partials(const Partial* partials, int64_t count, Partial* scratch) {
  constexpr int kEach = 8;
  constexpr int kRun = kEach * kThreads;
  int nonfinite = 0;
  for (;;) {
    double sum = 0.0;
    for (int64_t begin = 0; begin < count; begin += kRun) {
      double own[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t at = begin + int(threadIdx.x) * kEach + i;
        own[i] = at < count ? __ldcg(&partials[at].sum_squares) : 0.0;
        nonfinite |= at < count && __ldcg(&partials[at].nonfinite) != 0;
      }
      sum = add_over_block(((own[0] + own[1]) + (own[2] + own[3])) +
                           ((own[4] + own[5]) + (own[6] + own[7])));
      if (count > kRun && threadIdx.x == 0) scratch[begin / kRun] = Partial{sum, nonfinite};
    }
    nonfinite = __syncthreads_or(nonfinite);
    if (count <= kRun) return {sum, nonfinite};
    partials = scratch;
    count = (count + kRun - 1) / kRun;
  }
}

// Leaves the tensor's clip coefficient, and its part in the total.
FUSEDOPT_DEVICE void finish_tensor(const ReduceParams& params, int32_t tensor, const Found& found) {
  const GroupRow& group = params.table.groups[params.table.tensors[tensor].group];
  const ParamClip clip = clip_by_param(found.sum_squares, group.max_grad_norm_per_param);
  params.clips[tensor] = clip.coefficient;
  params.tensor_totals[tensor] = Partial{clip.sum_squares, found.nonfinite};
}

FUSEDOPT_DEVICE void finish_step(const ReduceParams& params, const Found& found) {
  if (params.totals != nullptr) {
    params.totals[0] = found.sum_squares;
    params.totals[1] = found.nonfinite != 0 ? 1.0 : 0.0;
  }
  if (params.control != nullptr) {
    *params.control = settle(read_unscale(params.inputs), found.sum_squares, found.nonfinite != 0,
                             found_inf(params.inputs), params.max_grad_norm, params.skip_nonfinite);
  }
}

// Without any piece one block finishes the step, whose total is 0.
template <bool kMixed>
__global__ void __launch_bounds__(kThreads, 4)
    reduce_kernel(const __grid_constant__ ReduceParams params) {
  __shared__ bool last;
  if (params.piece_count > 0) {
    const double unscale = read_unscale(params.inputs);
    const Piece piece = params.pieces[blockIdx.x];
    const int64_t begin = params.first_piece[piece.tensor];
    const int64_t count = params.piece_counts[piece.tensor];
    Found found = reduce_piece<kMixed>(params, piece, unscale);
    if (count > 1) {
      if (threadIdx.x == 0) {
        params.partials[blockIdx.x] = Partial{found.sum_squares, found.nonfinite};
        last = take_last_ticket(&params.tensor_tickets[piece.tensor], count);
      }
      __syncthreads();
      if (!last) return;
      found = add_partials(params.partials + begin, count, params.partials + begin);
    }
    if (threadIdx.x == 0) {
      finish_tensor(params, piece.tensor, found);
      last = take_last_ticket(params.ticket, params.filled_count);
    }
    __syncthreads();
    if (!last) return;
  }
  const Found total = add_partials(params.tensor_totals, params.tensor_count, params.partials);
  if (threadIdx.x == 0) finish_step(params, total);
}

}  // namespace

ReduceKernel reduce_kernel_of_all_rules(bool mixed) {
  return mixed ? &reduce_kernel<true> : &reduce_kernel<false>;
}

}  // namespace fusedopt::cuda
