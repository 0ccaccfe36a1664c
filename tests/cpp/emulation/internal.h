// What the parts of the emulated runtime share.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "emulation.h"

// A point in a stream.
struct EmulatedMark {
  EmulatedStream* stream;
  bool reached = false;
};

struct EmulatedStream {
  int device = 0;
  std::deque<std::function<void()>> queue;
  bool capturing = false;
  emulation::Graph recorded;
};

struct EmulatedEvent {
  int device = 0;
  std::shared_ptr<EmulatedMark> mark;  // where it was recorded last
};

namespace emulation {

// One thread at a time is in the runtime.
std::recursive_mutex& mutex();

void report(std::string violation);
bool is_strict();

EmulatedStream& resolve(cudaStream_t stream);
EmulatedStream& default_stream(int device);
// Runs `work` when the stream gets there; under capture, records it.
void enqueue(EmulatedStream& stream, std::function<void()> work);
// The same, but not into a graph: at once when the stream is under capture.
void enqueue_outside(EmulatedStream& stream, std::function<void()> work);
void drain(EmulatedStream& stream);
std::shared_ptr<EmulatedMark> mark(EmulatedStream& stream);
void wait_for(const std::shared_ptr<EmulatedMark>& mark);
void make_context(int device);
// The thread's current device, for torch, whose calls are not counted.
int chosen_device();
void choose_device(int device);

// Device and pinned memory.
enum class Memory { kHost, kDevice, kPinned };
void* take_memory(Memory kind, size_t size, int device);
// False when it is not memory of this kind.
bool give_back(Memory kind, void* data);
// What kind of memory [data, data + size) is, alive throughout; "" or what is wrong with it.
std::string check_memory(Memory kind, const void* data, size_t size, int device = -1);
Memory kind_of(const void* data);
// Copies in flight that read pinned memory.
void count_reader(const void* data, int by);

// In pointers.cpp: what is wrong with the pointers that a kernel is about to be given.
std::string check_params(std::type_index type, const void* params, int device);

void run_blocks(dim3 grid, dim3 threads, const std::function<void()>& body);

}  // namespace emulation
