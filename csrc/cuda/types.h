// The combinations of number types that have kernels, in the order of the kernel tables.
#pragma once

#include "core/table.h"

namespace fusedopt::cuda {

struct TypeCombo {
  DType param;
  DType grad;
  DType state;
};

constexpr TypeCombo kTypeCombos[] = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat32},
    {DType::kFloat64, DType::kFloat64, DType::kFloat64},
    {DType::kFloat16, DType::kFloat16, DType::kFloat16},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16},
    {DType::kFloat32, DType::kFloat16, DType::kFloat32},
    {DType::kFloat32, DType::kBFloat16, DType::kFloat32},
    {DType::kFloat16, DType::kFloat16, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16, DType::kFloat32},
};
constexpr int kTypeComboCount = sizeof(kTypeCombos) / sizeof(kTypeCombos[0]);

// The combo of a row with `states` states, or -1. A row without states counts as one whose states
// have the parameter's type.
constexpr int find_combo(const TensorRow& row, int states) {
  const DType state = states == 0 ? row.param_type : row.state_type[0];
  for (int k = 1; k < states; ++k) {
    if (row.state_type[k] != state) return -1;
  }
  for (int i = 0; i < kTypeComboCount; ++i) {
    const TypeCombo& combo = kTypeCombos[i];
    if (combo.param == row.param_type && combo.grad == row.grad_type && combo.state == state) {
      return i;
    }
  }
  return -1;
}

constexpr const char* name_of(DType type) {
  switch (type) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

}  // namespace fusedopt::cuda
