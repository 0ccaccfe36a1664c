#include "python/cuda_plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "python/tensors.h"

namespace fusedopt {
namespace {

int32_t piece_length(const py::list& slots, int device) {
  int64_t elements = 0;
  for (const py::handle slot : slots) {
    elements += as_tensor(slot.cast<py::tuple>()[1].ptr())->numel();
  }
  return cuda::choose_piece_length(elements, static_cast<int64_t>(slots.size()),
                                   cuda::describe_device(device).multiprocessors);
}

const float* float_pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

StepControl* control_pointer(const at::Tensor& tensor) {
  return reinterpret_cast<StepControl*>(tensor.mutable_data_ptr<double>());
}

}  // namespace

CudaPlan::CudaPlan(const std::string& rule, int device, const py::list& slots,
                   const py::object& param_groups, const py::dict& state)
    : NativePlan(rule, c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)), slots,
                 param_groups, state, piece_length(slots, device)),
      device_index_(device) {
  control_ = at::zeros({5}, at::TensorOptions(at::kDouble).device(at::kCUDA, device));
}

bool CudaPlan::serves(const TensorRow& row) const {
  return cuda::serves(rule_index(), variant_of(row), row);
}

cuda::StreamHandle CudaPlan::current_stream() const {
  static const py::object* const kCurrentStream =
      new py::object(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream"));
  return (*kCurrentStream)(device_index_).cast<cuda::StreamHandle>();
}

void CudaPlan::update(cuda::StreamHandle stream) {
  if (!device_plan_ || planned_version_ != rows_version()) {
    device_plan_ = std::make_unique<cuda::DevicePlan>(rule_index(), device_index_, table());
    planned_version_ = rows_version();
  }
  if (device_plan_->update(rows().data(), groups().rows().data(), stream)) {
    // The graph writes to the control block, and cannot be asked whether it still exists.
    static auto* const kept = new std::vector<at::Tensor>;
    if (kept->empty() || !kept->back().is_same(control_)) kept->push_back(control_);
  }
}

at::Tensor CudaPlan::on_device(const py::object& value, const char* name) const {
  if (value.is_none()) return {};
  const c10::Device device(c10::kCUDA, static_cast<c10::DeviceIndex>(device_index_));
  if (const at::Tensor* tensor = as_tensor(value.ptr())) return tensor->to(device, at::kFloat);
  return at::full({}, to_double(value.ptr(), name), at::TensorOptions(at::kFloat).device(device));
}

std::optional<Attention> CudaPlan::step(const py::object& param_groups, const py::object& state,
                                        const py::object& grad_scale, const py::object& found_inf,
                                        std::optional<double> max_grad_norm, bool skip_nonfinite) {
  const at::Tensor scale = on_device(grad_scale, "grad_scale");
  const at::Tensor found = on_device(found_inf, "found_inf");
  const cuda::StreamHandle stream = current_stream();
  if (auto attention = begin(param_groups, state)) return attention;

  const cuda::StepInputs inputs{float_pointer(scale), nullptr, float_pointer(found)};
  StepControl* const control = control_pointer(control_);
  const bool reduces = needs_reduce(max_grad_norm, skip_nonfinite);
  update(stream);
  if (reduces) {
    device_plan_->reduce({inputs, max_grad_norm.value_or(-1.0), skip_nonfinite, control, nullptr},
                         stream);
  }
  device_plan_->apply({inputs, control, reduces}, stream);
  bump_versions();
  return std::nullopt;
}

at::Tensor CudaPlan::reduce(const at::Tensor& unscale) {
  require_held();
  at::Tensor totals = at::empty({2}, control_.options());
  const cuda::StreamHandle stream = current_stream();
  update(stream);
  device_plan_->reduce({{nullptr, unscale.const_data_ptr<double>(), nullptr},
                        -1.0,
                        false,
                        nullptr,
                        totals.mutable_data_ptr<double>()},
                       stream);
  return totals;
}

void CudaPlan::apply(const at::Tensor& control) {
  require_held();
  const cuda::StreamHandle stream = current_stream();
  update(stream);
  device_plan_->apply({{}, control_pointer(control), true}, stream);
  bump_versions();
}

}  // namespace fusedopt
