#include "python/table_plan.h"

#include <algorithm>

#include "core/layouts.h"
#include "core/step_words.h"

namespace fusedopt {
namespace {

// Pieces are cut in Python: here a tensor is one.
constexpr int32_t kWholeTensor = INT32_MAX;

template <typename T>
py::bytes as_bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

}  // namespace

TablePlan::TablePlan(const std::string& rule, c10::Device device, const py::list& slots,
                     const py::object& param_groups, const py::dict& state)
    : Plan(rule, device, slots, param_groups, state, kWholeTensor),
      wanted_(groups().rows().size() * kGroupWords + Plan::rows().size()) {}

py::bytes TablePlan::layouts() const {
  const auto& rows = Plan::rows();
  return as_bytes(collect_layouts(rows.data(), static_cast<int64_t>(rows.size())));
}

py::bytes TablePlan::rows(uintptr_t layouts) const {
  std::vector<TensorRow> rows = Plan::rows();
  point_to_layouts(rows.data(), static_cast<int64_t>(rows.size()),
                   reinterpret_cast<const int64_t*>(layouts));
  return as_bytes(rows);
}

std::pair<size_t, size_t> TablePlan::write(const py::buffer& words) {
  const py::buffer_info info = words.request(/*writable=*/true);
  if (info.itemsize != sizeof(int64_t) || info.ndim != 1 ||
      info.size < static_cast<py::ssize_t>(wanted_.size())) {
    throw py::value_error("words has " + std::to_string(info.size) + " items of " +
                          std::to_string(info.itemsize) + " bytes; expected at least " +
                          std::to_string(wanted_.size()) + " of 8 in one dimension");
  }
  const auto& group_rows = groups().rows();
  write_step_words(group_rows.data(), group_rows.size(), Plan::rows().data(), wanted_);
  int64_t* const held = static_cast<int64_t*>(info.ptr);
  const auto [first, last] = difference(wanted_, held);
  std::copy(wanted_.begin() + first, wanted_.begin() + last, held + first);
  return {first, last};
}

}  // namespace fusedopt
