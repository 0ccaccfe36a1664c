// What tests may ask of the emulated CUDA runtime, and what it counts.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <vector>

namespace emulation {

struct Counts {
  int launches = 0;
  int copies = 0;
  int waits = 0;        // cudaEventSynchronize calls that found their event not reached
  int allocations = 0;  // alive, on the device and pinned
};
Counts& counts();

// Blocks, and the threads of a block between two barriers, run in order or in reverse; results must
// not depend on it.
void set_reversed(bool reversed);

// Deferred: what is enqueued on a stream waits until somebody waits for it. Else it runs at once.
void set_deferred(bool deferred);
void synchronize();

// The next call of this kind returns the error.
void fail_next_allocation();
void fail_next_launch();

// No driver, as on a machine without a GPU.
void set_driver(bool present);

// Between the two, what is enqueued on the stream is recorded and not run. As under
// cudaStreamCaptureModeGlobal, calls that allocate or wait for events fail while the capture lasts,
// unless the thread's mode is relaxed.
using Graph = std::vector<std::function<void()>>;
void begin_capture(cudaStream_t stream);
Graph end_capture(cudaStream_t stream);

}  // namespace emulation
