// The kernels that a variant of a rule has: one for each usual combination of number types, and for
// all others one for each type to compute in. Their numbers here are the order of the kernel
// tables.
#pragma once

#include <algorithm>

#include "core/table.h"

namespace fusedopt::cuda {

struct TypeCombo {
  DType param;
  DType grad;
  DType state;
};

constexpr TypeCombo kUsualTypes[] = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat32},
    {DType::kFloat64, DType::kFloat64, DType::kFloat64},
    {DType::kFloat16, DType::kFloat16, DType::kFloat16},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16},
    {DType::kFloat32, DType::kFloat16, DType::kFloat32},
    {DType::kFloat32, DType::kBFloat16, DType::kFloat32},
    {DType::kFloat16, DType::kFloat16, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16, DType::kFloat32},
};
constexpr int kMixedFloat32 = sizeof(kUsualTypes) / sizeof(kUsualTypes[0]);
constexpr int kMixedFloat64 = kMixedFloat32 + 1;
constexpr int kKernelCount = kMixedFloat64 + 1;

// The kernel of a row with `states` states. One without states counts as one whose states have the
// parameter's type.
inline int find_kernel(const TensorRow& row, int states) {
  for (int i = 0; i < kMixedFloat32; ++i) {
    const TypeCombo& types = kUsualTypes[i];
    const auto fits = [&](const Operand& state) { return state.type == types.state; };
    if (types.param == row.param.type && types.grad == row.grad.type &&
        (states == 0 ? fits(row.param) : std::all_of(row.state, row.state + states, fits))) {
      return i;
    }
  }
  return computes_in_float64(row) ? kMixedFloat64 : kMixedFloat32;
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
