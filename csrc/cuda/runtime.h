// How the launchers talk to the CUDA runtime: checked calls, the current device, memory, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "cuda/kernels.h"
#include "cuda/tuning.h"

namespace fusedopt::cuda {

// Throws std::runtime_error "fusedopt: <action> failed: <what CUDA says>" unless status is success.
// Also forgets the error, so that an unrelated later call does not report it again.
void check(cudaError_t status, const std::string& action);

// Lets this thread allocate memory and query events although some stream is under capture
// (cudaStreamCaptureModeGlobal, as torch captures, otherwise fails such calls and spoils the
// capture).
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

bool is_capturing(cudaStream_t stream);

// Memory of the current device while a stream is under capture. Not torch's: what its allocator
// gives then belongs to the graph, whose earlier kernels would write to it at every replay.
Memory allocate_during_capture(size_t size);
// A copy from the host that is complete when this returns, although a stream is under capture.
void copy_during_capture(std::byte* to, const void* from, size_t size);
// From now on the memory lives as long as the process.
void keep_forever(const Memory& memory);

// Loads a kernel's code, which otherwise happens at its first launch; fails where there is none for
// the device.
template <typename Params>
cudaError_t load_kernel(void (*kernel)(Params)) {
  const RelaxedCapture relaxed;
  const auto code = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, code);
  if (status != cudaSuccess || unused_shared_bytes() == 0) return status;
  return cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              unused_shared_bytes());
}

template <typename Params>
void launch_kernel(void (*kernel)(Params), const Params& params, int64_t blocks,
                   cudaStream_t stream, const std::string& name) {
  Params copy = params;
  void* arguments[] = {&copy};
  const cudaError_t status =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                       unused_shared_bytes(), stream);
  if (status != cudaSuccess) {
    check(status, "launching " + name + " with " + std::to_string(blocks) + " blocks of " +
                      std::to_string(kThreads) + " threads");
  }
}

}  // namespace fusedopt::cuda
