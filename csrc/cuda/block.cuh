// What the threads of a block do together: sums in a fixed order, and finding out which block comes
// last. Also the numbers that every block of a step reads from the step's inputs.
#pragma once

#include "cuda/kernels.h"
#include "cuda/memory.cuh"

namespace fusedopt::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Adds up neighbours among the first kCount threads of every run of kCount, then neighbours of
// those (core/sum_order.h); every thread of a run gets its sum. All threads of a warp must call it.
template <int kCount = kWarp>
FUSEDOPT_DEVICE double add_neighbouring_threads(double value) {
#pragma unroll
  for (int distance = 1; distance < kCount; distance *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The same over the whole block, for all threads.
FUSEDOPT_DEVICE double add_over_block(double value) {
  __shared__ double of_warps[kWarps];
  const double sum = add_neighbouring_threads(value);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  return add_neighbouring_threads<kWarps>(of_warps[threadIdx.x % kWarps]);
}

// Adds to a number that all blocks share. What this thread wrote before is seen by whoever later
// adds to it too; and this thread sees what they wrote.
FUSEDOPT_DEVICE uint32_t add_acquire_release(uint32_t* to, uint32_t value) {
#ifdef __CUDA_ARCH__
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(to)), "r"(value)
               : "memory");
  return old;
#else
  return atomicAdd(to, value);
#endif
}

// Called by one thread of each of `holders` blocks: true for the last of them, which sees all that
// the others' calling threads wrote before (through __ldcg: a line that another block wrote may be
// stale in this multiprocessor's cache). Leaves the ticket at 0 for the next launch.
FUSEDOPT_DEVICE bool take_last_ticket(uint32_t* ticket, int64_t holders) {
  if (add_acquire_release(ticket, 1u) + int64_t{1} != holders) return false;
  *ticket = 0;
  return true;
}

FUSEDOPT_DEVICE double read_unscale(const StepInputs& inputs) {
  if (inputs.unscale != nullptr) return *inputs.unscale;
  return inputs.grad_scale != nullptr ? 1.0 / static_cast<double>(*inputs.grad_scale) : 1.0;
}

FUSEDOPT_DEVICE bool found_inf(const StepInputs& inputs) {
  return inputs.found_inf != nullptr && *inputs.found_inf != 0.0f;
}

}  // namespace fusedopt::cuda
