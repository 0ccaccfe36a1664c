// Collects what the rule headers say of themselves.
#include "core/rule_info.h"

#include <cstring>

#include "core/scalars.h"
#include "rules_headers.inc"

namespace fusedopt {
namespace {

template <typename Rule>
void advance_scalars(const Table& table) {
  constexpr int kCount = rules::kScalarCount<Rule>;
  const GroupRow* group = nullptr;
  double step = 0.0;
  rules::Scalars<kCount> before{}, after{};
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    const TensorRow& row = table.tensors[i];
    if (row.grad.data == nullptr) continue;
    const auto scalars = load_scalars<kCount>(row);
    // Most are like the one before.
    if (group != &table.groups[row.group] || step != next_step(row) ||
        !same_scalars(scalars, before)) {
      group = &table.groups[row.group];
      step = next_step(row);
      before = after = scalars;
      typename Rule::Hyper hyper;
      memcpy(&hyper, group->hyper, sizeof(hyper));
      Rule::advance(hyper, step, after);
    }
    store_scalars(row, after);
  }
}

template <typename Rule>
constexpr auto scalar_advance() -> void (*)(const Table&) {
  if constexpr (rules::kScalarNamesOf<Rule>.empty()) {
    return nullptr;
  } else {
    return &advance_scalars<Rule>;
  }
}

template <typename Rule>
constexpr RuleInfo describe(const char* name) {
  constexpr auto& kScalarNames = rules::kScalarNamesOf<Rule>;
  static_assert(sizeof(typename Rule::Hyper) == sizeof(double) * Rule::kHyperNames.size());
  static_assert(Rule::kHyperNames.size() <= kMaxHyper);
  static_assert(Rule::kStateNames.size() + kScalarNames.size() <=
                kMaxStates - (kScalarNames.empty() ? 0 : 1));
  static_assert(Rule::kVariants == 1 << Rule::kVariantNames.size());
  return {name,
          {Rule::kHyperNames.data(), Rule::kHyperNames.size()},
          {Rule::kVariantNames.data(), Rule::kVariantNames.size()},
          {Rule::kStateNames.data(), Rule::kStateNames.size()},
          {kScalarNames.data(), kScalarNames.size()},
          scalar_advance<Rule>()};
}

constexpr RuleInfo kRules[] = {
#define FUSEDOPT_RULE(name) describe<rules::name>(#name),
#include "rules_list.inc"
#undef FUSEDOPT_RULE
};

}  // namespace

Span<RuleInfo> all_rules() { return {kRules, sizeof(kRules) / sizeof(kRules[0])}; }

}  // namespace fusedopt
