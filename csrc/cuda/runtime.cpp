// Checked calls, the current device, memory.
#include "cuda/runtime.h"

#include <stdexcept>
#include <utility>

namespace fusedopt::cuda {

void check(cudaError_t status, const std::string& action) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("fusedopt: " + action + " failed: " + cudaGetErrorString(status) +
                           " (CUDA error " + std::to_string(status) + ")");
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&previous_), "asking for the current CUDA device");
  changed_ = previous_ != device;
  if (changed_) check(cudaSetDevice(device), "choosing CUDA device " + std::to_string(device));
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(previous_);
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

DeviceMemory::DeviceMemory(const void* from, size_t size) {
  if (size == 0) return;
  const RelaxedCapture relaxed;
  void* data = nullptr;
  check(cudaMalloc(&data, size), "allocating " + std::to_string(size) + " bytes for the table");
  data_ = static_cast<std::byte*>(data);
  // A stream of its own: the caller's may be under capture, and nobody else knows this memory yet.
  cudaStream_t stream = nullptr;
  cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (status == cudaSuccess) {
    status = cudaMemcpyAsync(data, from, size, cudaMemcpyHostToDevice, stream);
    const cudaError_t completed = cudaStreamSynchronize(stream);
    if (status == cudaSuccess) status = completed;
    cudaStreamDestroy(stream);
  }
  if (status != cudaSuccess) cudaFree(data);
  check(status, "copying " + std::to_string(size) + " bytes of the table");
}

DeviceMemory::~DeviceMemory() {
  if (data_ == nullptr || forever_) return;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaFree(data_);  // waits for kernels in flight; fails harmlessly when the process is at its end
  cudaThreadExchangeStreamCaptureMode(&mode);
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), forever_(other.forever_) {}

}  // namespace fusedopt::cuda
