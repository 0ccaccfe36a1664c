#include "python/watched.h"

#include <algorithm>
#include <atomic>

namespace fusedopt {
namespace {

// torch keeps the counter behind a version private. Naming a private member is allowed in an
// explicit instantiation; this one makes version_counter() return a pointer to that member.
template <auto kMember>
struct Opened {
  friend auto version_counter() { return kMember; }
};
auto version_counter();
template struct Opened<&c10::VariableVersion::version_counter_>;

const auto& counter_of(const c10::TensorImpl& tensor) {
  return tensor.version_counter().*version_counter();
}

}  // namespace

int32_t Geometries::number_of(const c10::TensorImpl& tensor) {
  auto known = std::find_if(all_.begin(), all_.end(),
                            [&](const Geometry& geometry) { return geometry.fits(tensor); });
  if (known == all_.end()) known = all_.emplace(known, tensor);
  return static_cast<int32_t>(known - all_.begin());
}

std::pair<const char*, const char*> bytes_of(const c10::TensorImpl& tensor) {
  int64_t last = 0;
  for (size_t d = 0; d < tensor.sizes().size(); ++d) {
    last += (tensor.sizes()[d] - 1) * tensor.strides()[d];
  }
  const auto* const first = static_cast<const char*>(first_byte(tensor));
  return {first, first + (last + 1) * static_cast<int64_t>(tensor.dtype().itemsize())};
}

PointerFilter::PointerFilter(size_t capacity) {
  constexpr size_t kBitsPerPointer = 16;
  while ((size_t{1} << (64 - shift_)) < capacity * kBitsPerPointer) --shift_;
  words_.resize((size_t{1} << (64 - shift_)) / 64);
}

void bump_version(const c10::TensorImpl& tensor) {
  const auto& counter = counter_of(tensor);
  if (!counter) return;  // an inference tensor
  auto& version = counter->version_;
  version.store(version.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

Watched::Watched(PyObject* object, Geometries& geometries)
    : object_(object),
      impl_(as_tensor(object)->unsafeGetTensorImpl()),
      storage_(impl_->unsafe_storage().unsafeGetStorageImpl()),
      data_(first_byte(*impl_)),
      context_(memory_of(*impl_).get_context()),
      version_(counter_of(*impl_).get()),
      geometry_(geometries.number_of(*impl_)) {}

}  // namespace fusedopt
