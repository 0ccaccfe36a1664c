#include "python/groups.h"

#include <ATen/ops/item.h>

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

// Keys that a group may lack: a checkpoint or a framework that knows nothing of them may have
// replaced it.
bool is_optional(PyObject* name) {
  static PyObject* const kDecoupled = intern("decoupled_weight_decay");
  return name == kDecoupled;
}

std::string key_text(PyObject* name) { return py::str(name).cast<std::string>(); }

// The common cases, without the text that an error would need.
bool is_plain_number(PyObject* value) {
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value);
}

}  // namespace

void check_one_element(const at::Tensor& tensor, const std::string& what) {
  if (tensor.numel() == 1) return;
  throw py::value_error(what + " is a tensor of " + std::to_string(tensor.numel()) +
                        " elements; expected a number or a tensor of one element");
}

double to_double(PyObject* value, const std::string& what, bool& is_tensor) {
  if (const at::Tensor* tensor = as_tensor(value)) {
    is_tensor = true;
    check_one_element(*tensor, what);
    return tensor->item().toDouble();
  }
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
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
      keys.push_back({intern(text), -1});
    } else {
      keys.push_back({intern(std::string(text, dot).c_str()), std::stoi(dot + 1)});
    }
  }
  return keys;
}

Groups::Groups(const RuleInfo& rule, c10::Device device, const py::list& param_groups)
    : device_(device), hyper_(make_keys(rule.hyper)), variants_(make_keys(rule.variants)) {
  for (const py::handle item : param_groups) {
    Group group{item.cast<py::dict>(), item["params"].cast<py::list>(), {}, {}, false};
    for (const py::handle param : group.params) group.members.push_back(param.ptr());
    groups_.push_back(std::move(group));
    rows_.push_back(read_row(groups_.size() - 1));
  }
}

bool Groups::refresh(PyObject* param_groups) {
  if (!PyList_Check(param_groups)) return false;
  if (static_cast<size_t>(PyList_GET_SIZE(param_groups)) != groups_.size()) return false;
  static PyObject* const kParams = intern("params");
  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    if (PyList_GET_ITEM(param_groups, i) != group.dict.ptr()) return false;
    const bool unchanged = group.guard.unchanged(group.dict.ptr());
    if (!unchanged && lookup(i, kParams, true) != group.params.ptr()) return false;

    PyObject* const list = group.params.ptr();
    if (static_cast<size_t>(PyList_GET_SIZE(list)) != group.members.size()) return false;
    for (size_t k = 0; k < group.members.size(); ++k) {
      if (PyList_GET_ITEM(list, k) != group.members[k]) return false;
    }

    if (unchanged && !group.holds_mutable) continue;
    const GroupRow row = read_row(i);
    if (row.variant != rows_[i].variant) return false;
    rows_[i] = row;
  }
  return true;
}

GroupRow Groups::read_row(size_t index) {
  static PyObject* const kLr = intern("lr");
  static PyObject* const kMaxValue = intern("max_grad_value");
  static PyObject* const kMaxNorm = intern("max_grad_norm_per_param");
  GroupRow row{};
  Group& group = groups_[index];
  group.holds_mutable = false;
  for (size_t k = 0; k < hyper_.size(); ++k) {
    const Key& key = hyper_[k];
    if (key.name == kLr && !device_.is_cpu()) {
      const at::Tensor* lr = as_tensor(lookup(index, kLr, true));
      if (lr != nullptr && lr->device() == device_ && lr->numel() == 1 && dtype_of(*lr)) {
        row.lr = lr->const_data_ptr();
        row.lr_type = *dtype_of(*lr);
        group.holds_mutable = true;
        continue;
      }
    }
    row.hyper[k] = read_number(index, key);
  }
  for (size_t k = 0; k < variants_.size(); ++k) {
    if (read_number(index, variants_[k]) != 0.0) row.variant |= 1 << k;
  }
  row.max_grad_value = read_limit(index, kMaxValue);
  row.max_grad_norm_per_param = read_limit(index, kMaxNorm);
  group.guard.arm(group.dict.ptr());
  return row;
}

PyObject* Groups::lookup(size_t index, PyObject* name, bool required) {
  PyObject* value = PyDict_GetItemWithError(groups_[index].dict.ptr(), name);
  if (value == nullptr) {
    if (PyErr_Occurred()) throw py::error_already_set();
    if (required) {
      throw py::key_error("param group " + std::to_string(index) + " has no '" + key_text(name) +
                          "'; add groups with add_param_group, which fills in the defaults");
    }
  }
  return value;
}

double Groups::read_number(size_t index, const Key& key) {
  PyObject* value = lookup(index, key.name, !is_optional(key.name));
  if (value == nullptr) return 0.0;
  py::object element;
  if (key.index >= 0) {
    if (!PyTuple_Check(value)) groups_[index].holds_mutable = true;
    element = py::reinterpret_steal<py::object>(PySequence_GetItem(value, key.index));
    if (!element) throw py::error_already_set();
    value = element.ptr();
  }
  if (is_plain_number(value)) return PyFloat_AsDouble(value);
  return to_double(value, "'" + key_text(key.name) + "' of param group " + std::to_string(index),
                   groups_[index].holds_mutable);
}

double Groups::read_limit(size_t index, PyObject* name) {
  PyObject* value = lookup(index, name, false);
  if (value == nullptr || value == Py_None) return INFINITY;
  const std::string what = "'" + key_text(name) + "' of param group " + std::to_string(index);
  const double limit = to_double(value, what, groups_[index].holds_mutable);
  if (!(limit > 0.0)) {
    throw py::value_error(what + " is " + std::to_string(limit) +
                          "; expected a number above 0, or None for no limit");
  }
  return limit;
}

}  // namespace fusedopt
