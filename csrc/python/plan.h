// The step plan: everything about a step that does not change from step to step, for the parameters
// of one optimizer that one backend serves on one device. Built once, re-validated cheaply every
// step; the backends derive from it (native_plan.h, table_plan.h).
//
// A plan keeps nothing of the optimizer's alive between steps, and no Python object at all: what it
// holds are borrowed pointers, which it compares with what param_groups and state hold by then,
// before it follows any of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "core/rule_info.h"
#include "core/table.h"
#include "python/dict_guard.h"
#include "python/groups.h"
#include "python/watched.h"

namespace fusedopt {

// What a step needs from Python before it can run. `rebuild`: the plan no longer describes the
// optimizer and is of no further use. `missing`: parameters with a gradient and without state.
// `foreign`: parameters whose gradient no kernel reads in this step (sparse, or in memory that the
// step writes); left out of it.
struct Attention {
  bool rebuild = false;
  std::vector<py::object> missing;
  std::vector<py::object> foreign;
};

class Plan {
 public:
  // slots: a list of (index of the param group, parameter, counter or None where the state has
  // none), in the order of the parameters. param_groups and state are the optimizer's own.
  // piece_length: how many elements make a unit of work.
  Plan(const std::string& rule, c10::Device device, const py::list& slots,
       const py::object& param_groups, const py::dict& state, int32_t piece_length);
  virtual ~Plan() = default;

  // Re-validates everything and takes in this step's gradients and hyperparameters. Nothing when
  // the step can run as it is. Raises for a gradient or a state that does not fit its parameter.
  // Changes nothing but the plan. What it found is valid until Python code runs; to go on with it
  // after that, `hold` it.
  virtual std::optional<Attention> begin(const py::object& param_groups, const py::object& state);

  // Keeps the memory of a step that has begun alive, whatever becomes of the tensors, until
  // `release`. Raises when it is held already: a step inside of a step.
  void hold();
  void release();

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
  // How many elements all rows have.
  int64_t numel() const { return numel_; }
  // Tells autograd that this step wrote parameters and states. While the step is held, or before
  // any Python code runs.
  void bump_versions() const;
  // Raises unless the step is held.
  void require_held() const;

 private:
  struct Slot {
    // The parameter, then its states and scalars, then its counter if that is the state's.
    size_t first_watched = 0;
    int32_t watched_count = 0;
    int32_t state_count = 0;
    bool ready = false;  // its state exists
    bool dense = false;  // parameter and states lie densely in the same order
    // Of the gradient before: one like it needs no further look. -1: of none that a kernel read.
    int32_t grad_geometry = -1;
    const void* gradient_place = nullptr;  // only to prefetch
    PyObject* state = nullptr;
    PyObject* step = nullptr;  // the state's, which is the counter; null: it has none
    DictGuard guard;
  };

  const Watched& param_of(const Slot& slot) const { return watched_[slot.first_watched]; }
  size_t watched_end(const Slot& slot) const { return slot.first_watched + slot.watched_count; }
  void watch(Slot& slot, PyObject* tensor);

  void add_slot(size_t index, const py::tuple& slot, PyObject* state);
  bool adopt_states(size_t index);
  bool adopt_scalars(size_t index);
  void check_state(size_t index) const;
  bool wants_state(size_t name, size_t index) const;
  bool state_dict_holds(PyObject* state);
  bool slot_holds(size_t index);
  bool state_holds(size_t index);
  const at::Tensor& grad_of(size_t index) const;
  void prefetch(size_t index) const;
  bool take_gradient(size_t index, const at::Tensor& grad);
  bool take_new_gradient(size_t index, const at::Tensor& grad);
  bool writes_grad(size_t index);
  void cut_pieces(int32_t piece_length);
  py::object object_of(size_t index) const;
  std::string name_of(size_t index) const;

  size_t rule_index_;
  const RuleInfo* rule_;
  c10::Device device_;
  Groups groups_;
  int64_t numel_ = 0;
  DictGuard state_guard_;
  std::vector<std::pair<PyObject*, PyObject*>> state_entries_;  // of the state, in its order
  // Interned, as the rule names them: states, then scalars.
  std::vector<PyObject*> state_names_;
  Geometries geometries_;
  std::vector<Watched> watched_;
  PointerFilter written_storages_{0};
  std::vector<Slot> slots_;
  std::vector<std::vector<int64_t>> layouts_;
  std::vector<at::Tensor> hidden_counters_;  // those that no state holds
  std::vector<TensorRow> rows_;
  std::vector<Piece> pieces_;
  uint64_t rows_version_ = 0;
  // The bytes that steps write, in order; made when a gradient first seems to be among them.
  std::vector<std::pair<const char*, const char*>> written_;
  bool is_held_ = false;
  std::vector<at::Tensor> held_;
  std::vector<c10::Storage> held_storages_;
};

// Holds a plan's step for a scope.
class Held {
 public:
  explicit Held(Plan& plan) : plan_(plan) { plan_.hold(); }
  ~Held() { plan_.release(); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

 private:
  Plan& plan_;
};

}  // namespace fusedopt
