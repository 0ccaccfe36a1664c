// Sorts the rows and pieces of a table into launches, and finds their kernels.
#include "cuda/launches.h"

#include <algorithm>

#include "core/rule_info.h"
#include "cuda/types.h"

namespace fusedopt::cuda {

#define FUSEDOPT_RULE(name) ApplyKernel apply_kernel_of_##name(int variant, int kernel);
#include "rules_list.inc"
#undef FUSEDOPT_RULE

namespace {

// In the order of all_rules().
constexpr ApplyKernel (*kApplyKernels[])(int variant, int kernel) = {
#define FUSEDOPT_RULE(name) apply_kernel_of_##name,
#include "rules_list.inc"
#undef FUSEDOPT_RULE
};

const RuleInfo& info_of(size_t rule) { return all_rules().begin()[rule]; }

int kernel_of(size_t rule, int variant, const TensorRow& row) {
  int states = 0;
  for (const rules::StateName& state : info_of(rule).states) {
    states += (state.variant_bit & variant) == state.variant_bit;
  }
  return find_kernel(row, states);
}

std::string describe(size_t rule, int variant, int kernel) {
  std::string types = kernel == kMixedFloat64 ? "float64" : "float32";
  types += " arithmetic, mixed types";
  if (kernel < kMixedFloat32) {
    const TypeCombo& usual = kUsualTypes[kernel];
    types = std::string("parameters ") + name_of(usual.param) + ", gradients " +
            name_of(usual.grad) + ", states " + name_of(usual.state);
  }
  return std::string("the ") + info_of(rule).name + " kernel (variant " + std::to_string(variant) +
         ", " + types + ")";
}

}  // namespace

Launches cut_launches(size_t rule, const Table& table) {
  // The kernel of a row, as one number by which rows are sorted.
  std::vector<int> keys(table.tensor_count);
  Launches result;
  result.rows.resize(table.tensor_count);
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    const TensorRow& row = table.tensors[i];
    const int variant = table.groups[row.group].variant;
    keys[i] = variant * kKernelCount + kernel_of(rule, variant, row);
    result.rows[i] = static_cast<int32_t>(i);
  }
  std::stable_sort(result.rows.begin(), result.rows.end(),
                   [&](int32_t a, int32_t b) { return keys[a] < keys[b]; });
  result.pieces.assign(table.pieces, table.pieces + table.piece_count);
  std::stable_sort(result.pieces.begin(), result.pieces.end(),
                   [&](const Piece& a, const Piece& b) { return keys[a.tensor] < keys[b.tensor]; });

  result.first_piece.resize(table.tensor_count);
  result.piece_counts.resize(table.tensor_count);
  for (size_t i = 0; i < result.pieces.size(); ++i) {
    const int32_t tensor = result.pieces[i].tensor;
    if (result.piece_counts[tensor]++ == 0) result.first_piece[tensor] = static_cast<int64_t>(i);
  }
  for (int64_t row = 0, piece = 0; row < table.tensor_count;) {
    const int key = keys[result.rows[row]];
    const int variant = key / kKernelCount;
    const int kernel = key % kKernelCount;
    Launch launch{
        kApplyKernels[rule](variant, kernel), describe(rule, variant, kernel), row, 0, piece, 0};
    for (; row < table.tensor_count && keys[result.rows[row]] == key; ++row) {
      piece += result.piece_counts[result.rows[row]];
    }
    launch.row_count = row - launch.first_row;
    launch.piece_count = piece - launch.first_piece;
    result.launches.push_back(std::move(launch));
  }
  return result;
}

}  // namespace fusedopt::cuda
