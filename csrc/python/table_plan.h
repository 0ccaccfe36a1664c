// The step plan of kernels that are not in this extension: it keeps the books and describes the
// step to kernels/plan.py, which owns the memory and the launches.
#pragma once

#include <utility>
#include <vector>

#include "python/plan.h"

namespace fusedopt {

class TablePlan : public Plan {
 public:
  TablePlan(const std::string& rule, c10::Device device, const py::list& slots,
            const py::object& param_groups, const py::dict& state);

  // A tuple for every parameter whose state exists, in the order of kernels/pieces.py's Row:
  // (param, states, step, step type, layout, numel, group, variant, types). The others would cost a
  // program each and have nothing to update. Good until rows_version is another.
  py::list rows() const;

  // Brings int64 words up to the step that began last: the group rows, each encoded as
  // kernels/table.py says, then the address of the gradient for each of rows(), 0 where there is
  // none. Returns [first, last) of the words that changed, (0, 0) when none did. What stands behind
  // them in `words` stays.
  std::pair<size_t, size_t> write(const py::buffer& words);

  using Plan::bump_versions;
  using Plan::needs_reduce;
  using Plan::rows_version;

 private:
  py::tuple describe_row(size_t index) const;

  std::vector<size_t> described_;  // the indices of rows()
  std::vector<int64_t> wanted_;    // this step's words
};

}  // namespace fusedopt
