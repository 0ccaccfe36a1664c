// Collects what the rule headers say of themselves.
#include "core/rule_info.h"

#include "core/table.h"
#include "rules_headers.inc"

namespace fusedopt {
namespace {

template <typename Rule>
constexpr RuleInfo describe(const char* name) {
  static_assert(sizeof(typename Rule::Hyper) == sizeof(double) * Rule::kHyperNames.size());
  static_assert(Rule::kHyperNames.size() <= kMaxHyper && Rule::kStateNames.size() <= kMaxStates);
  static_assert(Rule::kVariants == 1 << Rule::kVariantNames.size());
  return {name,
          {Rule::kHyperNames.data(), Rule::kHyperNames.size()},
          {Rule::kVariantNames.data(), Rule::kVariantNames.size()},
          {Rule::kStateNames.data(), Rule::kStateNames.size()}};
}

constexpr RuleInfo kRules[] = {
#define FUSEDOPT_RULE(name) describe<rules::name>(#name),
#include "rules_list.inc"
#undef FUSEDOPT_RULE
};

}  // namespace

Span<RuleInfo> all_rules() { return {kRules, sizeof(kRules) / sizeof(kRules[0])}; }

}  // namespace fusedopt
