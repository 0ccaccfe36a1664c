// The step plan of the CUDA backend.
#pragma once

#include <memory>

#include "cuda/launch.h"
#include "python/native_plan.h"

namespace fusedopt {

class CudaPlan : public NativePlan {
 public:
  CudaPlan(const std::string& rule, int device, const py::list& slots,
           const py::object& param_groups, const py::dict& state);
  ~CudaPlan() override;

  std::optional<Attention> begin(const py::object& param_groups, const py::object& state) override;
  std::optional<Attention> step(const py::object& param_groups, const py::object& state,
                                const py::object& grad_scale, const py::object& found_inf,
                                std::optional<double> max_grad_norm, bool skip_nonfinite) override;
  at::Tensor reduce(const at::Tensor& unscale) override;
  void apply(const at::Tensor& control) override;

 private:
  // What a gradient scaler gives, as the kernels read it: a float32 tensor as it is, everything
  // else in double.
  struct Inputs {
    at::Tensor grad_scale;
    at::Tensor unscale;
    at::Tensor found_inf;

    cuda::StepInputs pointers() const;
  };

  cuda::StreamHandle current_stream() const;
  Inputs read_inputs(const py::object& grad_scale, const py::object& found_inf) const;
  // The rest may wait for the device: without the interpreter's lock and with the plan's device
  // current. Brings the device's table up to this step.
  void update(cuda::StreamHandle stream);
  cuda::Memory allocate(size_t size);

  c10::Device device_;
  std::unique_ptr<cuda::DevicePlan> device_plan_;
  uint64_t planned_version_ = 0;
  at::Tensor memory_;  // of the device plan
  cuda::StreamHandle
      known_stream_;      // torch's allocator knows that memory and control are used here
  bool reduced_ = false;  // since `begin`
};

// Why parameters on a device cannot be served, with the remedy; empty when they can.
std::string cuda_unavailable(int device);

}  // namespace fusedopt
