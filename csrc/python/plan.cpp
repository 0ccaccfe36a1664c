#include "python/plan.h"

#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "core/control.h"
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
                                        c10::DispatchKey::ZeroTensor, c10::DispatchKey::Python,
                                        c10::DispatchKey::FuncTorchBatched,
                                        c10::DispatchKey::FuncTorchGradWrapper,
                                        c10::DispatchKey::Functionalize});

// What stands in a dict at a name of torch's; borrowed, null when there is nothing. Such names are
// plain strings, so this runs no Python code.
PyObject* entry(PyObject* dict, PyObject* name) {
  PyObject* const value = dict == nullptr ? nullptr : PyDict_GetItemWithError(dict, name);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The counter in a parameter's state.
PyObject* step_of(PyObject* state) {
  static PyObject* const kStep = PyUnicode_InternFromString("step");
  PyObject* const step = entry(state, kStep);
  return step == Py_None ? nullptr : step;
}

// Stands for the address of a gradient without elements, which may have no memory: null would mean
// that there is no gradient.
void* const kNowhere = reinterpret_cast<void*>(16);

Attention rebuild() {
  Attention attention;
  attention.rebuild = true;
  return attention;
}

}  // namespace

Plan::Plan(const std::string& rule, c10::Device device, const py::list& slots,
           const py::object& param_groups, const py::dict& state, int32_t piece_length)
    : rule_index_(find_rule(rule)),
      rule_(&all_rules().data[rule_index_]),
      device_(device),
      groups_(*rule_, device, param_groups) {
  for (const rules::StateName& name : rule_->states) {
    state_names_.push_back(PyUnicode_InternFromString(name.name));
  }
  for (const char* name : rule_->scalars) {
    state_names_.push_back(PyUnicode_InternFromString(name));
  }
  slots_.resize(slots.size());
  layouts_.resize(slots.size());
  rows_.resize(slots.size());
  for (size_t i = 0; i < slots.size(); ++i) add_slot(i, slots[i], state.ptr());
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
    state_entries_.emplace_back(key, value);
  }
  state_guard_.arm(state.ptr());
  written_storages_ = PointerFilter(watched_.size());
  for (const Watched& watched : watched_) written_storages_.add(watched.storage());
  cut_pieces(piece_length);
}

void Plan::add_slot(size_t index, const py::tuple& given, PyObject* state) {
  const auto [group, param, counter] = given.cast<std::tuple<int32_t, py::object, py::object>>();
  const at::Tensor& tensor = *as_tensor(param.ptr());
  TensorRow& row = rows_[index];
  row.group = group;
  row.param = {tensor.mutable_data_ptr(), dtype_of(tensor).value()};
  // Until a gradient or a state is seen, it is taken to be like its parameter.
  row.grad.type = row.param.type;
  std::fill_n(row.state, kMaxStates, Operand{nullptr, row.param.type});
  row.numel = tensor.numel();
  numel_ += row.numel;
  Slot& slot = slots_[index];
  slot.first_watched = watched_.size();
  watch(slot, param.ptr());
  slot.gradient_place = &grad_of(index);
  slot.state = PyDict_GetItemWithError(state, param.ptr());
  if (slot.state == nullptr && PyErr_Occurred()) throw py::error_already_set();
  if (slot.state != nullptr && !PyDict_Check(slot.state)) slot.state = nullptr;
  if (slot.state != nullptr) slot.guard.arm(slot.state);
  const bool has_states = adopt_states(index) && adopt_scalars(index);
  const at::Tensor* const steps = as_tensor(counter.ptr());
  slot.ready = has_states && steps != nullptr;
  if (steps == nullptr) return;
  if (slot.ready) row.step = steps->mutable_data_ptr();
  row.step_type = dtype_of(*steps).value();
  if (step_of(slot.state) == counter.ptr()) {
    slot.step = counter.ptr();
    watch(slot, slot.step);
  } else {
    hidden_counters_.push_back(*steps);
  }
}

void Plan::watch(Slot& slot, PyObject* tensor) {
  watched_.emplace_back(tensor, geometries_);
  ++slot.watched_count;
}

// Whether a parameter has the state, or scalar, of this name.
bool Plan::wants_state(size_t name, size_t index) const {
  if (name >= rule_->states.size) return true;
  const int bit = rule_->states.data[name].variant_bit;
  return (bit & variant_of(rows_[index])) == bit;
}

// Points the row at its states. False when one is missing or does not fit.
bool Plan::adopt_states(size_t index) {
  Slot& slot = slots_[index];
  TensorRow& row = rows_[index];
  const at::Tensor& param = param_of(slot).tensor();
  slot.dense = param.is_non_overlapping_and_dense();
  for (size_t i = 0; i < rule_->states.size; ++i) {
    if (!wants_state(i, index)) continue;
    PyObject* const value = entry(slot.state, state_names_[i]);
    const at::Tensor* const tensor = value == nullptr ? nullptr : as_tensor(value);
    if (tensor == nullptr || !fits(*tensor, param)) return false;
    row.state[slot.state_count] = {tensor->mutable_data_ptr(), *dtype_of(*tensor)};
    slot.dense =
        slot.dense && same_strides(*tensor->unsafeGetTensorImpl(), *param.unsafeGetTensorImpl());
    watch(slot, value);
    ++slot.state_count;
  }
  return true;
}

// Points the row at its scalars. False when one is missing or none that kernels advance: whoever
// hands out the counters has replaced those.
bool Plan::adopt_scalars(size_t index) {
  Slot& slot = slots_[index];
  const size_t count = rule_->scalars.size;
  for (size_t i = 0; i < count; ++i) {
    PyObject* const value = entry(slot.state, state_names_[rule_->states.size + i]);
    const at::Tensor* const tensor = value == nullptr ? nullptr : as_tensor(value);
    if (tensor == nullptr || tensor->dim() != 0 || tensor->device() != device_ ||
        (tensor->scalar_type() != at::kFloat && tensor->scalar_type() != at::kDouble)) {
      return false;
    }
    rows_[index].state[kMaxStates - count + i] = {tensor->mutable_data_ptr(), *dtype_of(*tensor)};
    watch(slot, value);
  }
  return true;
}

// Raises for a state that does not fit its parameter: it hinders only a step that needs it.
void Plan::check_state(size_t index) const {
  const at::Tensor& param = param_of(slots_[index]).tensor();
  for (size_t i = 0; i < rule_->states.size; ++i) {
    if (!wants_state(i, index)) continue;
    PyObject* const value = entry(slots_[index].state, state_names_[i]);
    const at::Tensor* const tensor = value == nullptr ? nullptr : as_tensor(value);
    if (tensor == nullptr || fits(*tensor, param)) continue;
    throw py::value_error(
        std::string("state '") + rule_->states.data[i].name + "' of " + name_of(index) + " is " +
        describe(*tensor) + "; expected a floating-point tensor like the parameter, " +
        describe(param) + ". Load a matching checkpoint, or delete optimizer.state[parameter]");
  }
}

std::optional<Attention> Plan::begin(const py::object& param_groups, const py::object& state) {
  // Comes first, because it may run Python code and so change anything. Nothing below does.
  if (!groups_.refresh(param_groups.ptr())) return rebuild();
  if (!groups_.hold(param_groups.ptr()) || !state_dict_holds(state.ptr())) return rebuild();
  std::vector<size_t> missing, foreign, sharing;
  // In blocks, so that a gradient's memory is asked for some time before it is looked at.
  constexpr size_t kBlock = 8;
  for (size_t first = 0; first < slots_.size(); first += kBlock) {
    const size_t last = std::min(first + kBlock, slots_.size());
    for (size_t i = first; i < last; ++i) {
      prefetch(i + kBlock);
      if (!slot_holds(i)) return rebuild();
      prefetch_tensor(grad_of(i).unsafeGetTensorImpl());
    }
    for (size_t i = first; i < last; ++i) {
      prefetch_storage(grad_of(i).unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    }
    for (size_t i = first; i < last; ++i) {
      rows_[i].grad.data = nullptr;
      const at::Tensor& grad = grad_of(i);
      if (!grad.defined()) continue;
      if (!take_gradient(i, grad)) {
        rows_[i].grad.data = nullptr;
        foreign.push_back(i);
        continue;
      }
      if (!slots_[i].ready) {
        check_state(i);
        missing.push_back(i);
      }
      const auto& storage = grad.unsafeGetTensorImpl()->unsafe_storage();
      if (written_storages_.may_hold(storage.unsafeGetStorageImpl())) sharing.push_back(i);
    }
  }
  if (std::any_of(sharing.begin(), sharing.end(), [this](size_t i) { return writes_grad(i); })) {
    // torch's rules go through the parameters in their order, so that results are defined.
    foreign.clear();
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (grad_of(i).defined()) foreign.push_back(i);
      rows_[i].grad.data = nullptr;
    }
  }
  if (missing.empty() && foreign.empty()) return std::nullopt;
  Attention attention;
  for (const size_t i : missing) attention.missing.push_back(object_of(i));
  for (const size_t i : foreign) attention.foreign.push_back(object_of(i));
  return attention;
}

// The gradient of a parameter that is known to be alive.
const at::Tensor& Plan::grad_of(size_t index) const {
  static const at::Tensor kNone;
  const auto* const meta =
      static_cast<torch::autograd::AutogradMeta*>(param_of(slots_[index]).impl().autograd_meta());
  return meta == nullptr ? kNone : meta->grad_;
}

// The validation waits for memory: some slots ahead of it, asks for the objects that it will
// compare.
FUSEDOPT_PREFETCH void Plan::prefetch(size_t index) const {
  if (index >= slots_.size()) return;
  const Slot& slot = slots_[index];
  const size_t end = watched_end(slot);
  for (size_t k = slot.first_watched; k < end; ++k) watched_[k].prefetch();
  __builtin_prefetch(slot.state);
  __builtin_prefetch(slot.gradient_place);
}

// Whether optimizer.state still maps the same parameters to the same inner dicts, which are alive
// then.
bool Plan::state_dict_holds(PyObject* state) {
  if (!PyDict_Check(state)) return false;
  if (state_guard_.unchanged(state)) return true;
  PyObject *key, *value;
  size_t count = 0;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++count) {
    if (count == state_entries_.size() || state_entries_[count] != std::pair(key, value)) {
      return false;
    }
  }
  if (count != state_entries_.size()) return false;
  state_guard_.arm(state);
  return true;
}

// Whether a parameter, its state and its counter are still the tensors, in the memory, that the row
// describes.
bool Plan::slot_holds(size_t index) {
  const Slot& slot = slots_[index];
  if (!param_of(slot).is(param_of(slot).object())) return false;
  if (slot.state != nullptr && !slot.guard.unchanged(slot.state) && !state_holds(index)) {
    return false;
  }
  const size_t states_end = slot.first_watched + 1 + slot.state_count;
  const size_t end = watched_end(slot);
  for (size_t k = slot.first_watched; k < end; ++k) {
    const Watched& watched = watched_[k];
    if (!(k < states_end ? watched.unchanged(geometries_)
                         : watched.holds_its_number(geometries_))) {
      return false;
    }
  }
  return true;
}

// Whether optimizer.state[parameter], which was written to, still holds the same objects, and still
// lacks what it lacked.
bool Plan::state_holds(size_t index) {
  Slot& slot = slots_[index];
  if (!PyDict_Check(slot.state)) return false;
  const Watched* next = &watched_[slot.first_watched + 1];
  const Watched* const end = watched_.data() + watched_end(slot) - (slot.step != nullptr);
  PyObject* const step = step_of(slot.state);
  if (slot.step == nullptr ? step != nullptr : step == nullptr || !end->is(step)) return false;
  for (size_t i = 0; i < state_names_.size(); ++i) {
    if (!wants_state(i, index)) continue;
    PyObject* const value = entry(slot.state, state_names_[i]);
    if (next == end) {
      if (value != nullptr && as_tensor(value) != nullptr) return false;
      break;
    }
    if (value == nullptr || !(next++)->is(value)) return false;
  }
  slot.guard.arm(slot.state);
  return true;
}

// Points the row at this step's gradient. False when no kernel reads such a gradient.
bool Plan::take_gradient(size_t index, const at::Tensor& grad) {
  const Slot& slot = slots_[index];
  const auto& impl = *grad.unsafeGetTensorImpl();
  if (slot.grad_geometry < 0 || !geometries_[slot.grad_geometry].fits(impl)) {
    if (!take_new_gradient(index, grad)) return false;
  }
  TensorRow& row = rows_[index];
  row.grad.data = row.numel == 0 ? kNowhere : const_cast<void*>(first_byte(impl));
  return true;
}

bool Plan::take_new_gradient(size_t index, const at::Tensor& grad) {
  Slot& slot = slots_[index];
  TensorRow& row = rows_[index];
  const at::Tensor& param = param_of(slot).tensor();
  if (grad.layout() != at::kStrided || grad.key_set().has_any(kOddKeys)) return false;
  const auto type = dtype_of(grad);
  if (!fits(grad, param)) {
    throw py::value_error("the gradient of " + name_of(index) + " is " + describe(grad) +
                          "; expected a floating-point tensor shaped like the parameter, " +
                          describe(param) + ". Set parameter.grad = None and run backward again");
  }
  std::vector<int64_t> layout;
  const c10::TensorImpl& impl = *grad.unsafeGetTensorImpl();
  if (!slot.dense || !same_strides(impl, param_of(slot).impl())) {
    std::vector<const c10::TensorImpl*> operands{&param_of(slot).impl(), &impl};
    for (int32_t k = 1; k <= slot.state_count; ++k) {
      operands.push_back(&watched_[slot.first_watched + k].impl());
    }
    write_layout(operands, layout);
  }
  if (row.grad.type != *type || layouts_[index] != layout) ++rows_version_;
  row.grad.type = *type;
  layouts_[index] = std::move(layout);
  row.layout = layouts_[index].empty() ? nullptr : layouts_[index].data();
  slot.grad_geometry = geometries_.number_of(impl);
  return true;
}

bool Plan::needs_reduce(std::optional<double> max_grad_norm, bool skip_nonfinite) const {
  const auto& groups = groups_.rows();
  return max_grad_norm.has_value() || skip_nonfinite ||
         clips_by_param(groups.data(), static_cast<int64_t>(groups.size()));
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

py::object Plan::object_of(size_t index) const {
  return py::reinterpret_borrow<py::object>(param_of(slots_[index]).object());
}

// "parameter 3 of param group 1", for messages.
std::string Plan::name_of(size_t index) const {
  const int32_t group = rows_[index].group;
  const auto& members = groups_.members(group);
  const auto at = std::find(members.begin(), members.end(), param_of(slots_[index]).object());
  return "parameter " + std::to_string(at - members.begin()) + " of param group " +
         std::to_string(group);
}

}  // namespace fusedopt
