#include "python/groups.h"

#include <ATen/ops/item.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "python/tensors.h"

namespace fusedopt {
namespace {

PyObject* intern(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (name == nullptr) throw py::error_already_set();
  return name;
}

// Of no concern to kernels, but checked where plans are made; not every rule of torch's has it.
PyObject* capturable() {
  static PyObject* const kCapturable = intern("capturable");
  return kCapturable;
}

// Keys that a group may lack: a checkpoint or a framework that knows nothing of them may have
// replaced it.
bool is_optional(PyObject* name) {
  static PyObject* const kDecoupled = intern("decoupled_weight_decay");
  return name == kDecoupled || name == capturable();
}

// Keys that torch asks for their truth only, although rules read them as 0 or 1.
bool is_flag(const std::string& name) {
  return name == "maximize" || name == "nesterov" || name == "decoupled_weight_decay";
}

std::string text_of(PyObject* object) { return py::str(object).cast<std::string>(); }

// A number whose value neither changes nor needs Python code to be read.
bool is_plain_number(PyObject* value) {
  return PyFloat_Check(value) || PyLong_CheckExact(value) || PyBool_Check(value);
}

// What a list or tuple holds, borrowed.
struct Items {
  PyObject* const* data;
  size_t size;
};

std::optional<Items> items_of(PyObject* sequence) {
  if (!PyList_Check(sequence) && !PyTuple_Check(sequence)) return std::nullopt;
  return Items{PySequence_Fast_ITEMS(sequence),
               static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence))};
}

PyObject* find(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

PyObject* params_of(PyObject* dict) {
  static PyObject* const kParams = intern("params");
  return find(dict, kParams);
}

PyObject* lr_of(PyObject* dict) {
  static PyObject* const kLr = intern("lr");
  return find(dict, kLr);
}

}  // namespace

void check_one_element(const at::Tensor& tensor, const std::string& what) {
  if (tensor.numel() == 1) return;
  throw py::value_error(what + " is a tensor of " + std::to_string(tensor.numel()) +
                        " elements; expected a number or a tensor of one element");
}

double to_double(PyObject* value, const std::string& what) {
  if (const at::Tensor* found = as_tensor(value)) {
    const at::Tensor tensor = *found;
    check_one_element(tensor, what);
    return tensor.item().toDouble();
  }
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) {
    const bool is_too_large = PyErr_ExceptionMatches(PyExc_OverflowError);
    if (!is_too_large && !PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    if (is_too_large) {
      throw py::value_error(what +
                            " is too large for a float; expected a number of at most 1.8e308");
    }
    throw py::type_error(what + " is " + py::repr(value).cast<std::string>() +
                         "; expected a number or a tensor of one element");
  }
  return number;
}

std::vector<Groups::Key> Groups::make_keys(const Span<const char*>& names) {
  std::vector<Key> keys;
  for (const char* text : names) {
    const char* dot = std::strchr(text, '.');
    if (dot == nullptr) {
      keys.push_back({intern(text), -1, is_flag(text)});
    } else {
      keys.push_back({intern(std::string(text, dot).c_str()), std::stoi(dot + 1), false});
    }
  }
  return keys;
}

Groups::Groups(const RuleInfo& rule, c10::Device device, const py::object& param_groups)
    : device_(device), hyper_(make_keys(rule.hyper)), variants_(make_keys(rule.variants)) {
  if (!items_of(param_groups.ptr())) {
    throw py::type_error("param_groups is " + py::repr(param_groups).cast<std::string>() +
                         "; expected a list of dicts");
  }
  const auto dicts = py::reinterpret_steal<py::tuple>(PySequence_Tuple(param_groups.ptr()));
  if (!dicts) throw py::error_already_set();
  groups_.resize(dicts.size());
  rows_.resize(dicts.size());
  for (size_t i = 0; i < groups_.size(); ++i) {
    const py::object dict = dicts[i];
    PyObject* const params = PyDict_Check(dict.ptr()) ? params_of(dict.ptr()) : nullptr;
    const auto members = params == nullptr ? std::nullopt : items_of(params);
    if (!members) {
      throw py::type_error("param group " + std::to_string(i) +
                           " is not a dict with a list of parameters at 'params'; add groups with"
                           " add_param_group");
    }
    groups_[i].members.assign(members->data, members->data + members->size);
    read(i, dict.ptr(), groups_[i], rows_[i]);
  }
}

bool Groups::refresh(PyObject* param_groups) {
  for (size_t i = 0; i < groups_.size(); ++i) {
    // Looked up for each group: reading the numbers of the one before may have changed the list.
    const auto dicts = items_of(param_groups);
    if (!dicts || dicts->size != groups_.size() || !PyDict_Check(dicts->data[i])) return false;
    Group& group = groups_[i];
    if (group.guard.unchanged(dicts->data[i]) && !group.holds_mutable) continue;
    const auto dict = py::reinterpret_borrow<py::object>(dicts->data[i]);
    // Kept only when all of it could be read: a value that is refused must be found again.
    Group fresh;
    GroupRow row;
    read(i, dict.ptr(), fresh, row);
    if (row.variant != rows_[i].variant || fresh.capturable != group.capturable ||
        fresh.is_read_as_dict != group.is_read_as_dict) {
      return false;
    }
    fresh.members.swap(group.members);
    group = std::move(fresh);
    rows_[i] = row;
  }
  return true;
}

bool Groups::hold(PyObject* param_groups) const {
  const auto dicts = items_of(param_groups);
  if (!dicts || dicts->size != groups_.size()) return false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    PyObject* const dict = dicts->data[i];
    if (!PyDict_Check(dict)) return false;
    PyObject* params = group.params;
    if (!group.guard.unchanged(dict)) {
      params = params_of(dict);
      if (params == nullptr) return false;
      if (group.device_lr != nullptr && lr_of(dict) != group.device_lr) return false;
    }
    const auto members = items_of(params);
    if (!members || members->size != group.members.size() ||
        !std::equal(group.members.begin(), group.members.end(), members->data)) {
      return false;
    }
  }
  return true;
}

std::vector<PyObject*> Groups::device_lrs() const {
  std::vector<PyObject*> lrs;
  for (const Group& group : groups_) {
    if (group.device_lr != nullptr) lrs.push_back(group.device_lr);
  }
  return lrs;
}

struct Groups::Reader {
  size_t index;
  PyObject* dict;
  bool holds_mutable = false;

  std::string what(PyObject* name) const {
    return "'" + text_of(name) + "' of param group " + std::to_string(index);
  }

  // What stands at a key, or at an item of what stands there. Kept alive while it is read.
  py::object find(const Key& key) {
    PyObject* const found = fusedopt::find(dict, key.name);
    if (found == nullptr) {
      if (is_optional(key.name)) return {};
      throw py::key_error("param group " + std::to_string(index) + " has no '" + text_of(key.name) +
                          "'; add groups with add_param_group, which fills in the defaults");
    }
    auto value = py::reinterpret_borrow<py::object>(found);
    if (key.index < 0) return value;
    holds_mutable |= !PyTuple_Check(value.ptr());
    py::object element;
    if (PyObject_Size(value.ptr()) == 2) {
      element = py::reinterpret_steal<py::object>(
          PyObject_GetItem(value.ptr(), py::int_(key.index).ptr()));
    }
    if (!element) {
      PyErr_Clear();
      throw py::type_error(what(key.name) + " is " + py::repr(value).cast<std::string>() +
                           "; expected 2 numbers");
    }
    return element;
  }

  double number(const Key& key) {
    return key.is_flag ? flag(key) : number(find(key).ptr(), key.name);
  }

  double number(PyObject* value, PyObject* name) {
    if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
    holds_mutable |= !is_plain_number(value);
    return to_double(value, what(name));
  }

  // Truth as Python has it, and so torch: None is false.
  bool flag(const Key& key) {
    const py::object value = find(key);
    if (!value || value.is_none()) return false;
    holds_mutable |= !is_plain_number(value.ptr());
    const int truth = PyObject_IsTrue(value.ptr());
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
  }

  double limit(PyObject* name) {
    PyObject* const found = fusedopt::find(dict, name);
    if (found == nullptr || found == Py_None) return INFINITY;
    const auto value = py::reinterpret_borrow<py::object>(found);
    const double limit = number(value.ptr(), name);
    if (!(limit > 0.0)) {
      throw py::value_error(what(name) + " is " + std::to_string(limit) +
                            "; expected a number above 0, or None for no limit");
    }
    return limit;
  }
};

void Groups::read(size_t index, PyObject* dict, Group& group, GroupRow& row) const {
  static PyObject* const kMaxValue = intern("max_grad_value");
  static PyObject* const kMaxNorm = intern("max_grad_norm_per_param");
  row = {};
  // Armed first, so that what is written while numbers are read counts as a change.
  group.guard.arm(dict);
  group.params = params_of(dict);
  Reader reader{index, dict};
  PyObject* const lr_object = device_.is_cpu() ? nullptr : lr_of(dict);
  const at::Tensor* const lr = lr_object == nullptr ? nullptr : as_tensor(lr_object);
  if (lr != nullptr && lr->device() == device_ && lr->numel() == 1 && dtype_of(*lr)) {
    row.lr = lr->const_data_ptr();
    row.lr_type = *dtype_of(*lr);
    group.device_lr = lr_object;
    reader.holds_mutable = true;
  }
  // Every rule's first number is the learning rate.
  for (size_t k = row.lr == nullptr ? 0 : 1; k < hyper_.size(); ++k) {
    row.hyper[k] = reader.number(hyper_[k]);
  }
  for (size_t k = 0; k < variants_.size(); ++k) {
    if (reader.flag(variants_[k])) row.variant |= 1 << k;
  }
  group.is_read_as_dict =
      Py_TYPE(dict)->tp_as_mapping->mp_subscript == PyDict_Type.tp_as_mapping->mp_subscript;
  group.capturable = reader.flag({capturable(), -1, true});
  row.max_grad_value = reader.limit(kMaxValue);
  row.max_grad_norm_per_param = reader.limit(kMaxNorm);
  group.holds_mutable = reader.holds_mutable;
}

}  // namespace fusedopt
