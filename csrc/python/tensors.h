// What the plan asks of torch's tensors: number type, element order, strides.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <optional>
#include <vector>

#include "core/table.h"

namespace fusedopt {

// The tensor inside a Python object; null when the object is no tensor. Runs no Python code.
const at::Tensor* as_tensor(PyObject* object);

// Our number type, or nothing for a type that no kernel reads.
std::optional<DType> dtype_of(const at::Tensor& tensor);

// Whether a gradient or state can belong to a parameter: the same shape and device, and a number
// type that kernels read.
bool fits(const at::Tensor& tensor, const at::Tensor& param);

// Whether two tensors of the same shape place their elements in the same order with the same
// strides.
inline bool same_strides(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  const auto sizes = a.sizes();
  const auto of_a = a.strides();
  const auto of_b = b.strides();
  if (of_a.size() != of_b.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (of_a[d] != of_b[d] && sizes[d] > 1) return false;
  }
  return true;
}

// Writes the layout of a row (see Layout) for operands that may differ in strides; operands beyond
// the given ones get none. Dimensions of one element are left out, so that 62 are the most there
// can be. Nothing for tensors without elements.
void write_layout(const std::vector<const c10::TensorImpl*>& operands,
                  std::vector<int64_t>& layout);

// "float32 [2, 3] on cpu", for messages.
std::string describe(const at::Tensor& tensor);

}  // namespace fusedopt
