// A step plan that also takes the steps, with kernels of this extension.
#pragma once

#include "python/plan.h"

namespace fusedopt {

class NativePlan : public Plan {
 public:
  using Plan::Plan;

  // The whole step: `begin` and, unless that asks for attention, both passes. Inputs as in the
  // optimizer: a missing grad_scale or found_inf is None; max_grad_norm None: no global norm. They
  // are read first, since a number of the user's own may run Python code.
  virtual std::optional<Attention> step(const py::object& param_groups, const py::object& state,
                                        const py::object& grad_scale, const py::object& found_inf,
                                        std::optional<double> max_grad_norm,
                                        bool skip_nonfinite) = 0;
  // The passes one by one, for a norm that spans several plans; between `begin` with `hold` and
  // `release`. `reduce` returns (sum of squares, nonfinite) as float64[2].
  virtual at::Tensor reduce(const at::Tensor& unscale) = 0;
  virtual void apply(const at::Tensor& control) = 0;

  // float64[5], in the order of StepControl: what the last step left.
  const at::Tensor& control() const { return control_; }

 protected:
  at::Tensor control_;
};

}  // namespace fusedopt
