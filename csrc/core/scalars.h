// The scalars of a rule (rules/common.h) where a table's rows keep them: in the last of the
// operands for states, in the rule's order. Rules without any take no part in this.
#pragma once

#include "core/table.h"
#include "rules/common.h"

namespace fusedopt {

template <int kCount>
FUSEDOPT_HD rules::Scalars<kCount> load_scalars(const TensorRow& row) {
  rules::Scalars<kCount> scalars;
  for (int i = 0; i < kCount; ++i) {
    const Operand& home = row.state[kMaxStates - kCount + i];
    scalars[i].narrow = home.type == DType::kFloat32;
    scalars[i].value = scalars[i].narrow ? *static_cast<const float*>(home.data)
                                         : *static_cast<const double*>(home.data);
  }
  return scalars;
}

template <int kCount>
FUSEDOPT_HD void store_scalars(const TensorRow& row, const rules::Scalars<kCount>& scalars) {
  for (int i = 0; i < kCount; ++i) {
    const Operand& home = row.state[kMaxStates - kCount + i];
    if (scalars[i].narrow) {
      *static_cast<float*>(home.data) = static_cast<float>(scalars[i].value);
    } else {
      *static_cast<double*>(home.data) = scalars[i].value;
    }
  }
}

template <>
FUSEDOPT_HD rules::Scalars<0> load_scalars<0>(const TensorRow&) {
  return {};
}

// What a row's elements share in the step under way.
template <typename Rule, typename T>
FUSEDOPT_HD typename Rule::template Constants<T> make_constants(
    const typename Rule::Hyper& hyper, double step,
    const rules::Scalars<rules::kScalarCount<Rule>>& scalars) {
  if constexpr (rules::kScalarCount<Rule> == 0) {
    return {hyper, step};
  } else {
    return {hyper, step, scalars};
  }
}

template <int kCount>
bool same_scalars(const rules::Scalars<kCount>& a, const rules::Scalars<kCount>& b) {
  for (int i = 0; i < kCount; ++i) {
    if (a[i].value != b[i].value || a[i].narrow != b[i].narrow) return false;
  }
  return true;
}
inline bool same_scalars(const rules::Scalars<0>&, const rules::Scalars<0>&) { return true; }

}  // namespace fusedopt
