#include "python/cpu_plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "core/control.h"

namespace fusedopt {
namespace {

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
  control_ = at::zeros({kControlNumbers}, at::kDouble);
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
  const double unscale =
      grad_scale.is_none() ? 1.0 : 1.0 / to_double(grad_scale.ptr(), "grad_scale");
  const bool skips = !found_inf.is_none() && to_double(found_inf.ptr(), "found_inf") != 0.0;
  if (auto attention = begin(param_groups, state)) return attention;

  cpu::Job job = make_job();
  job.control.unscale = unscale;
  const bool reduces = needs_reduce(max_grad_norm, skip_nonfinite);
  const int threads = at::get_num_threads();
  // Right after `begin` where nothing can come between: what it needs is in the caches.
  const bool applies = !skip_nonfinite && !skips;
  if (applies) bump_versions();
  std::optional<Held> held;
  {
    std::optional<py::gil_scoped_release> unlocked;
    if (numel() > kShortStep) {
      held.emplace(*this);
      unlocked.emplace();
    }
    const Partial found = reduces ? cpu::reduce(job, param_clips_, threads) : Partial{};
    job.control = settle(unscale, found.sum_squares, found.nonfinite != 0, skips,
                         max_grad_norm.value_or(INFINITY), skip_nonfinite);
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
  Partial found;
  {
    const py::gil_scoped_release unlocked;
    found = cpu::reduce(job, param_clips_, threads);
  }
  totals.mutable_data_ptr<double>()[0] = found.sum_squares;
  totals.mutable_data_ptr<double>()[1] = found.nonfinite != 0 ? 1.0 : 0.0;
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
