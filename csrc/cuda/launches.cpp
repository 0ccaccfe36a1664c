// Sorts the rows and pieces of a table into launches, and finds their kernels.
#include "cuda/launches.h"

#include <algorithm>
#include <iterator>

#include "core/rule_info.h"
#include "cuda/types.h"

namespace fusedopt::cuda {

#define FUSEDOPT_RULE(name) ApplyKernel apply_kernel_of_##name(int variant, int combo);
#include "rules_list.inc"
#undef FUSEDOPT_RULE

namespace {

// In the order of all_rules().
constexpr ApplyKernel (*kApplyKernels[])(int variant, int combo) = {
#define FUSEDOPT_RULE(name) apply_kernel_of_##name,
#include "rules_list.inc"
#undef FUSEDOPT_RULE
};

const RuleInfo& info_of(size_t rule) { return all_rules().begin()[rule]; }

int combo_of(size_t rule, int variant, const TensorRow& row) {
  int states = 0;
  for (const rules::StateName& state : info_of(rule).states) {
    states += (state.variant_bit & variant) == state.variant_bit;
  }
  return find_combo(row, states);
}

std::string describe(size_t rule, int variant, int combo) {
  const TypeCombo& types = kTypeCombos[combo];
  return std::string("the ") + info_of(rule).name + " kernel (variant " + std::to_string(variant) +
         ", parameters " + name_of(types.param) + ", gradients " + name_of(types.grad) +
         ", states " + name_of(types.state) + ")";
}

}  // namespace

bool serves(size_t rule, int variant, const TensorRow& row) {
  return combo_of(rule, variant, row) >= 0;
}

Launches cut_launches(size_t rule, const Table& table) {
  // The kernel of a row, as one number by which rows are sorted; -1: none.
  std::vector<int> keys(table.tensor_count, -1);
  Launches result;
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    const TensorRow& row = table.tensors[i];
    const int variant = table.groups[row.group].variant;
    const int combo = combo_of(rule, variant, row);
    if (combo < 0) continue;
    keys[i] = variant * kTypeComboCount + combo;
    result.rows.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(result.rows.begin(), result.rows.end(),
                   [&](int32_t a, int32_t b) { return keys[a] < keys[b]; });
  std::copy_if(table.pieces, table.pieces + table.piece_count, std::back_inserter(result.pieces),
               [&](const Piece& piece) { return keys[piece.tensor] >= 0; });
  std::stable_sort(result.pieces.begin(), result.pieces.end(),
                   [&](const Piece& a, const Piece& b) { return keys[a.tensor] < keys[b.tensor]; });

  result.first_piece.resize(table.tensor_count);
  result.piece_counts.resize(table.tensor_count);
  for (size_t i = 0; i < result.pieces.size(); ++i) {
    const int32_t tensor = result.pieces[i].tensor;
    if (result.piece_counts[tensor]++ == 0) result.first_piece[tensor] = static_cast<int64_t>(i);
  }
  const auto row_count = static_cast<int64_t>(result.rows.size());
  for (int64_t row = 0, piece = 0; row < row_count;) {
    const int key = keys[result.rows[row]];
    const int variant = key / kTypeComboCount;
    const int combo = key % kTypeComboCount;
    Launch launch{
        kApplyKernels[rule](variant, combo), describe(rule, variant, combo), row, 0, piece, 0};
    for (; row < row_count && keys[result.rows[row]] == key; ++row) {
      piece += result.piece_counts[result.rows[row]];
    }
    launch.row_count = row - launch.first_row;
    launch.piece_count = piece - launch.first_piece;
    result.launches.push_back(std::move(launch));
  }
  return result;
}

}  // namespace fusedopt::cuda
