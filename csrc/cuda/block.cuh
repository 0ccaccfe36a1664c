// What the threads of a block do together: sums in a fixed order, and finding out which block comes
// last. Also the numbers that every block of a step reads from the step's inputs.
#pragma once

#include "cuda/kernels.h"
#include "cuda/memory.cuh"

namespace fusedopt::cuda {

// The sum of every thread's value, returned to all; the order of additions is always the same. All
// threads must call it.
FUSEDOPT_DEVICE double block_sum(double value) {
  __shared__ double sums[kThreads];
  __syncthreads();  // an earlier sum may still be read
  sums[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

// Called by one thread of each of `holders` blocks: true for the last of them, which sees all that
// the others' calling threads wrote before (through __ldcg: a line that another block wrote may be
// stale in this multiprocessor's cache). Leaves the ticket at 0 for the next launch.
FUSEDOPT_DEVICE bool take_last_ticket(uint32_t* ticket, int64_t holders) {
  __threadfence();
  if (atomicAdd(ticket, 1u) + int64_t{1} != holders) return false;
  *ticket = 0;
  __threadfence();
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
