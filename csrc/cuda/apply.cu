// The apply kernels of one rule (FUSEDOPT_RULE): where run-time variants and types become template
// arguments.
#include "cuda/apply.cuh"
#include "cuda/types.h"
#include FUSEDOPT_RULE_HEADER

namespace fusedopt::cuda {
namespace {

using Rule = rules::FUSEDOPT_RULE;

template <int kVariant, typename... Storages>
constexpr ApplyKernel kernel_for = &apply_kernel<ApplyTypes<Rule, kVariant, Storages...>>;

template <int kVariant, int kKernel>
constexpr ApplyKernel kernel_of() {
  if constexpr (kKernel >= kMixedFloat32) {
    using Any = Mixed<std::conditional_t<kKernel == kMixedFloat64, double, float>>;
    return kernel_for<kVariant, Any, Any, Any>;
  } else {
    constexpr TypeCombo types = kUsualTypes[kKernel];
    // Rows without states count as ones whose states have the parameter's type.
    if constexpr (rules::count_states<Rule>(kVariant) == 0 && types.state != types.param) {
      return nullptr;
    } else {
      return kernel_for<kVariant, typename StorageOf<types.param>::type,
                        typename StorageOf<types.grad>::type,
                        typename StorageOf<types.state>::type>;
    }
  }
}

template <int... kIndex>
ApplyKernel pick(int index, std::integer_sequence<int, kIndex...>) {
  static constexpr ApplyKernel kKernels[] = {
      kernel_of<kIndex / kKernelCount, kIndex % kKernelCount>()...};
  return kKernels[index];
}

}  // namespace

#define FUSEDOPT_CONCAT(a, b) a##b
#define FUSEDOPT_NAME(a, b) FUSEDOPT_CONCAT(a, b)

ApplyKernel FUSEDOPT_NAME(apply_kernel_of_, FUSEDOPT_RULE)(int variant, int kernel) {
  return pick(variant * kKernelCount + kernel,
              std::make_integer_sequence<int, Rule::kVariants * kKernelCount>());
}

}  // namespace fusedopt::cuda
