// Pinned buffers through which small updates travel to the device while earlier ones may still be
// on their way.
#pragma once

#include <array>

#include "cuda/runtime.h"

namespace fusedopt::cuda {

// A ring of pinned buffers. A copy from one of them is asynchronous: the host fills a buffer again
// only after the event behind its last copy, which is a wait only for a host that is kBuffers
// updates ahead of the device.
//
// Must not be used for a stream under capture: the graph would read the buffer anew at every
// replay.
class StagingRing {
 public:
  // `size`: bytes of the largest update. On the current device.
  explicit StagingRing(size_t size);
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  // Enqueues a copy of `size` bytes; `from` may be changed as soon as this returns.
  void copy(const void* from, void* to_device, size_t size, cudaStream_t stream);

 private:
  // Records the event, made at its first use.
  static cudaError_t record(cudaEvent_t& event, cudaStream_t stream);

  static constexpr int kBuffers = 8;
  size_t size_;
  std::byte* memory_ = nullptr;
  std::array<cudaEvent_t, kBuffers> copied_{};  // null: nothing to wait for
  int next_ = 0;
};

}  // namespace fusedopt::cuda
