// Follows every pointer that a kernel is given, before it runs, as the kernel would.
#include "core/table.h"
#include "cuda/kernels.h"
#include "internal.h"

namespace emulation {
namespace {

using namespace fusedopt;

// Gathers the first thing that is wrong.
class Check {
 public:
  explicit Check(int device) : device_(device) {}

  // Whether [data, data + size) may be read and written. Null is right where it is optional.
  bool memory(const char* name, const void* data, int64_t size, bool optional = false) {
    if (!wrong_.empty()) return false;
    if (size == 0 || (data == nullptr && optional)) return false;
    const std::string problem = check_memory(Memory::kDevice, data, size, device_);
    if (!problem.empty()) wrong_ = problem + " as " + name;
    return problem.empty();
  }

  void inputs(const cuda::StepInputs& inputs) {
    memory("grad_scale", inputs.grad_scale, sizeof(float), true);
    memory("unscale", inputs.unscale, sizeof(double), true);
    memory("found_inf", inputs.found_inf, sizeof(float), true);
  }

  // A tensor that takes part in the step, and its group.
  void row(const cuda::DeviceTable& table, int64_t index) {
    if (!memory("the rows", table.tensors + index, sizeof(TensorRow)) ||
        !memory("the gradients' addresses", table.grads + index, sizeof(void*)) ||
        table.grads[index] == nullptr) {
      return;
    }
    const TensorRow& row = table.tensors[index];
    memory("a counter", row.step, size_of(row.step_type));
    operand("a parameter", row, 0, row.param);
    operand("a gradient", row, 1, {const_cast<void*>(table.grads[index]), row.grad.type});
    int k = 0;
    for (; k < kMaxStates && row.state[k].data != nullptr; ++k) {
      operand("a state", row, 2 + k, row.state[k]);
    }
    for (; k < kMaxStates; ++k) {
      memory("a scalar", row.state[k].data, size_of(row.state[k].type), true);
    }
    if (!memory("the groups", table.groups + row.group, sizeof(GroupRow))) return;
    const GroupRow& group = table.groups[row.group];
    memory("a learning rate", group.lr, size_of(group.lr_type), true);
  }

  const std::string& wrong() const { return wrong_; }

 private:
  void operand(const char* name, const TensorRow& row, int which, const Operand& operand) {
    if (row.numel == 0) return;
    int64_t last = row.numel - 1;
    if (row.layout != nullptr) {
      if (!memory("a layout", row.layout, 8 * Layout::words(0))) return;
      const int64_t ndim = Layout::ndim(row.layout);
      if (!memory("a layout", row.layout, 8 * Layout::words(ndim))) return;
      last = 0;
      for (int64_t d = 0; d < ndim; ++d) {
        last += (Layout::sizes(row.layout)[d] - 1) * Layout::strides(row.layout, which)[d];
      }
    }
    memory(name, operand.data, (last + 1) * size_of(operand.type));
  }

  int device_;
  std::string wrong_;
};

void check(Check& check, const cuda::ApplyParams& params) {
  check.inputs(params.inputs);
  check.memory("the pieces", params.pieces, params.piece_count * sizeof(Piece));
  check.memory("the control block", params.control, sizeof(StepControl), true);
  check.memory("the control block", params.record, sizeof(StepControl), true);
  check.memory("the ticket", params.ticket, sizeof(uint32_t));
  if (!check.memory("the list of rows", params.rows, params.row_count * sizeof(int32_t))) return;
  for (int64_t i = 0; i < params.row_count; ++i) check.row(params.table, params.rows[i]);
}

void check(Check& check, const cuda::ReduceParams& params) {
  check.inputs(params.inputs);
  check.memory("the control block", params.control, sizeof(StepControl), true);
  check.memory("the totals", params.totals, 2 * sizeof(double), true);
  check.memory("the ticket", params.ticket, sizeof(uint32_t));
  if (!check.memory("the pieces", params.pieces, params.piece_count * sizeof(Piece))) return;
  check.memory("the partial sums", params.partials, params.piece_count * sizeof(Partial));
  check.memory("the clips", params.clips, params.tensor_count * sizeof(double));
  for (int64_t i = 0; i < params.piece_count; ++i) {
    check.row(params.table, params.pieces[i].tensor);
  }
}

}  // namespace

std::string check_params(std::type_index type, const void* params, int device) {
  Check result(device);
  if (type == typeid(cuda::ApplyParams)) {
    check(result, *static_cast<const cuda::ApplyParams*>(params));
  } else if (type == typeid(cuda::ReduceParams)) {
    check(result, *static_cast<const cuda::ReduceParams*>(params));
  }
  return result.wrong();
}

}  // namespace emulation
