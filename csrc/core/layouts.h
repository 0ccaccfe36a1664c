// The layouts of a table's rows on their way to where the kernels read them.
#pragma once

#include <vector>

#include "core/table.h"

namespace fusedopt {

// Those of all rows, one behind the other.
inline std::vector<int64_t> collect_layouts(const TensorRow* rows, int64_t count) {
  std::vector<int64_t> words;
  for (const TensorRow* row = rows; row < rows + count; ++row) {
    if (row->layout == nullptr) continue;
    words.insert(words.end(), row->layout, row->layout + Layout::words(Layout::ndim(row->layout)));
  }
  return words;
}

// Lets the rows find their layouts at `layouts`, where what collect_layouts gathered is or will be.
inline void point_to_layouts(TensorRow* rows, int64_t count, const int64_t* layouts) {
  for (TensorRow* row = rows; row < rows + count; ++row) {
    if (row->layout == nullptr) continue;
    const int64_t words = Layout::words(Layout::ndim(row->layout));
    row->layout = layouts;
    layouts += words;
  }
}

}  // namespace fusedopt
