// Makes torch's device type "cuda" work in a process without a GPU: memory of the emulated runtime,
// and operations that the CPU's kernels do in its place. Compiled into the emulated extension only.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/indices_native.h>
#include <ATen/ops/is_coalesced_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/ops/values_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>

#include "internal.h"

namespace emulation {
namespace {

// As torch keeps it: where the current device has no context yet, choosing another and coming back
// must not make one (c10::cuda::MaybeSetDevice).
thread_local int target_device = -1;
thread_local cudaStream_t current_streams[kDevices] = {};

int torch_device() { return target_device >= 0 ? target_device : chosen_device(); }

EmulatedStream& stream_of(int device) {
  cudaStream_t stream = current_streams[device];
  return stream == nullptr ? default_stream(device) : *stream;
}

cudaStream_t handle_of(const c10::Stream& stream) {
  return stream.id() == 0 ? &default_stream(stream.device_index())
                          : reinterpret_cast<cudaStream_t>(stream.id());
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device getDevice() const override { return c10::Device(c10::kCUDA, torch_device()); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device previous = getDevice();
    setDevice(device);
    return previous;
  }
  void setDevice(c10::Device device) const override {
    target_device = -1;
    if (chosen_device() != device.index()) choose_device(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (has_context(device.index())) {
      setDevice(device);
    } else {
      target_device = device.index();
    }
  }
  c10::Stream getStream(c10::Device device) const override {
    const auto id = reinterpret_cast<c10::StreamId>(current_streams[device.index()]);
    return c10::Stream(c10::Stream::UNSAFE, device, id);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    const c10::Device previous = exchangeDevice(device);
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    setDevice(previous);
    return c10::Stream(c10::Stream::UNSAFE, device, reinterpret_cast<c10::StreamId>(stream));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream previous = getStream(stream.device());
    current_streams[stream.device_index()] =
        stream.id() == 0 ? nullptr : reinterpret_cast<cudaStream_t>(stream.id());
    return previous;
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    const std::lock_guard lock(mutex());
    if (*event == nullptr) *event = new std::shared_ptr<EmulatedMark>;
    *static_cast<std::shared_ptr<EmulatedMark>*>(*event) = mark(*handle_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    const std::lock_guard lock(mutex());
    if (event == nullptr) return;
    const auto mark = *static_cast<std::shared_ptr<EmulatedMark>*>(event);
    enqueue(*handle_of(stream), [mark] { wait_for(mark); });
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<std::shared_ptr<EmulatedMark>*>(event);
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || (*static_cast<std::shared_ptr<EmulatedMark>*>(event))->reached;
  }
  void synchronizeEvent(void* event) const override {
    const std::lock_guard lock(mutex());
    if (event != nullptr) wait_for(*static_cast<std::shared_ptr<EmulatedMark>*>(event));
  }
  bool queryStream(const c10::Stream& stream) const override {
    return handle_of(stream)->queue.empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    const std::lock_guard lock(mutex());
    drain(*handle_of(stream));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const int device = torch_device();
    void* const data = emulation::allocate(size, device, current_streams[device]);
    return {data, data, &release, c10::Device(c10::kCUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  // After all that was enqueued, as a copy on the default stream.
  void copy_data(void* to, const void* from, size_t size) const override {
    synchronize();
    memcpy(to, from, size);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &allocator)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys,
                                           c10::dtype_or_default(dtype));
}

// A sparse tensor with other tensors for its numbers.
at::Tensor sparse_like(const at::Tensor& tensor, const at::Tensor& indices,
                       const at::Tensor& values) {
  return at::_sparse_coo_tensor_with_dims_and_tensors(
      tensor.sparse_dim(), tensor.dense_dim(), tensor.sizes(), indices, values,
      values.options().layout(at::kSparse), tensor.is_coalesced());
}

// The same memory as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  if (tensor.is_sparse()) {
    return sparse_like(tensor, on_host(tensor._indices()), on_host(tensor._values()));
  }
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       tensor.options().device(at::kCPU));
}

// A new tensor of the device with these numbers.
at::Tensor on_device(const at::Tensor& tensor, c10::Device device) {
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  if (tensor.is_sparse()) {
    return sparse_like(tensor, on_device(tensor._indices(), device),
                       on_device(tensor._values(), device));
  }
  const auto sizes = tensor.sizes();
  at::Tensor made =
      tensor.is_non_overlapping_and_dense()
          ? at::empty_strided(sizes, tensor.strides(), tensor.options().device(device))
          : at::empty(sizes, tensor.options().device(device));
  // Memory that served before is free once the stream gets there.
  EmulatedStream& stream = stream_of(device.index());
  if (!stream.capturing) drain(stream);
  on_host(made).copy_(tensor);
  return made;
}

// The device of an operation on these tensors. Throws for a mixture that hardware cannot work on.
std::optional<c10::Device> common_device(const std::vector<at::Tensor>& tensors, bool may_mix) {
  std::optional<c10::Device> device;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.is_cuda() && !device) device = tensor.device();
  }
  for (const at::Tensor& tensor : tensors) {
    const bool number = tensor.is_cpu() && tensor.dim() == 0;
    TORCH_CHECK(may_mix || number || tensor.device() == device,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *device, " and ", tensor.device(), "!");
  }
  return device;
}

// Moves a tensor that is about to be written out of memory that it shares (torch._lazy_clone).
void claim(const at::Tensor& tensor) {
  if (tensor.is_cuda() && tensor.has_storage()) tensor.storage().mutable_data();
}

// Runs `work` on the memory of the device, in the order of its current stream.
void in_order(c10::Device device, std::function<void()> work) {
  EmulatedStream& stream = stream_of(device.index());
  if (stream.capturing) {
    enqueue(stream, std::move(work));
  } else {
    drain(stream);
    work();
  }
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool) {
  const std::lock_guard lock(mutex());
  const c10::Device device = self.is_cuda() ? self.device() : source.device();
  // Between devices the other one's work comes first, as torch's events make sure.
  if (self.is_cuda() && source.is_cuda()) drain(stream_of(source.device().index()));
  claim(self);
  in_order(device, [to = on_host(self), from = on_host(source)] { to.copy_(from); });
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, count, {});
}

void record_stream(at::Tensor& self, at::Stream stream) {
  use_on(self.storage().mutable_data(), handle_of(stream));
}

// Tensors in an argument or result, alone or in a list.
void each_tensor(c10::IValue& value, const std::function<void(at::Tensor&)>& use) {
  if (value.isTensor()) {
    at::Tensor tensor = value.toTensor();
    if (tensor.defined()) use(tensor);
    value = tensor;
  } else if (value.isTensorList()) {
    std::vector<at::Tensor> tensors = value.toTensorVector();
    for (at::Tensor& tensor : tensors) use(tensor);
    value = tensors;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
      if (tensor && tensor->defined()) use(*tensor);
      tensors.push_back(tensor);
    }
    value = tensors;
  }
}

// Which argument a result is, or shares its memory with; -1 for none.
int aliased(const c10::FunctionSchema& schema, size_t result) {
  const c10::AliasInfo* const info = schema.returns()[result].alias_info();
  if (info == nullptr) return -1;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::AliasInfo* const other = schema.arguments()[i].alias_info();
    if (other != nullptr && other->beforeSets() == info->beforeSets()) return static_cast<int>(i);
  }
  return -1;
}

// A view of a tensor of the device that lies where `view` does.
at::Tensor view_like(const at::Tensor& base, const at::Tensor& view) {
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), view.dtype());
  const auto bytes = static_cast<const char*>(view.const_data_ptr()) -
                     static_cast<const char*>(base.storage().data());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides());
  made.unsafeGetTensorImpl()->set_storage_offset(bytes / view.itemsize());
  return made;
}

// Every operation without a kernel of its own here: the CPU's, on the same memory.
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::lock_guard lock(mutex());
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  std::vector<c10::IValue> given(stack->end() - count, stack->end());
  std::vector<at::Tensor> tensors;
  std::optional<c10::Device> device;
  for (c10::IValue value : given) {
    each_tensor(value, [&](at::Tensor& tensor) { tensors.push_back(tensor); });
    if (value.isDevice()) device = value.toDevice();
  }
  const std::string& name = schema.name();
  const bool may_mix = name.find("::index") != std::string::npos;
  if (const auto found = common_device(tensors, may_mix)) device = found;
  TORCH_CHECK(device.has_value(), "emulation: ", name, " has no tensor of the device");

  std::vector<c10::IValue> arguments = given;
  for (size_t i = 0; i < count; ++i) {
    // An empty result is resized by the operation, which borrowed memory cannot be.
    const bool unsized = schema.arguments()[i].is_out();
    const c10::AliasInfo* const alias = schema.arguments()[i].alias_info();
    each_tensor(arguments[i], [&](at::Tensor& tensor) {
      if (alias != nullptr && alias->isWrite()) claim(tensor);
      tensor = unsized && tensor.numel() == 0 ? at::empty({0}, tensor.options().device(at::kCPU))
                                              : on_host(tensor);
    });
    if (arguments[i].isDevice()) arguments[i] = c10::Device(c10::kCPU);
  }
  EmulatedStream& stream = stream_of(device->index());
  bool in_place = schema.returns().empty();
  for (const c10::Argument& result : schema.returns()) {
    in_place = in_place || (result.alias_info() != nullptr && result.alias_info()->isWrite());
  }
  torch::jit::Stack results = arguments;
  if (stream.capturing && in_place) {
    results.clear();
    enqueue(stream, [op, arguments] {
      torch::jit::Stack again = arguments;
      op.callBoxed(again);
    });
    for (size_t i = 0; i < schema.returns().size(); ++i) results.emplace_back();
  } else {
    if (!stream.capturing) drain(stream);
    op.callBoxed(results);
  }
  torch::jit::drop(*stack, count);
  for (size_t i = 0; i < count; ++i) {
    if (!schema.arguments()[i].is_out() || !given[i].isTensor()) continue;
    const at::Tensor& made = arguments[i].toTensor();
    const at::Tensor& wanted = given[i].toTensor();
    if (made.sizes() == wanted.sizes()) continue;
    wanted.resize_(made.sizes());
    drain(stream);
    on_host(wanted).copy_(made);
  }
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    const int source = aliased(schema, i);
    if (source >= 0 && schema.returns()[i].alias_info()->isWrite()) {
      stack->push_back(given[source]);
      continue;
    }
    c10::IValue result = results[i];
    each_tensor(result, [&](at::Tensor& tensor) {
      if (!tensor.defined()) return;
      if (source >= 0 && given[source].isTensor() && !given[source].toTensor().is_sparse()) {
        tensor = view_like(given[source].toTensor(), tensor);
        return;
      }
      const at::Tensor numbers = tensor;
      tensor = on_device(tensor, *device);
      if (!stream.capturing) return;
      enqueue(stream, [op, arguments, i, to = on_host(tensor)] {
        torch::jit::Stack again = arguments;
        op.callBoxed(again);
        to.copy_(again[i].toTensor());
      });
    });
    stack->push_back(result);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("copy_", &copy);
  library.impl("record_stream", &record_stream);
  library.impl("resize_", &at::native::resize_);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
}

TORCH_LIBRARY_IMPL(aten, SparseCUDA, library) {
  library.impl("_sparse_coo_tensor_with_dims_and_tensors",
               &at::native::new_with_dims_and_tensor_sparse_symint);
  library.impl("_indices", &at::native::_indices_sparse);
  library.impl("_values", &at::native::_values_sparse);
  library.impl("indices", &at::native::indices_sparse);
  library.impl("values", &at::native::values_sparse);
  library.impl("sparse_dim", &at::native::sparse_dim_sparse);
  library.impl("dense_dim", &at::native::dense_dim_sparse);
  library.impl("_nnz", &at::native::_nnz_sparse);
  library.impl("is_coalesced", &at::native::is_coalesced_sparse);
  // Not torch's for every backend, which knows nothing of sparse tensors.
  library.impl("clone", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(_, SparseCUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// torch's autograd asks these.
struct CUDAHooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex device) const override { return has_context(device); }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return torch_device(); }
  c10::DeviceIndex getCurrentDevice() const override { return torch_device(); }
};

// torch has made its own, which know no device, by the time that it is imported: ours take their
// place, in their memory.
[[maybe_unused]] const bool kHooked = [] {
  static_assert(sizeof(CUDAHooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) CUDAHooks;
  return true;
}();

}  // namespace emulation
