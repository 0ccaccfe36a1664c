// The reduce pass: reads every gradient once. The last block of each tensor turns its partial sums
// into its norm and clip coefficient; the last tensor's adds up the total and writes the step
// control. No floating-point atomics: every sum has one order.
#include "core/control.h"
#include "cuda/block.cuh"
#include "cuda/kernels.h"

namespace fusedopt::cuda {
namespace {

// Vectors in flight for each thread: 64 bytes, as in the apply pass (access.cuh).
constexpr int kVectorsInFlight = 4;

// What one thread, then one block, then one tensor has found.
struct Found {
  double sum_squares = 0.0;
  int nonfinite = 0;

  template <typename T>
  FUSEDOPT_DEVICE void add(T raw, T unscale, T max_value) {
    nonfinite |= raw - raw != T(0);  // inf - inf and nan - nan are nan
    const double x = static_cast<double>(clamp_value(raw * unscale, max_value));
    sum_squares += x * x;
  }

  // Returns to all threads what all of them have found.
  FUSEDOPT_DEVICE Found over_block() const {
    return {block_sum(sum_squares), __syncthreads_or(nonfinite)};
  }
};

template <typename Storage>
FUSEDOPT_DEVICE Found reduce_elements(const void* base, const int64_t* layout, const Piece& piece,
                                      double unscale_, double max_value_) {
  using T = std::conditional_t<std::is_same_v<Storage, double>, double, float>;
  constexpr int kVector = kAccessBytes / sizeof(Storage);
  const T unscale = T(unscale_);
  const T max_value = T(max_value_);
  const int thread = threadIdx.x;
  const Storage* grad = static_cast<const Storage*>(base);
  Found found;
  if (layout != nullptr) {
    for (int i = thread; i < piece.length; i += kThreads) {
      int64_t offsets[2];
      strided_offsets(layout, piece.begin + i, offsets);
      found.add(from_storage<T>(grad[offsets[1]]), unscale, max_value);
    }
    return found;
  }
  grad += piece.begin;
  const int head = min(elements_to_alignment(grad), piece.length);
  const int vectors = (piece.length - head) / kVector;
  for (int v = thread; v < vectors; v += kThreads * kVectorsInFlight) {
    T values[kVectorsInFlight][kVector];
#pragma unroll
    for (int u = 0; u < kVectorsInFlight; ++u) {
      const int at = v + u * kThreads;
      if (at < vectors) load_vector(grad + head + at * kVector, values[u]);
    }
#pragma unroll
    for (int u = 0; u < kVectorsInFlight; ++u) {
      if (v + u * kThreads >= vectors) break;
#pragma unroll
      for (int i = 0; i < kVector; ++i) found.add(values[u][i], unscale, max_value);
    }
  }
  // The elements before and after the vectors are fewer than two vectors, so a thread has at most
  // one.
  const int edges = piece.length - vectors * kVector;
  if (thread < edges) {
    const int at = thread < head ? thread : thread + vectors * kVector;
    found.add(from_storage<T>(grad[at]), unscale, max_value);
  }
  return found;
}

FUSEDOPT_DEVICE Found reduce_piece(const ReduceParams& params, const Piece& piece) {
  const TensorRow& row = params.table.tensors[piece.tensor];
  const void* grad = params.table.grads[piece.tensor];
  if (grad == nullptr) return {};
  const double unscale = read_unscale(params.inputs);
  const double max_value = params.table.groups[row.group].max_grad_value;
  switch (row.grad_type) {
    case DType::kFloat32:
      return reduce_elements<float>(grad, row.layout, piece, unscale, max_value);
    case DType::kFloat64:
      return reduce_elements<double>(grad, row.layout, piece, unscale, max_value);
    case DType::kFloat16:
      return reduce_elements<Float16>(grad, row.layout, piece, unscale, max_value);
    case DType::kBFloat16:
      return reduce_elements<BFloat16>(grad, row.layout, piece, unscale, max_value);
  }
  return {};
}

// Adds up partial results, one thread every kThreads-th of them.
FUSEDOPT_DEVICE Found add_partials(const Partial* partials, int64_t begin, int64_t end) {
  Found found;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    found.sum_squares += __ldcg(&partials[i].sum_squares);
    found.nonfinite |= __ldcg(&partials[i].nonfinite) != 0;
  }
  return found.over_block();
}

// Leaves the tensor's clip coefficient, and its part in the total.
FUSEDOPT_DEVICE void finish_tensor(const ReduceParams& params, int32_t tensor, const Found& found) {
  const GroupRow& group = params.table.groups[params.table.tensors[tensor].group];
  double clip = 1.0;
  double sum_squares = found.sum_squares;
  if (group.max_grad_norm_per_param != INFINITY) {
    const double norm = sqrt(sum_squares);
    clip = clip_coefficient(norm, group.max_grad_norm_per_param);
    sum_squares = (norm * clip) * (norm * clip);
  }
  params.clips[tensor] = clip;
  params.tensor_totals[tensor] = Partial{sum_squares, found.nonfinite};
}

FUSEDOPT_DEVICE void finish_step(const ReduceParams& params, const Found& found) {
  if (params.totals != nullptr) {
    params.totals[0] = found.sum_squares;
    params.totals[1] = found.nonfinite != 0 ? 1.0 : 0.0;
  }
  if (params.control != nullptr) {
    const double norm = sqrt(found.sum_squares);
    const bool nonfinite = found.nonfinite != 0;
    const bool skip = found_inf(params.inputs) || (params.skip_nonfinite && nonfinite);
    *params.control = StepControl{
        read_unscale(params.inputs),
        params.max_grad_norm >= 0.0 ? clip_coefficient(norm, params.max_grad_norm) : 1.0, norm,
        nonfinite ? 1.0 : 0.0, skip ? 1.0 : 0.0};
  }
}

// Without any piece one block finishes the step, whose total is 0.
__global__ void __launch_bounds__(kThreads, 4)
    reduce_kernel(const __grid_constant__ ReduceParams params) {
  __shared__ bool last;
  if (params.piece_count > 0) {
    const Piece piece = params.pieces[blockIdx.x];
    const int64_t begin = params.first_piece[piece.tensor];
    const int64_t count = params.piece_counts[piece.tensor];
    Found found = reduce_piece(params, piece).over_block();
    if (count > 1) {
      if (threadIdx.x == 0) {
        params.partials[blockIdx.x] = Partial{found.sum_squares, found.nonfinite};
        last = take_last_ticket(&params.tensor_tickets[piece.tensor], count);
      }
      __syncthreads();
      if (!last) return;
      found = add_partials(params.partials, begin, begin + count);
    }
    if (threadIdx.x == 0) {
      finish_tensor(params, piece.tensor, found);
      last = take_last_ticket(params.ticket, params.filled_count);
    }
    __syncthreads();
    if (!last) return;
  }
  const Found total = add_partials(params.tensor_totals, 0, params.tensor_count);
  if (threadIdx.x == 0) finish_step(params, total);
}

}  // namespace

ReduceKernel reduce_kernel_of_all_rules() { return &reduce_kernel; }

}  // namespace fusedopt::cuda
