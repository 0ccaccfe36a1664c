// What stands in the way of using a GPU here, in words, and what a device is like.
#include <stdexcept>

#include "cuda/runtime.h"

namespace fusedopt::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string explain(cudaError_t status) {
  cudaGetLastError();
  int driver = 0;
  int runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) {
    return "no NVIDIA driver was found; install one, or use another backend";
  }
  if (status == cudaErrorInsufficientDriver || status == cudaErrorUnsupportedPtxVersion) {
    return "the NVIDIA driver is too old: it serves CUDA " + version_text(driver) +
           ", this build needs " + version_text(runtime) +
           "; update the driver, or rebuild fusedopt with an older CUDA toolkit";
  }
  if (status == cudaErrorNoDevice) {
    return "the NVIDIA driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES";
  }
  if (status == cudaErrorNoKernelImageForDevice) {
    return "this build of fusedopt holds no code for this GPU";
  }
  return std::string("CUDA answers: ") + cudaGetErrorString(status);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device),
        "asking for the properties of CUDA device " + std::to_string(device));
  return value;
}

}  // namespace

std::string unavailable() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return explain(status);
  return count > 0 ? "" : explain(cudaErrorNoDevice);
}

std::string unavailable(int device) {
  std::string reason = unavailable();
  if (!reason.empty()) return reason;
  try {
    const cudaError_t status = load_kernel(reduce_kernel_of_all_rules(false));
    if (status == cudaSuccess) return "";
    const DeviceInfo info = describe_device(device);
    const std::string capability = std::to_string(info.major) + "." + std::to_string(info.minor);
    return explain(status) + "; device " + std::to_string(device) + " has compute capability " +
           capability + ": rebuild with TORCH_CUDA_ARCH_LIST=\"" + capability +
           "\", or use another backend";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

DeviceInfo describe_device(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrComputeCapabilityMajor, device),
          attribute(cudaDevAttrComputeCapabilityMinor, device)};
}

}  // namespace fusedopt::cuda
