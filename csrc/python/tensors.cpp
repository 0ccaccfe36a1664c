#include "python/tensors.h"

#include <torch/csrc/autograd/python_variable.h>

#include <sstream>

namespace fusedopt {

const at::Tensor* as_tensor(PyObject* object) {
  const bool is_tensor =
      THPVariable_CheckExact(object) ||
      PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(THPVariableClass));
  return is_tensor ? &THPVariable_Unpack(object) : nullptr;
}

std::optional<DType> dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

bool fits(const at::Tensor& tensor, const at::Tensor& param) {
  return tensor.sizes() == param.sizes() && tensor.device() == param.device() &&
         dtype_of(tensor).has_value();
}

void write_layout(const std::vector<const c10::TensorImpl*>& operands,
                  std::vector<int64_t>& layout) {
  const c10::TensorImpl& first = *operands.front();
  layout.clear();
  if (first.numel() == 0) return;
  std::vector<size_t> dims;
  for (size_t d = 0; d < first.sizes().size(); ++d) {
    if (first.sizes()[d] != 1) dims.push_back(d);
  }
  const auto ndim = static_cast<int64_t>(dims.size());
  layout.assign(Layout::words(ndim), 0);
  layout[0] = ndim;
  for (int64_t d = 0; d < ndim; ++d) {
    layout[1 + d] = first.sizes()[dims[d]];
    for (size_t i = 0; i < operands.size(); ++i) {
      layout[1 + ndim * (1 + i) + d] = operands[i]->strides()[dims[d]];
    }
  }
}

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << c10::getDtypeNames(tensor.scalar_type()).first << " " << tensor.sizes() << " on "
       << tensor.device();
  return text.str();
}

}  // namespace fusedopt
