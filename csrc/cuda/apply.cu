// The apply kernels of one rule (FUSEDOPT_RULE): where run-time variants and types become template
// arguments.
#include "cuda/apply.cuh"
#include "cuda/types.h"
#include FUSEDOPT_RULE_HEADER

namespace fusedopt::cuda {
namespace {

using Rule = rules::FUSEDOPT_RULE;

template <int kVariant, int kCombo>
constexpr ApplyKernel kernel_of() {
  constexpr TypeCombo combo = kTypeCombos[kCombo];
  // find_combo leads rows without states to the combo whose states have the parameter's type, if
  // there is one.
  if constexpr (rules::count_states<Rule>(kVariant) == 0 && combo.state != combo.param) {
    return nullptr;
  } else {
    return &apply_kernel<
        ApplyTypes<Rule, kVariant, typename StorageOf<combo.param>::type,
                   typename StorageOf<combo.grad>::type, typename StorageOf<combo.state>::type>>;
  }
}

template <int... kIndex>
ApplyKernel pick(int index, std::integer_sequence<int, kIndex...>) {
  static constexpr ApplyKernel kKernels[] = {
      kernel_of<kIndex / kTypeComboCount, kIndex % kTypeComboCount>()...};
  return kKernels[index];
}

}  // namespace

#define FUSEDOPT_CONCAT(a, b) a##b
#define FUSEDOPT_NAME(a, b) FUSEDOPT_CONCAT(a, b)

ApplyKernel FUSEDOPT_NAME(apply_kernel_of_, FUSEDOPT_RULE)(int variant, int combo) {
  return pick(variant * kTypeComboCount + combo,
              std::make_integer_sequence<int, Rule::kVariants * kTypeComboCount>());
}

}  // namespace fusedopt::cuda
