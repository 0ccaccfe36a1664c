// The step plan of the CPU backend.
#pragma once

#include <vector>

#include "cpu/passes.h"
#include "python/native_plan.h"

namespace fusedopt {

class CpuPlan : public NativePlan {
 public:
  CpuPlan(const std::string& rule, const py::list& slots, const py::object& param_groups,
          const py::dict& state);

  std::optional<Attention> step(const py::object& param_groups, const py::object& state,
                                const py::object& grad_scale, const py::object& found_inf,
                                std::optional<double> max_grad_norm, bool skip_nonfinite) override;
  at::Tensor reduce(const at::Tensor& unscale) override;
  void apply(const at::Tensor& control) override;

 private:
  cpu::Job make_job();

  std::vector<int64_t> tasks_;
  std::vector<Partial> partials_;
  std::vector<double> param_clips_;
};

}  // namespace fusedopt
