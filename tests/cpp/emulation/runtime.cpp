// The emulated CUDA runtime: a stream is a queue of functions, which whoever waits for it runs.
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <set>

#include "internal.h"

namespace emulation {
namespace {

struct State {
  Counts counts;
  bool deferred = false;
  bool patient = true;
  bool driver = true;
  bool strict = false;
  bool fail_allocation = false;
  bool fail_launch = false;
  int fail_call = 0;
  std::string failed_call;
  bool listen = false;
  std::vector<std::string> calls;
  int captures = 0;
  bool contexts[kDevices] = {};
  EmulatedStream default_streams[kDevices];
  std::set<EmulatedStream*> streams;
  std::set<EmulatedEvent*> events;
  std::vector<std::string> violations;
  std::mutex gate_mutex;
  std::condition_variable gate;
  bool gate_open = false;
  double gate_seconds = 10.0;

  State() {
    for (int device = 0; device < kDevices; ++device) {
      default_streams[device].device = device;
      streams.insert(&default_streams[device]);
    }
  }
};

// Never destroyed: plans may be destroyed later than anything else.
State& state() {
  static State* const instance = new State;
  return *instance;
}

thread_local int current_device = 0;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

bool forbidden_now() {
  return state().captures > 0 && capture_mode != cudaStreamCaptureModeRelaxed;
}

void run_next(EmulatedStream& stream) {
  const std::function<void()> work = std::move(stream.queue.front());
  stream.queue.pop_front();
  work();
}

// A call of the runtime: alone in it, counted, and the one that is to fail.
class Call {
 public:
  explicit Call(const char* name) : lock_(mutex()) {
    if (state().listen) state().calls.emplace_back(name);
    if (state().fail_call == 0 || --state().fail_call > 0) return;
    state().failed_call = name;
    fails_ = true;
  }
  bool fails() const { return fails_; }

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  bool fails_ = false;
};

cudaError_t refuse(const std::string& violation, cudaError_t status) {
  report(violation);
  return status;
}

bool is_known(cudaStream_t stream) { return stream == nullptr || state().streams.count(stream); }

}  // namespace

std::recursive_mutex& mutex() {
  static auto* const instance = new std::recursive_mutex;
  return *instance;
}

void report(std::string violation) { state().violations.push_back(std::move(violation)); }
bool is_strict() { return state().strict; }

Counts& counts() { return state().counts; }
void set_deferred(bool deferred) { state().deferred = deferred; }
void set_patient(bool patient) { state().patient = patient; }
void fail_next_allocation() { state().fail_allocation = true; }
void fail_next_launch() { state().fail_launch = true; }
void set_driver(bool present) { state().driver = present; }
void set_strict(bool strict) { state().strict = strict; }
bool has_context(int device) { return state().contexts[device]; }
void forget_contexts() { memset(state().contexts, 0, sizeof(state().contexts)); }
void make_context(int device) { state().contexts[device] = true; }

int chosen_device() { return current_device; }

void choose_device(int device) {
  current_device = device;
  make_context(device);
}

void fail_call(int nth) {
  state().fail_call = nth;
  state().failed_call.clear();
}
const std::string& failed_call() { return state().failed_call; }

void listen() { state().listen = true; }

std::vector<std::string> take_calls() {
  const std::lock_guard lock(mutex());
  state().listen = false;
  return std::exchange(state().calls, {});
}

std::vector<std::string> take_violations() {
  const std::lock_guard lock(mutex());
  return std::exchange(state().violations, {});
}

EmulatedStream& default_stream(int device) { return state().default_streams[device]; }

EmulatedStream& resolve(cudaStream_t stream) {
  return stream == nullptr ? default_stream(current_device) : *stream;
}

void enqueue_outside(EmulatedStream& stream, std::function<void()> work) {
  if (state().deferred && !stream.capturing) {
    stream.queue.push_back(std::move(work));
  } else {
    work();
  }
}

void enqueue(EmulatedStream& stream, std::function<void()> work) {
  if (stream.capturing) {
    stream.recorded.push_back(std::move(work));
  } else {
    enqueue_outside(stream, std::move(work));
  }
}

void drain(EmulatedStream& stream) {
  while (!stream.queue.empty()) run_next(stream);
}

std::shared_ptr<EmulatedMark> mark(EmulatedStream& stream) {
  const auto made = std::make_shared<EmulatedMark>(EmulatedMark{&stream});
  enqueue(stream, [made] { made->reached = true; });
  return made;
}

void wait_for(const std::shared_ptr<EmulatedMark>& mark) {
  while (!mark->reached && !mark->stream->queue.empty()) run_next(*mark->stream);
}

void synchronize() {
  const std::lock_guard lock(mutex());
  for (EmulatedStream* stream : state().streams) drain(*stream);
}

void begin_capture(cudaStream_t stream) {
  const std::lock_guard lock(mutex());
  resolve(stream).capturing = true;
  ++state().captures;
}

Graph end_capture(cudaStream_t stream) {
  const std::lock_guard lock(mutex());
  resolve(stream).capturing = false;
  --state().captures;
  return std::exchange(resolve(stream).recorded, {});
}

void replay(const Graph& graph, cudaStream_t stream) {
  const std::lock_guard lock(mutex());
  enqueue(resolve(stream), [&graph] {
    for (const auto& node : graph) node();
  });
}

void enqueue_gate(cudaStream_t stream) {
  const std::lock_guard lock(mutex());
  state().gate_open = false;
  enqueue(resolve(stream), [] {
    std::unique_lock lock(state().gate_mutex);
    if (!state().gate.wait_for(lock, std::chrono::duration<double>(state().gate_seconds),
                               [] { return state().gate_open; })) {
      report("the gate was not opened: the thread that should do so was held up");
    }
  });
}

void set_gate_seconds(double seconds) { state().gate_seconds = seconds; }

void open_gate() {
  const std::lock_guard lock(state().gate_mutex);
  state().gate_open = true;
  state().gate.notify_all();
}

cudaError_t launch(dim3 grid, dim3 threads, cudaStream_t stream, std::function<void()> thread,
                   std::type_index type, std::shared_ptr<const void> params) {
  const Call call("cudaLaunchKernel");
  if (call.fails()) return cudaErrorUnknown;
  if (std::exchange(state().fail_launch, false)) return cudaErrorNoKernelImageForDevice;
  if (!is_known(stream) || resolve(stream).device != current_device) {
    return refuse("a kernel is launched on a stream that is not the current device's",
                  cudaErrorInvalidResourceHandle);
  }
  ++counts().launches;
  make_context(current_device);
  enqueue(resolve(stream), [=, device = current_device, thread = std::move(thread)] {
    if (is_strict()) {
      const std::string wrong = check_params(type, params.get(), device);
      if (!wrong.empty()) return report("a kernel is given " + wrong);
    }
    run_blocks(grid, threads, thread);
  });
  return cudaSuccess;
}

}  // namespace emulation

using namespace emulation;

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
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
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  *count = state().driver ? kDevices : 0;
  return state().driver ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaGetDevice(int* device) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  choose_device(device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  *value = which == cudaDevAttrMultiProcessorCount      ? 4
           : which == cudaDevAttrComputeCapabilityMajor ? 9
                                                        : 0;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t size) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (forbidden_now()) return cudaErrorStreamCaptureUnsupported;
  if (std::exchange(state().fail_allocation, false)) return cudaErrorMemoryAllocation;
  make_context(current_device);
  *data = take_memory(Memory::kDevice, size, current_device);
  return cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (forbidden_now()) return cudaErrorStreamCaptureUnsupported;
  synchronize();
  if (give_back(Memory::kDevice, data)) return cudaSuccess;
  return refuse("cudaFree is given what is no device memory", cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void** data, size_t size, unsigned) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (forbidden_now()) return cudaErrorStreamCaptureUnsupported;
  if (std::exchange(state().fail_allocation, false)) return cudaErrorMemoryAllocation;
  make_context(current_device);
  *data = take_memory(Memory::kPinned, size, current_device);
  return cudaSuccess;
}

// Strict where hardware may be so: does not wait for copies.
cudaError_t cudaFreeHost(void* data) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (forbidden_now()) return cudaErrorStreamCaptureUnsupported;
  if (give_back(Memory::kPinned, data)) return cudaSuccess;
  return refuse("cudaFreeHost is given what is no pinned memory", cudaErrorInvalidValue);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                            cudaStream_t stream) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (!is_known(stream)) {
    return refuse("a copy on a stream that is gone", cudaErrorInvalidResourceHandle);
  }
  if (kind_of(from) == Memory::kDevice) {
    return refuse("a copy from the host is given device memory", cudaErrorInvalidValue);
  }
  ++counts().copies;
  EmulatedStream& target = resolve(stream);
  const auto copy = [to, size](const void* bytes) {
    const std::string wrong = is_strict() ? check_memory(Memory::kDevice, to, size) : "";
    if (!wrong.empty()) return report("a copy writes to " + wrong);
    memcpy(to, bytes, size);
  };
  if (kind_of(from) == Memory::kHost) {
    // Pageable: staged before the call returns. A graph would read it anew at every replay.
    if (target.capturing) return cudaErrorStreamCaptureUnsupported;
    if (!state().patient) drain(target);
    const auto* const bytes = static_cast<const char*>(from);
    enqueue(target,
            [copy, staged = std::vector<char>(bytes, bytes + size)] { copy(staged.data()); });
    return cudaSuccess;
  }
  // Pinned memory is read when the stream gets there, not before.
  count_reader(from, 1);
  enqueue(target, [copy, from, size] {
    const std::string wrong = check_memory(Memory::kPinned, from, size);
    if (!wrong.empty()) return report("a copy reads " + wrong);
    count_reader(from, -1);
    copy(from);
  });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  *stream = new EmulatedStream;
  (*stream)->device = current_device;
  state().streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (state().streams.erase(stream) == 0) {
    return refuse("cudaStreamDestroy is given no stream", cudaErrorInvalidResourceHandle);
  }
  if (!stream->queue.empty()) report("a stream is destroyed with work that nobody waited for");
  drain(*stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (!is_known(stream)) {
    return refuse("waiting for a stream that is gone", cudaErrorInvalidResourceHandle);
  }
  drain(resolve(stream));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (!is_known(stream)) return cudaErrorInvalidResourceHandle;
  *status = resolve(stream).capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  make_context(current_device);
  *event = new EmulatedEvent{current_device, nullptr};
  state().events.insert(*event);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (state().events.erase(event) == 0) {
    return refuse("cudaEventDestroy is given no event", cudaErrorInvalidResourceHandle);
  }
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (!state().events.count(event) || !is_known(stream) ||
      event->device != resolve(stream).device) {
    return refuse("an event is recorded on a stream that is not its device's",
                  cudaErrorInvalidResourceHandle);
  }
  event->mark = mark(resolve(stream));
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  if (forbidden_now()) return cudaErrorStreamCaptureUnsupported;
  if (!state().events.count(event) || event->mark == nullptr) {
    // Hardware says at once that it is reached: whoever relies on it reads too early.
    return refuse("waiting for an event that was never recorded", cudaErrorInvalidResourceHandle);
  }
  if (!event->mark->reached) {
    ++counts().waits;
    wait_for(event->mark);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  const Call call(__func__);
  if (call.fails()) return cudaErrorUnknown;
  return forbidden_now() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
