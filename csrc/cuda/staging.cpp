// The ring of pinned buffers.
#include "cuda/staging.h"

#include <cstring>

namespace fusedopt::cuda {

StagingRing::StagingRing(size_t size) : size_(size) {
  if (size == 0) return;
  const RelaxedCapture relaxed;
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, size * kBuffers, cudaHostAllocDefault),
        "allocating " + std::to_string(size * kBuffers) + " bytes of pinned host memory");
  memory_ = static_cast<std::byte*>(memory);
}

StagingRing::~StagingRing() {
  if (memory_ == nullptr) return;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  for (cudaEvent_t event : copied_) {
    if (event == nullptr) continue;
    cudaEventSynchronize(event);
    cudaEventDestroy(event);
  }
  cudaFreeHost(memory_);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

void StagingRing::copy(const void* from, void* to_device, size_t size, cudaStream_t stream) {
  // Another thread may have a stream under capture.
  const RelaxedCapture relaxed;
  cudaEvent_t& copied = copied_[next_];
  if (copied != nullptr) {
    check(cudaEventSynchronize(copied), "waiting for an earlier copy of the table");
  }
  std::byte* const buffer = memory_ + next_ * size_;
  memcpy(buffer, from, size);
  check(cudaMemcpyAsync(to_device, buffer, size, cudaMemcpyHostToDevice, stream),
        "copying " + std::to_string(size) + " bytes of the table");
  const cudaError_t recorded = record(copied, stream);
  if (recorded != cudaSuccess) {
    // Without the event only the stream itself says when the buffer has been read.
    cudaStreamSynchronize(stream);
    if (copied != nullptr) cudaEventDestroy(copied);
    copied = nullptr;
  }
  check(recorded, "recording an event");
  next_ = (next_ + 1) % kBuffers;
}

cudaError_t StagingRing::record(cudaEvent_t& event, cudaStream_t stream) {
  if (event == nullptr) {
    const cudaError_t created = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (created != cudaSuccess) return created;
  }
  return cudaEventRecord(event, stream);
}

}  // namespace fusedopt::cuda
