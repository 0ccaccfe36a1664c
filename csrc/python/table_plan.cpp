#include "python/table_plan.h"

#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>

#include "python/tensors.h"

namespace fusedopt {
namespace {

// kernels/table.py's group row, beside csrc/core/table.h's.
constexpr size_t kLr = kMaxHyper + 2;
constexpr size_t kLrType = kLr + 1;
constexpr size_t kGroupWords = kLrType + 1;

int64_t address_of(const void* pointer) { return reinterpret_cast<int64_t>(pointer); }

void encode_group(const GroupRow& group, int64_t* words) {
  static_assert(sizeof(group.hyper) == kMaxHyper * sizeof(int64_t));
  std::memcpy(words, group.hyper, sizeof(group.hyper));
  std::memcpy(words + kMaxHyper, &group.max_grad_value, sizeof(int64_t));
  std::memcpy(words + kMaxHyper + 1, &group.max_grad_norm_per_param, sizeof(int64_t));
  words[kLr] = address_of(group.lr);
  words[kLrType] = group.lr == nullptr ? 0 : static_cast<int64_t>(group.lr_type);
}

// Pieces are cut in Python: here a tensor is one.
constexpr int32_t kWholeTensor = INT32_MAX;

}  // namespace

TablePlan::TablePlan(const std::string& rule, c10::Device device, const py::list& slots,
                     const py::object& param_groups, const py::dict& state)
    : Plan(rule, device, slots, param_groups, state, kWholeTensor) {
  for (size_t i = 0; i < Plan::rows().size(); ++i) {
    if (has_state(i)) described_.push_back(i);
  }
  wanted_.resize(groups().rows().size() * kGroupWords + described_.size());
}

py::list TablePlan::rows() const {
  py::list all;
  for (const size_t index : described_) all.append(describe_row(index));
  return all;
}

py::tuple TablePlan::describe_row(size_t index) const {
  const TensorRow& row = Plan::rows()[index];
  const int variant = variant_of(row);
  py::list states, layout, types;
  types.append(scalar_type_of(row.param.type));
  types.append(scalar_type_of(row.grad.type));
  for (const rules::StateName& name : all_rules().data[rule_index()].states) {
    if ((name.variant_bit & variant) != name.variant_bit) continue;
    const size_t k = states.size();
    states.append(address_of(row.state[k].data));
    types.append(scalar_type_of(row.state[k].type));
  }
  if (row.layout != nullptr) {
    const int64_t* const end = row.layout + Layout::words(Layout::ndim(row.layout));
    for (const int64_t* word = row.layout; word < end; ++word) layout.append(*word);
  }
  return py::make_tuple(address_of(row.param.data), py::tuple(states), address_of(row.step),
                        scalar_type_of(row.step_type), py::tuple(layout), row.numel, row.group,
                        variant, py::tuple(types));
}

std::pair<size_t, size_t> TablePlan::write(const py::buffer& words) {
  const py::buffer_info info = words.request(/*writable=*/true);
  if (info.itemsize != sizeof(int64_t) || info.ndim != 1 ||
      info.size < static_cast<py::ssize_t>(wanted_.size())) {
    throw py::value_error("words has " + std::to_string(info.size) + " items of " +
                          std::to_string(info.itemsize) + " bytes; expected at least " +
                          std::to_string(wanted_.size()) + " of 8 in one dimension");
  }
  int64_t* to = wanted_.data();
  for (const GroupRow& group : groups().rows()) {
    encode_group(group, to);
    to += kGroupWords;
  }
  for (const size_t index : described_) *to++ = address_of(Plan::rows()[index].grad.data);

  int64_t* const held = static_cast<int64_t*>(info.ptr);
  const auto first = std::mismatch(wanted_.begin(), wanted_.end(), held).first - wanted_.begin();
  size_t last = wanted_.size();
  if (static_cast<size_t>(first) == last) return {0, 0};
  while (wanted_[last - 1] == held[last - 1]) --last;
  std::copy(wanted_.begin() + first, wanted_.begin() + last, held + first);
  return {first, last};
}

}  // namespace fusedopt
