// The emulated CUDA runtime: the threads of a block are fibers that run one after another from
// barrier to barrier, a stream is a queue of functions.
#include <malloc.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <set>
#include <utility>

#include "emulation.h"

struct EmulatedStream {
  std::deque<std::function<void()>> queue;
  bool capturing = false;
  emulation::Graph recorded;
};

struct EmulatedEvent {
  EmulatedStream* stream = nullptr;  // where it was recorded and not yet reached
};

namespace emulation {
namespace {

struct State {
  Counts counts;
  bool reversed = false;
  bool deferred = false;
  bool driver = true;
  bool fail_allocation = false;
  bool fail_launch = false;
  int device = 0;
  int captures = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  EmulatedStream default_stream;
  std::set<EmulatedStream*> streams;
};

State& state() {
  static State instance;
  return instance;
}

EmulatedStream& resolve(cudaStream_t stream) {
  return stream == nullptr ? state().default_stream : *stream;
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
  EmulatedStream& target = resolve(stream);
  if (target.capturing) {
    target.recorded.push_back(std::move(work));
  } else if (state().deferred) {
    target.queue.push_back(std::move(work));
  } else {
    work();
  }
}

void drain(EmulatedStream& stream) {
  while (!stream.queue.empty()) {
    const std::function<void()> work = std::move(stream.queue.front());
    stream.queue.pop_front();
    work();
  }
}

bool forbidden_now() {
  return state().captures > 0 && state().mode != cudaStreamCaptureModeRelaxed;
}

// The block that is running. Its fibers are made once and serve all blocks; they are switched by
// _setjmp and _longjmp, which unlike swapcontext make no system call.
struct Block {
  // Not a power of two: the stacks would all compete for the same lines of the cache.
  static constexpr size_t kStack = 32 * 1024 + 7 * 64;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<jmp_buf> fibers;
  std::vector<char> finished;
  jmp_buf scheduler;
  unsigned current = 0;
  int any = 0;       // gathered for __syncthreads_or
  int last_any = 0;  // of the last barrier that all threads have reached
  const std::function<void()>* body = nullptr;
};

Block& block() {
  static Block instance;
  return instance;
}

// Gives control back to the scheduler until it resumes this thread.
void yield() {
  Block& b = block();
  const unsigned thread = b.current;
  if (_setjmp(b.fibers[thread]) == 0) _longjmp(b.scheduler, 1);
}

void run_fiber() {
  for (;;) {
    yield();
    (*block().body)();
    block().finished[block().current] = 1;
  }
}

void resume(unsigned thread) {
  Block& b = block();
  b.current = thread;
  threadIdx = dim3(thread);
  if (_setjmp(b.scheduler) == 0) _longjmp(b.fibers[thread], 1);
}

// Starts the fiber of one more thread and lets it run to its first yield.
void start_fiber() {
  Block& b = block();
  b.current = static_cast<unsigned>(b.stacks.size());
  b.stacks.push_back(std::make_unique<char[]>(Block::kStack));
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = b.stacks.back().get();
  context.uc_stack.ss_size = Block::kStack;
  makecontext(&context, run_fiber, 0);
  if (_setjmp(b.scheduler) == 0) setcontext(&context);
}

void run_block(unsigned threads, const std::function<void()>& body) {
  Block& b = block();
  if (b.fibers.empty()) b.fibers = std::vector<jmp_buf>(1024);
  while (b.stacks.size() < threads) start_fiber();
  b.body = &body;
  b.finished.assign(threads, 0);
  for (unsigned done = 0; done < threads;) {
    for (unsigned i = 0; i < threads; ++i) resume(state().reversed ? threads - 1 - i : i);
    for (char finished : b.finished) done += finished;
    if (done != 0 && done != threads) {
      fprintf(stderr, "emulation: %u of %u threads have left while the others wait\n", done,
              threads);
      abort();
    }
    b.last_any = b.any;
    b.any = 0;
  }
}

}  // namespace

Counts& counts() { return state().counts; }
void set_reversed(bool reversed) { state().reversed = reversed; }
void set_deferred(bool deferred) { state().deferred = deferred; }
void fail_next_allocation() { state().fail_allocation = true; }
void fail_next_launch() { state().fail_launch = true; }
void set_driver(bool present) { state().driver = present; }

void synchronize() {
  drain(state().default_stream);
  for (EmulatedStream* stream : state().streams) drain(*stream);
}

void begin_capture(cudaStream_t stream) {
  resolve(stream).capturing = true;
  ++state().captures;
}

Graph end_capture(cudaStream_t stream) {
  resolve(stream).capturing = false;
  --state().captures;
  return std::exchange(resolve(stream).recorded, {});
}

cudaError_t launch(dim3 grid, dim3 threads, cudaStream_t stream, std::function<void()> thread) {
  if (std::exchange(state().fail_launch, false)) return cudaErrorNoKernelImageForDevice;
  ++counts().launches;
  enqueue(stream, [=, thread = std::move(thread)] {
    gridDim = grid;
    for (unsigned i = 0; i < grid.x; ++i) {
      blockIdx = dim3(state().reversed ? grid.x - 1 - i : i);
      run_block(threads.x, thread);
    }
  });
  return cudaSuccess;
}

}  // namespace emulation

using emulation::counts;
using emulation::enqueue;
using emulation::forbidden_now;
using emulation::resolve;
using emulation::state;

void __syncthreads() { emulation::yield(); }

int __syncthreads_or(int predicate) {
  emulation::block().any |= predicate;
  __syncthreads();
  return emulation::block().last_any;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "unknown error";
  }
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = state().driver ? 13000 : 0;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = state().driver ? 2 : 0;
  return state().driver ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaGetDevice(int* device) {
  *device = state().device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  state().device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount      ? 4
           : which == cudaDevAttrComputeCapabilityMajor ? 9
                                                        : 0;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t size) {
  if (forbidden_now()) return cudaErrorStreamCaptureUnsupported;
  if (std::exchange(state().fail_allocation, false)) return cudaErrorMemoryAllocation;
  *data = aligned_alloc(256, (size + 255) / 256 * 256);
  memset(*data, 0xa5, size);  // device memory comes with whatever was in it
  ++counts().allocations;
  return cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  if (forbidden_now()) return cudaErrorStreamCaptureUnsupported;
  emulation::synchronize();
  --counts().allocations;
  // Given back to nobody, so that whoever still uses it finds garbage.
  memset(data, 0xdd, malloc_usable_size(data));
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** data, size_t size, unsigned) { return cudaMalloc(data, size); }
cudaError_t cudaFreeHost(void* data) { return cudaFree(data); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                            cudaStream_t stream) {
  ++counts().copies;
  enqueue(stream, [=] { memcpy(to, from, size); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new EmulatedStream;
  state().streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  state().streams.erase(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  emulation::drain(resolve(stream));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = resolve(stream).capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, state().mode);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new EmulatedEvent;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = &resolve(stream);
  enqueue(stream, [event] { event->stream = nullptr; });
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (forbidden_now()) return cudaErrorStreamCaptureUnsupported;
  if (event->stream != nullptr) {
    ++counts().waits;
    emulation::drain(*event->stream);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return forbidden_now() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
