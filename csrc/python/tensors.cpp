#include "python/tensors.h"

#include <torch/csrc/autograd/python_variable.h>

#include <sstream>

namespace fusedopt {

const at::Tensor* as_tensor(PyObject* object) {
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
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

at::ScalarType scalar_type_of(DType type) {
  switch (type) {
    case DType::kFloat32:
      return at::kFloat;
    case DType::kFloat64:
      return at::kDouble;
    case DType::kFloat16:
      return at::kHalf;
    case DType::kBFloat16:
      return at::kBFloat16;
  }
  TORCH_INTERNAL_ASSERT(false, "no such number type");
}

void write_layout(const std::vector<const at::Tensor*>& operands, std::vector<int64_t>& layout) {
  const at::Tensor& first = *operands.front();
  const int64_t ndim = first.dim();
  layout.assign(Layout::words(ndim), 0);
  layout[0] = ndim;
  for (int64_t d = 0; d < ndim; ++d) {
    layout[1 + d] = first.size(d);
    for (size_t i = 0; i < operands.size(); ++i) {
      layout[1 + ndim * (1 + i) + d] = operands[i]->stride(d);
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
