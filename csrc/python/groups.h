// Reads param_groups: the structure (which parameters, in which groups) that a plan was built for,
// and the hyperparameters, which any scheduler may change before any step.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/rule_info.h"
#include "core/table.h"
#include "python/dict_guard.h"

namespace fusedopt {

namespace py = pybind11;

class Groups {
 public:
  Groups(const RuleInfo& rule, c10::Device device, const py::list& param_groups);

  // Re-reads what changed. False when the structure or a variant is another: the plan must be built
  // again.
  bool refresh(PyObject* param_groups);

  const std::vector<GroupRow>& rows() const { return rows_; }
  const std::vector<PyObject*>& members(size_t group) const { return groups_[group].members; }

 private:
  struct Group {
    py::dict dict;
    py::list params;
    std::vector<PyObject*> members;  // borrowed: `params`, or the plan that owns us, keeps them
    DictGuard guard;
    bool holds_mutable;  // tensors or lists, which change in place: read them every step
  };
  struct Key {
    PyObject* name;  // interned, owned for ever: there is one set a rule
    int index;       // into a sequence (betas), or -1
  };

  GroupRow read_row(size_t index);
  double read_number(size_t index, const Key& key);
  double read_limit(size_t index, PyObject* name);
  PyObject* lookup(size_t index, PyObject* name, bool required);

  static std::vector<Key> make_keys(const Span<const char*>& names);

  c10::Device device_;
  std::vector<Key> hyper_;
  std::vector<Key> variants_;
  std::vector<Group> groups_;
  std::vector<GroupRow> rows_;
};

// Raises ValueError naming `what` unless the tensor has one element.
void check_one_element(const at::Tensor& tensor, const std::string& what);

// A Python number or 1-element tensor as a double; sets `is_tensor` for the latter. Raises
// TypeError naming `what`.
double to_double(PyObject* value, const std::string& what, bool& is_tensor);

}  // namespace fusedopt
