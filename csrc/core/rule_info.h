// What the plan must know of a rule: the names in its group rows and its state. Taken from the rule
// headers, for all rules.
#pragma once

#include <cstddef>

#include "core/table.h"
#include "rules/common.h"

namespace fusedopt {

template <typename T>
struct Span {
  const T* data;
  size_t size;
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

struct RuleInfo {
  const char* name;
  Span<const char*> hyper;     // group keys; "betas.0" is element 0 of "betas"
  Span<const char*> variants;  // bit i of a variant is the truth of the i-th of these group keys
  Span<rules::StateName> states;
  Span<const char*> scalars;
  // Advances the scalars of all rows with a gradient, on the host and before their counters. Null:
  // the rule has none.
  void (*advance_scalars)(const Table& table);
};

// All rules, in the order of every per-rule array.
Span<RuleInfo> all_rules();

}  // namespace fusedopt
