#include "python/plan.h"

#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>

#include "python/tensors.h"

namespace fusedopt {
namespace {

size_t find_rule(const std::string& name) {
  const auto rules = all_rules();
  for (size_t i = 0; i < rules.size; ++i) {
    if (name == rules.data[i].name) return i;
  }
  throw py::value_error("no rule is called '" + name + "'");
}

// Dispatch keys of tensors whose elements are not simply found at their data pointer.
constexpr c10::DispatchKeySet kOddKeys({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                        c10::DispatchKey::ZeroTensor, c10::DispatchKey::Python});

const void* storage_bytes(const c10::TensorImpl* impl) {
  return impl->unsafe_storage().unsafeGetStorageImpl()->data();
}

// Where a tensor's elements begin, without the checks of data_ptr().
const void* first_byte(const c10::TensorImpl* impl) {
  return static_cast<const char*>(storage_bytes(impl)) +
         impl->storage_offset() * static_cast<int64_t>(impl->dtype().itemsize());
}

// A number that differs when number type, offset into the storage, sizes or strides do.
uint64_t shape_number(const c10::TensorImpl* impl) {
  constexpr uint64_t kPrime = 0x9e3779b97f4a7c15u;
  const auto sizes = impl->sizes();
  const auto strides = impl->strides();
  uint64_t number = static_cast<uint64_t>(impl->storage_offset()) * kPrime ^
                    static_cast<uint64_t>(impl->dtype().toScalarType());
  for (size_t d = 0; d < sizes.size(); ++d) {
    number = (number ^ static_cast<uint64_t>(sizes[d])) * kPrime;
    number = (number ^ static_cast<uint64_t>(strides[d])) * kPrime + d;
  }
  return number;
}

const at::Tensor& grad_of(const c10::TensorImpl* param) {
  static const at::Tensor kNone;
  const auto* const meta = static_cast<torch::autograd::AutogradMeta*>(param->autograd_meta());
  return meta == nullptr ? kNone : meta->grad_;
}

Attention rebuild() {
  Attention attention;
  attention.rebuild = true;
  return attention;
}

}  // namespace

Plan::Watched::Watched(const at::Tensor& tensor)
    : impl(tensor.unsafeGetTensorImpl()), data(storage_bytes(impl)), shape(shape_number(impl)) {}

bool Plan::Watched::unchanged() const {
  return storage_bytes(impl) == data && shape_number(impl) == shape;
}

Plan::Plan(const std::string& rule, c10::Device device, const py::list& slots,
           const py::list& param_groups, const py::dict& state, int32_t piece_length)
    : rule_index_(find_rule(rule)),
      rule_(&all_rules().data[rule_index_]),
      device_(device),
      groups_(*rule_, device, param_groups),
      state_(state) {
  for (const rules::StateName& name : rule_->states) {
    state_names_.push_back(PyUnicode_InternFromString(name.name));
  }
  slots_.resize(slots.size());
  owned_.resize(slots.size());
  rows_.resize(slots.size());
  for (size_t i = 0; i < slots.size(); ++i) {
    const auto [group, param, counter] =
        slots[i].cast<std::tuple<int32_t, py::object, py::object>>();
    Owned& owned = owned_[i];
    owned.param_object = param;
    owned.param = *as_tensor(param.ptr());
    owned.counter_object = counter;
    TensorRow& row = rows_[i];
    row.group = group;
    row.param = owned.param.mutable_data_ptr();
    // Until a gradient or a state is seen, it is taken to be like its parameter.
    row.param_type = row.grad_type = dtype_of(owned.param).value();
    std::fill_n(row.state_type, kMaxStates, row.param_type);
    row.numel = owned.param.numel();
    row.step = as_tensor(counter.ptr())->mutable_data_ptr<float>();
    owned.counter_storage = as_tensor(counter.ptr())->storage();
    slots_[i].counter = as_tensor(counter.ptr())->unsafeGetTensorImpl();
    slots_[i].counter_storage = owned.counter_storage.unsafeGetStorageImpl();
    slots_[i].watched[slots_[i].watched_count++] = Watched(owned.param);
    adopt_state(i);
  }
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state_.ptr(), &at, &key, &value);) {
    state_entries_.emplace_back(key, value);
  }
  state_guard_.arm(state_.ptr());
  cut_pieces(piece_length);
}

bool Plan::wants_state(size_t name, size_t index) const {
  const int bit = rule_->states.data[name].variant_bit;
  return (bit & variant_of(rows_[index])) == bit;
}

void Plan::adopt_state(size_t index) {
  Slot& slot = slots_[index];
  Owned& owned = owned_[index];
  TensorRow& row = rows_[index];
  slot.dense = owned.param.is_non_overlapping_and_dense();
  slot.state = PyDict_GetItemWithError(state_.ptr(), owned.param_object.ptr());
  if (slot.state == nullptr && PyErr_Occurred()) throw py::error_already_set();
  owned.state = py::reinterpret_borrow<py::object>(slot.state);
  for (size_t i = 0; i < rule_->states.size; ++i) {
    if (!wants_state(i, index)) continue;
    PyObject* const value =
        slot.state == nullptr ? nullptr : PyDict_GetItemWithError(slot.state, state_names_[i]);
    const at::Tensor* tensor = value == nullptr ? nullptr : as_tensor(value);
    if (tensor == nullptr) return;
    if (tensor->sizes() != owned.param.sizes() || tensor->device() != owned.param.device() ||
        !dtype_of(*tensor)) {
      throw py::value_error(std::string("state '") + rule_->states.data[i].name + "' of " +
                            name_of(index) + " is " + describe(*tensor) +
                            "; expected a floating-point tensor like the parameter, " +
                            describe(owned.param) +
                            ". Load a matching checkpoint, or delete optimizer.state[parameter]");
    }
    const size_t k = owned.state_objects.size();
    row.state[k] = tensor->mutable_data_ptr();
    row.state_type[k] = *dtype_of(*tensor);
    slot.dense = slot.dense &&
                 same_strides(*tensor->unsafeGetTensorImpl(), *owned.param.unsafeGetTensorImpl());
    slot.watched[slot.watched_count++] = Watched(*tensor);
    owned.state_objects.push_back(py::reinterpret_borrow<py::object>(value));
  }
  slot.ready = true;
  if (slot.state != nullptr) slot.guard.arm(slot.state);
}

std::optional<Attention> Plan::begin(const py::list& param_groups, const py::dict& state) {
  if (state.ptr() != state_.ptr() || !groups_.refresh(param_groups.ptr()) || !state_dict_holds()) {
    return rebuild();
  }
  std::vector<size_t> missing, foreign;
  for (size_t i = 0; i < slots_.size(); ++i) {
    prefetch(i);
    if (!slot_holds(i)) return rebuild();
    const at::Tensor& grad = grad_of(slots_[i].watched[0].impl);
    rows_[i].grad = nullptr;
    if (!grad.defined()) continue;
    if (!take_gradient(i, grad)) {
      rows_[i].grad = nullptr;
      foreign.push_back(i);
    } else if (!slots_[i].ready) {
      missing.push_back(i);
    }
  }
  if (missing.empty() && foreign.empty()) return std::nullopt;
  Attention attention;
  for (const size_t i : missing) attention.missing.append(owned_[i].param_object);
  for (const size_t i : foreign) attention.foreign.append(owned_[i].param_object);
  return attention;
}

// The validation waits for memory: a few slots ahead of it, asks for torch's tensor objects, then
// for the storages that they point to. Always inlined: g++ takes a function that only prefetches
// for one without effect and drops the call.
__attribute__((always_inline)) inline void Plan::prefetch(size_t index) const {
  constexpr size_t kStorages = 4;
  constexpr size_t kTensors = 8;
  if (index + kTensors >= slots_.size()) return;
  const Slot& far = slots_[index + kTensors];
  for (int i = 0; i < far.watched_count; ++i) {
    const auto* const bytes = reinterpret_cast<const char*>(far.watched[i].impl);
    for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(bytes + at);
  }
  __builtin_prefetch(far.counter);
  const Slot& near = slots_[index + kStorages];
  for (int i = 0; i < near.watched_count; ++i) {
    __builtin_prefetch(near.watched[i].impl->unsafe_storage().unsafeGetStorageImpl());
  }
  __builtin_prefetch(near.watched[0].impl->autograd_meta());
}

// Whether optimizer.state still maps the same parameters to the same inner dicts.
bool Plan::state_dict_holds() {
  if (state_guard_.unchanged(state_.ptr())) return true;
  PyObject *key, *value;
  size_t count = 0;
  for (Py_ssize_t at = 0; PyDict_Next(state_.ptr(), &at, &key, &value); ++count) {
    if (count == state_entries_.size() || state_entries_[count] != std::pair(key, value)) {
      return false;
    }
  }
  if (count != state_entries_.size()) return false;
  state_guard_.arm(state_.ptr());
  return true;
}

// Whether a parameter, its state and its counter are still the tensors, in the memory, that the row
// describes. The counter is a view of a buffer of ours: one look at its storage is enough.
bool Plan::slot_holds(size_t index) {
  const Slot& slot = slots_[index];
  for (int i = 0; i < slot.watched_count; ++i) {
    if (!slot.watched[i].unchanged()) return false;
  }
  if (slot.counter->unsafe_storage().unsafeGetStorageImpl() != slot.counter_storage) return false;
  return slot.state == nullptr || slot.guard.unchanged(slot.state) || state_holds(index);
}

// Whether optimizer.state[parameter] still holds the same tensors.
bool Plan::state_holds(size_t index) {
  Slot& slot = slots_[index];
  const auto& objects = owned_[index].state_objects;
  size_t k = 0;
  for (size_t i = 0; i < state_names_.size() && k < objects.size(); ++i) {
    if (!wants_state(i, index)) continue;
    PyObject* const value = PyDict_GetItemWithError(slot.state, state_names_[i]);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (value != objects[k++].ptr()) return false;
  }
  static PyObject* const kStep = PyUnicode_InternFromString("step");
  PyObject* const step = PyDict_GetItemWithError(slot.state, kStep);
  if (step == nullptr && PyErr_Occurred()) throw py::error_already_set();
  if (step != nullptr && step != owned_[index].counter_object.ptr()) return false;
  slot.guard.arm(slot.state);
  return true;
}

// Points the row at this step's gradient. False when no kernel reads such a gradient.
bool Plan::take_gradient(size_t index, const at::Tensor& grad) {
  const Slot& slot = slots_[index];
  const auto& impl = *grad.unsafeGetTensorImpl();
  const auto& param = *slot.watched[0].impl;
  const bool as_before = impl.key_set() == slot.grad_keys && impl.dtype() == slot.grad_dtype &&
                         slot.dense && impl.sizes() == param.sizes() && same_strides(impl, param) &&
                         impl.device() == device_;
  if (!as_before || rows_[index].layout != nullptr) return take_new_gradient(index, grad);
  TensorRow& row = rows_[index];
  // An empty tensor may have no memory, and a null gradient would mean that there is none.
  row.grad = row.numel == 0 ? row.step : first_byte(&impl);
  row.layout = nullptr;
  return true;
}

bool Plan::take_new_gradient(size_t index, const at::Tensor& grad) {
  Slot& slot = slots_[index];
  Owned& owned = owned_[index];
  TensorRow& row = rows_[index];
  if (grad.layout() != at::kStrided || grad.key_set().has_any(kOddKeys)) return false;
  const auto type = dtype_of(grad);
  if (grad.sizes() != owned.param.sizes() || grad.device() != owned.param.device() || !type) {
    throw py::value_error("the gradient of " + name_of(index) + " is " + describe(grad) +
                          "; expected a floating-point tensor shaped like the parameter, " +
                          describe(owned.param) +
                          ". Set parameter.grad = None and run backward again");
  }
  row.grad = row.numel == 0 ? row.step : grad.const_data_ptr();
  std::vector<int64_t> layout;
  const auto& param = *slot.watched[0].impl;
  if (!slot.dense || !same_strides(*grad.unsafeGetTensorImpl(), param)) {
    std::vector<const at::Tensor*> operands{&owned.param, &grad};
    for (const auto& state : owned.state_objects) operands.push_back(as_tensor(state.ptr()));
    write_layout(operands, layout);
  }
  if (row.grad_type != *type || owned.layout != layout || !slot.grad_seen) ++rows_version_;
  row.grad_type = *type;
  owned.layout = std::move(layout);
  row.layout = owned.layout.empty() ? nullptr : owned.layout.data();
  slot.grad_seen = true;
  if (!serves(row)) return false;
  slot.grad_keys = grad.key_set();
  slot.grad_dtype = grad.dtype();
  return true;
}

bool Plan::needs_reduce(std::optional<double> max_grad_norm, bool skip_nonfinite) const {
  const auto& groups = groups_.rows();
  return max_grad_norm.has_value() || skip_nonfinite ||
         std::any_of(groups.begin(), groups.end(), [](const GroupRow& group) {
           return group.max_grad_norm_per_param != INFINITY;
         });
}

void Plan::cut_pieces(int32_t piece_length) {
  for (size_t i = 0; i < rows_.size(); ++i) {
    for (int64_t begin = 0; begin < rows_[i].numel; begin += piece_length) {
      const int64_t length = std::min<int64_t>(piece_length, rows_[i].numel - begin);
      pieces_.push_back({begin, static_cast<int32_t>(length), static_cast<int32_t>(i)});
    }
  }
}

Table Plan::table() const {
  return {rows_.data(),
          groups_.rows().data(),
          pieces_.data(),
          static_cast<int64_t>(rows_.size()),
          static_cast<int64_t>(groups_.rows().size()),
          static_cast<int64_t>(pieces_.size())};
}

// "parameter 3 of param group 1", for messages.
std::string Plan::name_of(size_t index) const {
  const int32_t group = rows_[index].group;
  const auto& members = groups_.members(group);
  const auto at = std::find(members.begin(), members.end(), owned_[index].param_object.ptr());
  return "parameter " + std::to_string(at - members.begin()) + " of param group " +
         std::to_string(group);
}

}  // namespace fusedopt
