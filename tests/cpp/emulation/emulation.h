// What tests may ask of the emulated CUDA runtime, and what it counts.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <string>
#include <vector>

namespace emulation {

constexpr int kDevices = 2;

struct Counts {
  int launches = 0;
  int copies = 0;
  int waits = 0;        // cudaEventSynchronize calls that found their event not reached
  int allocations = 0;  // alive, on the device and pinned; without torch's
};
Counts& counts();

// Blocks, and the threads of a block between two barriers, run in order or in reverse; results must
// not depend on it.
void set_reversed(bool reversed);

// Deferred: what is enqueued on a stream waits until somebody waits for it. Else it runs at once.
void set_deferred(bool deferred);
void synchronize();

// Patient: a copy from pageable memory is staged and does not wait for its stream, as it may.
void set_patient(bool patient);

// The next call of this kind returns the error.
void fail_next_allocation();
void fail_next_launch();

// The `nth` call of the runtime from now on (1: the next) returns cudaErrorUnknown and does nothing
// else; 0: none. `failed_call` names it, empty until it has come.
void fail_call(int nth);
const std::string& failed_call();

// Writes down the names of all calls until `take_calls` returns them.
void listen();
std::vector<std::string> take_calls();

// No driver, as on a machine without a GPU.
void set_driver(bool present);

// Whether a context was made on a device, by choosing it or by using it.
bool has_context(int device);
void forget_contexts();

// Between the two, what is enqueued on the stream is recorded and not run. As under
// cudaStreamCaptureModeGlobal, calls that allocate or wait for events fail while the capture lasts,
// unless the thread's mode is relaxed.
using Graph = std::vector<std::function<void()>>;
void begin_capture(cudaStream_t stream);
Graph end_capture(cudaStream_t stream);
// Replays a graph in the order of a stream. It must live until then.
void replay(const Graph& graph, cudaStream_t stream);

// Holds up a stream until the gate is opened, from another thread, or too much time has passed,
// which is a violation.
void enqueue_gate(cudaStream_t stream);
void set_gate_seconds(double seconds);
void open_gate();

// Strict: kernels may be given memory of their own device only, alive in the order of the stream.
// Whatever hardware would forgive or answer with garbage is a violation; `take_violations` returns
// and forgets those so far.
void set_strict(bool strict);
std::vector<std::string> take_violations();

// Memory that follows the order of a stream, as torch's caching allocator gives it: a released
// block serves the next request of that stream at once. Other streams that use it have to be named.
void* allocate(size_t size, int device, cudaStream_t stream);
void release(void* data);
void use_on(void* data, cudaStream_t stream);

}  // namespace emulation
