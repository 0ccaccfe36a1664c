// Staging for one instruction set (FUSEDOPT_ISA): converts number types and gathers or scatters
// strides between an operand's memory and a small buffer of the compute type.
#include "cpu/convert.h"
#include "cpu/operand.h"

namespace fusedopt::cpu {
namespace FUSEDOPT_ISA {
namespace {

// Calls visit(element, offset) for `count` consecutive elements from `first`, in row-major order of
// the layout's sizes.
template <typename Visit>
inline void for_each_offset(const int64_t* layout, int operand, int64_t first, int count,
                            Visit visit) {
  constexpr int kMaxDims = 64;
  const int64_t ndim = Layout::ndim(layout);
  const int64_t* sizes = Layout::sizes(layout);
  const int64_t* strides = Layout::strides(layout, operand);
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int64_t d = ndim - 1, rest = first; d >= 0; --d) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += index[d] * strides[d];
  }
  for (int i = 0; i < count; ++i) {
    visit(i, offset);
    for (int64_t d = ndim - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= index[d] * strides[d];
      index[d] = 0;
    }
  }
}

// Calls use(memory) with the operand's memory as a pointer to its own number type.
template <typename Use>
void with_storage(const Operand& operand, Use use) {
  switch (operand.type) {
    case DType::kFloat32:
      return use(static_cast<float*>(operand.data));
    case DType::kFloat64:
      return use(static_cast<double*>(operand.data));
    case DType::kFloat16:
      return use(static_cast<Float16*>(operand.data));
    case DType::kBFloat16:
      return use(static_cast<BFloat16*>(operand.data));
  }
}

}  // namespace

template <typename T>
void stage_in(const Array<T>& array, int64_t first, int count, T* buffer) {
  with_storage(array.operand, [&](auto* memory) {
    if (array.layout == nullptr) {
      widen_run(memory + first, count, buffer);
    } else {
      for_each_offset(array.layout, array.index, first, count,
                      [&](int i, int64_t offset) { buffer[i] = load_as<T>(memory[offset]); });
    }
  });
}

template <typename T>
void stage_out(const Array<T>& array, int64_t first, int count, const T* buffer) {
  with_storage(array.operand, [&](auto* memory) {
    if (array.layout == nullptr) {
      narrow_run(buffer, count, memory + first);
    } else {
      for_each_offset(array.layout, array.index, first, count,
                      [&](int i, int64_t offset) { store_as(memory[offset], buffer[i]); });
    }
  });
}

template void stage_in(const Array<float>&, int64_t, int, float*);
template void stage_in(const Array<double>&, int64_t, int, double*);
template void stage_out(const Array<float>&, int64_t, int, const float*);
template void stage_out(const Array<double>&, int64_t, int, const double*);

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt::cpu
