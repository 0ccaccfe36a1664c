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

  std::optional<Attention> step(const py::object& param_groups, const py::object& state,
                                const py::object& grad_scale, const py::object& found_inf,
                                std::optional<double> max_grad_norm, bool skip_nonfinite) override;
  at::Tensor reduce(const at::Tensor& unscale) override;
  void apply(const at::Tensor& control) override;

 protected:
  bool serves(const TensorRow& row) const override;

 private:
  cuda::StreamHandle current_stream() const;
  // Brings the device's table up to this step.
  void update(cuda::StreamHandle stream);
  // A number or tensor as a 0-dim float32 tensor on the device, undefined for None.
  at::Tensor on_device(const py::object& value, const char* name) const;

  int device_index_;
  std::unique_ptr<cuda::DevicePlan> device_plan_;
  uint64_t planned_version_ = 0;
};

}  // namespace fusedopt
