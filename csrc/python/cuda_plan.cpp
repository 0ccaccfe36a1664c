#include "python/cuda_plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cmath>
#include <mutex>

#include "python/tensors.h"

namespace fusedopt {
namespace {

c10::Device cuda_device(int index) {
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
}

int32_t piece_length(const py::list& slots, int device) {
  int64_t elements = 0;
  for (const py::handle slot : slots) {
    elements += as_tensor(slot.cast<py::tuple>()[1].ptr())->numel();
  }
  return cuda::choose_piece_length(elements, static_cast<int64_t>(slots.size()),
                                   cuda::describe_device(device).multiprocessors);
}

template <typename T>
const T* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

StepControl* control_pointer(const at::Tensor& tensor) {
  return reinterpret_cast<StepControl*>(tensor.mutable_data_ptr<double>());
}

}  // namespace

std::string cuda_unavailable(int device) {
  std::string reason = cuda::unavailable();
  if (!reason.empty()) return reason;
  const py::gil_scoped_release unlocked;
  const c10::DeviceGuard guard(cuda_device(device));
  return cuda::unavailable(device);
}

CudaPlan::CudaPlan(const std::string& rule, int device, const py::list& slots,
                   const py::object& param_groups, const py::dict& state)
    : NativePlan(rule, cuda_device(device), slots, param_groups, state,
                 piece_length(slots, device)),
      device_(cuda_device(device)),
      known_stream_(current_stream()) {
  control_ = at::zeros({kControlNumbers}, at::TensorOptions(at::kDouble).device(device_));
}

CudaPlan::~CudaPlan() {
  const py::gil_scoped_release unlocked;
  try {
    const c10::DeviceGuard guard(device_);
    device_plan_.reset();
  } catch (const std::exception&) {
    // The driver is gone, at the end of the process.
  }
}

std::optional<Attention> CudaPlan::begin(const py::object& param_groups, const py::object& state) {
  reduced_ = false;
  return NativePlan::begin(param_groups, state);
}

cuda::StreamHandle CudaPlan::current_stream() const {
  static const py::object* const kCurrentStream =
      new py::object(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream"));
  return (*kCurrentStream)(device_.index()).cast<cuda::StreamHandle>();
}

cuda::Memory CudaPlan::allocate(size_t size) {
  memory_ = at::empty({static_cast<int64_t>(size)}, at::TensorOptions(at::kByte).device(device_));
  auto* const data = static_cast<std::byte*>(memory_.mutable_data_ptr());
  return cuda::Memory(data, [memory = memory_](std::byte*) {});
}

void CudaPlan::update(cuda::StreamHandle stream) {
  if (stream != known_stream_) {
    // Memory that is given back while this stream uses it must not be given to others.
    const c10::Stream current = c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(device_);
    control_.record_stream(current);
    if (memory_.defined()) memory_.record_stream(current);
    known_stream_ = stream;
  }
  if (!device_plan_ || planned_version_ != rows_version()) {
    device_plan_ = std::make_unique<cuda::DevicePlan>(
        rule_index(), device_.index(), table(), [this](size_t size) { return allocate(size); },
        stream);
    planned_version_ = rows_version();
  }
  if (device_plan_->update(rows().data(), groups().rows().data(), stream)) {
    // The graph writes to the control block, and cannot be asked whether it still exists.
    static std::mutex mutex;
    static auto* const kept = new std::vector<at::Tensor>;
    const std::lock_guard lock(mutex);
    if (kept->empty() || !kept->back().is_same(control_)) kept->push_back(control_);
  }
}

cuda::StepInputs CudaPlan::Inputs::pointers() const {
  return {pointer<float>(grad_scale), pointer<double>(unscale), pointer<float>(found_inf)};
}

CudaPlan::Inputs CudaPlan::read_inputs(const py::object& grad_scale,
                                       const py::object& found_inf) const {
  Inputs inputs;
  if (const at::Tensor* given = as_tensor(grad_scale.ptr())) {
    const at::Tensor scale = *given;
    check_one_element(scale, "grad_scale");
    const py::gil_scoped_release unlocked;
    if (scale.scalar_type() == at::kFloat) {
      inputs.grad_scale = scale.to(device_);
    } else {
      inputs.unscale = scale.to(device_, at::kDouble).reciprocal();
    }
  } else if (!grad_scale.is_none()) {
    const double unscale = 1.0 / to_double(grad_scale.ptr(), "grad_scale");
    inputs.unscale = at::full({}, unscale, at::TensorOptions(at::kDouble).device(device_));
  }
  if (const at::Tensor* given = as_tensor(found_inf.ptr())) {
    const at::Tensor found = *given;
    check_one_element(found, "found_inf");
    const py::gil_scoped_release unlocked;
    // A number that float32 rounds to zero counts.
    inputs.found_inf = found.scalar_type() == at::kFloat ? found.to(device_)
                                                         : found.to(device_).ne(0).to(at::kFloat);
  } else if (!found_inf.is_none()) {
    const bool found = to_double(found_inf.ptr(), "found_inf") != 0.0;
    inputs.found_inf =
        at::full({}, found ? 1.0 : 0.0, at::TensorOptions(at::kFloat).device(device_));
  }
  return inputs;
}

std::optional<Attention> CudaPlan::step(const py::object& param_groups, const py::object& state,
                                        const py::object& grad_scale, const py::object& found_inf,
                                        std::optional<double> max_grad_norm, bool skip_nonfinite) {
  const Inputs given = read_inputs(grad_scale, found_inf);
  const cuda::StreamHandle stream = current_stream();
  if (auto attention = begin(param_groups, state)) return attention;

  const cuda::StepInputs inputs = given.pointers();
  StepControl* const control = control_pointer(control_);
  const bool reduces = needs_reduce(max_grad_norm, skip_nonfinite);
  bump_versions();
  const Held held(*this);
  const py::gil_scoped_release unlocked;
  const c10::DeviceGuard guard(device_);
  update(stream);
  if (reduces) {
    device_plan_->reduce(
        {inputs, max_grad_norm.value_or(INFINITY), skip_nonfinite, control, nullptr}, stream);
  }
  device_plan_->apply({inputs, control, reduces, reduces}, stream);
  return std::nullopt;
}

at::Tensor CudaPlan::reduce(const at::Tensor& unscale) {
  require_held();
  const cuda::StreamHandle stream = current_stream();
  at::Tensor totals = at::empty({2}, control_.options());
  const py::gil_scoped_release unlocked;
  const c10::DeviceGuard guard(device_);
  update(stream);
  device_plan_->reduce({{nullptr, unscale.const_data_ptr<double>(), nullptr},
                        INFINITY,
                        false,
                        nullptr,
                        totals.mutable_data_ptr<double>()},
                       stream);
  reduced_ = true;
  return totals;
}

void CudaPlan::apply(const at::Tensor& control) {
  require_held();
  const cuda::StreamHandle stream = current_stream();
  bump_versions();
  const py::gil_scoped_release unlocked;
  const c10::DeviceGuard guard(device_);
  update(stream);
  device_plan_->apply({{}, control_pointer(control), true, reduced_}, stream);
}

}  // namespace fusedopt
