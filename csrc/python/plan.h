// The step plan: everything about a step that does not change from step to step, for the parameters
// of one optimizer that one backend serves on one device. Built once, re-validated cheaply every
// step; the backends derive from it (native_plan.h, table_plan.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "core/rule_info.h"
#include "core/table.h"
#include "python/dict_guard.h"
#include "python/groups.h"

namespace fusedopt {

// What a step needs from Python before it can run. `rebuild`: the plan no longer describes the
// optimizer and is of no further use. `missing`: parameters with a gradient and without state.
// `foreign`: parameters whose gradient no kernel reads in this step (sparse); left out of it.
struct Attention {
  bool rebuild = false;
  py::list missing;
  py::list foreign;
};

class Plan {
 public:
  // slots: a list of (index of the param group, parameter, counter), in the order of the
  // parameters. param_groups and state are the optimizer's own. piece_length: how many elements
  // make a unit of work.
  Plan(const std::string& rule, c10::Device device, const py::list& slots,
       const py::list& param_groups, const py::dict& state, int32_t piece_length);
  virtual ~Plan() = default;

  // Re-validates everything and takes in this step's gradients and hyperparameters. Nothing when
  // the step can run as it is. Raises for a gradient that does not fit its parameter. Changes
  // nothing but the plan.
  virtual std::optional<Attention> begin(const py::list& param_groups, const py::dict& state);

 protected:
  Table table() const;
  const std::vector<Piece>& pieces() const { return pieces_; }
  const std::vector<TensorRow>& rows() const { return rows_; }
  const Groups& groups() const { return groups_; }
  size_t rule_index() const { return rule_index_; }
  int variant_of(const TensorRow& row) const { return groups_.rows()[row.group].variant; }
  // Whether a step with these settings needs the reduce pass.
  bool needs_reduce(std::optional<double> max_grad_norm, bool skip_nonfinite) const;
  // How often a row has changed in more than its gradient pointer: in the gradient's type or
  // layout.
  uint64_t rows_version() const { return rows_version_; }
  // Whether the backend has a kernel for the types of this row.
  virtual bool serves(const TensorRow& /*row*/) const { return true; }
  // Whether the state of a row exists; without, the row describes no more than its parameter.
  bool has_state(size_t index) const { return slots_[index].ready; }
  // Whether the row's gradient type means anything yet.
  bool has_seen_gradient(size_t index) const { return slots_[index].grad_seen; }

 private:
  // A tensor that a row points into, with what must not change under it.
  struct Watched {
    const c10::TensorImpl* impl = nullptr;
    const void* data = nullptr;
    uint64_t shape = 0;

    Watched() = default;
    explicit Watched(const at::Tensor& tensor);
    bool unchanged() const;
  };

  // What the validation of a parameter touches in every step, kept small.
  struct Slot {
    std::array<Watched, 1 + kMaxStates> watched;  // the parameter, its states
    int32_t watched_count = 0;
    bool ready = false;  // its state exists
    bool dense = false;  // parameter and states lie densely in the same order
    bool grad_seen = false;
    caffe2::TypeMeta grad_dtype;
    c10::DispatchKeySet grad_keys;  // of the gradient before: one like it needs no further look
    const c10::TensorImpl* counter = nullptr;
    const c10::StorageImpl* counter_storage = nullptr;
    PyObject* state = nullptr;
    DictGuard guard;
  };

  // What belongs to a slot and is rarely looked at. Keeps everything alive that slot and row point
  // to.
  struct Owned {
    py::object param_object;
    at::Tensor param;
    py::object counter_object;
    c10::Storage counter_storage;
    py::object state;
    std::vector<py::object> state_objects;
    std::vector<int64_t> layout;
  };

  void prefetch(size_t index) const;
  void adopt_state(size_t index);
  bool wants_state(size_t name, size_t index) const;
  bool state_dict_holds();
  bool slot_holds(size_t index);
  bool state_holds(size_t index);
  bool take_gradient(size_t index, const at::Tensor& grad);
  bool take_new_gradient(size_t index, const at::Tensor& grad);
  void cut_pieces(int32_t piece_length);
  std::string name_of(size_t index) const;

  size_t rule_index_;
  const RuleInfo* rule_;
  c10::Device device_;
  Groups groups_;
  py::dict state_;
  std::vector<std::pair<PyObject*, PyObject*>> state_entries_;  // of state_, in its order
  std::vector<PyObject*> state_names_;                          // interned, as the rule names them
  std::vector<Slot> slots_;
  std::vector<Owned> owned_;
  std::vector<TensorRow> rows_;
  std::vector<Piece> pieces_;
  DictGuard state_guard_;
  uint64_t rows_version_ = 0;
};

}  // namespace fusedopt
