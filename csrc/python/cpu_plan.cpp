#include "python/cpu_plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace fusedopt {
namespace {

static_assert(sizeof(StepControl) == 5 * sizeof(double));

// A step over so many elements or fewer keeps the interpreter's lock: it takes a millisecond, a
// fraction of the interval in which Python switches threads anyway (5 ms), and spares it the
// references that keep memory alive while others run.
constexpr int64_t kShortStep = 1 << 20;

StepControl& as_control(const at::Tensor& tensor) {
  return *reinterpret_cast<StepControl*>(tensor.mutable_data_ptr<double>());
}

}  // namespace

CpuPlan::CpuPlan(const std::string& rule, const py::list& slots, const py::object& param_groups,
                 const py::dict& state)
    : NativePlan(rule, at::kCPU, slots, param_groups, state, cpu::kPieceLength),
      tasks_(cpu::cut_tasks(pieces())),
      partials_(pieces().size()) {
  control_ = at::zeros({5}, at::kDouble);
}

cpu::Job CpuPlan::make_job() {
  cpu::Job job{};
  job.table = table();
  job.tasks = tasks_.data();
  job.task_count = static_cast<int64_t>(tasks_.size()) - 1;
  job.control = {1.0, 1.0, 0.0, 0.0, 0.0};
  job.partials = partials_.data();
  return job;
}

std::optional<Attention> CpuPlan::step(const py::object& param_groups, const py::object& state,
                                       const py::object& grad_scale, const py::object& found_inf,
                                       std::optional<double> max_grad_norm, bool skip_nonfinite) {
  cpu::StepInputs inputs{};
  inputs.unscale = grad_scale.is_none() ? 1.0 : 1.0 / to_double(grad_scale.ptr(), "grad_scale");
  inputs.found_inf = !found_inf.is_none() && to_double(found_inf.ptr(), "found_inf") != 0.0;
  inputs.max_grad_norm = max_grad_norm.value_or(-1.0);
  inputs.skip_nonfinite = skip_nonfinite;
  if (auto attention = begin(param_groups, state)) return attention;

  cpu::Job job = make_job();
  job.control.unscale = inputs.unscale;
  const bool reduces = needs_reduce(max_grad_norm, skip_nonfinite);
  const int threads = at::get_num_threads();
  // Right after `begin` where nothing can come between: what it needs is in the caches.
  const bool applies = !skip_nonfinite && !inputs.found_inf;
  if (applies) bump_versions();
  std::optional<Held> held;
  {
    std::optional<py::gil_scoped_release> unlocked;
    if (numel() > kShortStep) {
      held.emplace(*this);
      unlocked.emplace();
    }
    const double sum_squares = reduces ? cpu::reduce(job, param_clips_, threads) : 0.0;
    cpu::settle(job.control, sum_squares, inputs);
    cpu::apply(job, rule_index(), threads);
  }
  if (!applies && job.control.skip == 0.0) bump_versions();
  as_control(control_) = job.control;
  return std::nullopt;
}

at::Tensor CpuPlan::reduce(const at::Tensor& unscale) {
  require_held();
  cpu::Job job = make_job();
  job.control.unscale = *unscale.const_data_ptr<double>();
  const int threads = at::get_num_threads();
  at::Tensor totals = at::zeros({2}, at::kDouble);
  double sum_squares;
  {
    const py::gil_scoped_release unlocked;
    sum_squares = cpu::reduce(job, param_clips_, threads);
  }
  totals.mutable_data_ptr<double>()[0] = sum_squares;
  totals.mutable_data_ptr<double>()[1] = job.control.nonfinite;
  return totals;
}

void CpuPlan::apply(const at::Tensor& control) {
  require_held();
  cpu::Job job = make_job();
  job.control = as_control(control);
  job.param_clips = param_clips_.empty() ? nullptr : param_clips_.data();
  const int threads = at::get_num_threads();
  {
    const py::gil_scoped_release unlocked;
    cpu::apply(job, rule_index(), threads);
  }
  param_clips_.clear();  // they belong to this step's gradients
  if (job.control.skip == 0.0) bump_versions();
}

}  // namespace fusedopt
