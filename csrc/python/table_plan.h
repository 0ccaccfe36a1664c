// The step plan of kernels that are not in this extension: it describes the step, as core/table.h
// has it, to kernels/plan.py, which owns the memory and the launches.
#pragma once

#include <utility>
#include <vector>

#include "python/plan.h"

namespace fusedopt {

class TablePlan : public Plan {
 public:
  TablePlan(const std::string& rule, c10::Device device, const py::list& slots,
            const py::object& param_groups, const py::dict& state);

  // The layouts of all rows, and the rows once it is known where those stand: bytes. Good until
  // rows_version is another.
  py::bytes layouts() const;
  py::bytes rows(uintptr_t layouts) const;

  // Brings int64 words up to the step that began last (core/step_words.h). Returns [first, last) of
  // those that changed, (0, 0) when none did. What stands behind them in `words` stays.
  std::pair<size_t, size_t> write(const py::buffer& words);

  using Plan::bump_versions;
  using Plan::needs_reduce;
  using Plan::rows_version;

 private:
  std::vector<int64_t> wanted_;  // this step's words
};

}  // namespace fusedopt
