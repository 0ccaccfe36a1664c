// Reads param_groups: the structure (which parameters, in which groups) that a plan was built for,
// and the hyperparameters, which any scheduler may change before any step. Keeps none of it alive.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "core/rule_info.h"
#include "core/table.h"
#include "python/dict_guard.h"

namespace fusedopt {

namespace py = pybind11;

class Groups {
 public:
  // param_groups: a list or tuple of dicts.
  Groups(const RuleInfo& rule, c10::Device device, const py::object& param_groups);

  // Re-reads the numbers that changed, which may run Python code and so change anything. False when
  // a variant, `capturable` or the kind of dict is another: the plan must be built again.
  bool refresh(PyObject* param_groups);

  // Whether the groups have the same parameters, and learning rates on the device are where
  // `refresh` found them. Runs no Python code: while it holds, all members are alive.
  bool hold(PyObject* param_groups) const;

  const std::vector<GroupRow>& rows() const { return rows_; }
  const std::vector<PyObject*>& members(size_t group) const { return groups_[group].members; }
  // The learning rates on the device; alive while `hold` says so.
  std::vector<PyObject*> device_lrs() const;

 private:
  // Borrowed pointers, for comparison with what is alive.
  struct Group {
    PyObject* params = nullptr;
    std::vector<PyObject*> members;
    PyObject* device_lr = nullptr;
    DictGuard guard;
    // What they were when the plan was made. A type of the user's own may return other things than
    // the dict holds: parameters in such a group take torch's rules.
    bool capturable = false;
    bool is_read_as_dict = true;
    bool holds_mutable = false;  // values that change in place: read them every step
  };
  struct Key {
    PyObject* name;  // interned, owned for ever: there is one set a rule
    int index;       // into a sequence (betas), or -1
    bool is_flag;
  };
  // A group while its numbers are read.
  struct Reader;

  void read(size_t index, PyObject* dict, Group& group, GroupRow& row) const;

  static std::vector<Key> make_keys(const Span<const char*>& names);

  c10::Device device_;
  std::vector<Key> hyper_;
  std::vector<Key> variants_;
  std::vector<Group> groups_;
  std::vector<GroupRow> rows_;
};

// Raises ValueError naming `what` unless the tensor has one element.
void check_one_element(const at::Tensor& tensor, const std::string& what);

// A Python number or 1-element tensor as a double. Raises TypeError or ValueError naming `what`.
double to_double(PyObject* value, const std::string& what);

}  // namespace fusedopt
