// Checked calls, and what a step under capture needs.
#include "cuda/runtime.h"

#include <mutex>
#include <stdexcept>
#include <vector>

namespace fusedopt::cuda {

void check(cudaError_t status, const std::string& action) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("fusedopt: " + action + " failed: " + cudaGetErrorString(status) +
                           " (CUDA error " + std::to_string(status) + ")");
}

RelaxedCapture::RelaxedCapture() {
  check(cudaThreadExchangeStreamCaptureMode(&mode_), "relaxing the stream capture mode");
}

RelaxedCapture::~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "asking whether the stream is under capture");
  return status != cudaStreamCaptureStatusNone;
}

Memory allocate_during_capture(size_t size) {
  const RelaxedCapture relaxed;
  void* data = nullptr;
  check(cudaMalloc(&data, size), "allocating " + std::to_string(size) + " bytes for the table");
  return Memory(static_cast<std::byte*>(data), [](std::byte* memory) { cudaFree(memory); });
}

void copy_during_capture(std::byte* to, const void* from, size_t size) {
  const RelaxedCapture relaxed;
  // A stream of its own: the caller's is under capture, and nobody else knows this memory yet.
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  cudaError_t status = cudaMemcpyAsync(to, from, size, cudaMemcpyHostToDevice, stream);
  const cudaError_t completed = cudaStreamSynchronize(stream);
  if (status == cudaSuccess) status = completed;
  cudaStreamDestroy(stream);
  check(status, "copying " + std::to_string(size) + " bytes of the table");
}

void keep_forever(const Memory& memory) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<Memory>;
  const std::lock_guard lock(mutex);
  kept->push_back(memory);
}

}  // namespace fusedopt::cuda
