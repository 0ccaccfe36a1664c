// What a plan knows of the tensors that its rows point into, kept without keeping them alive: raw
// pointers, compared in every step with what param_groups and state hold by then. A tensor that
// came to stand at an old one's address either equals it in all that a row needs, or is noticed.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "python/tensors.h"

namespace fusedopt {

// How a tensor lies in memory and what it is, but for where.
class Geometry {
 public:
  explicit Geometry(const c10::TensorImpl& tensor)
      : keys_(tensor.key_set()),
        dtype_(tensor.dtype()),
        device_(tensor.device()),
        sizes_(tensor.sizes().vec()),
        strides_(tensor.strides().vec()) {}

  // The keys come first: they also tell whether there are strides and a storage to ask for.
  bool fits(const c10::TensorImpl& tensor) const {
    return tensor.key_set() == keys_ && tensor.dtype() == dtype_ && tensor.device() == device_ &&
           tensor.sizes() == sizes_ && tensor.strides() == strides_;
  }

 private:
  c10::DispatchKeySet keys_;
  caffe2::TypeMeta dtype_;
  c10::Device device_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> strides_;
};

// The geometries of one plan's tensors, each once: those of a whole model stay in a cache.
class Geometries {
 public:
  // The number of a tensor's geometry.
  int32_t number_of(const c10::TensorImpl& tensor);
  const Geometry& operator[](int32_t number) const { return all_[number]; }

 private:
  std::vector<Geometry> all_;
};

// Where a tensor's elements begin, without the checks of data_ptr().
inline const void* first_byte(const c10::TensorImpl& tensor) {
  return static_cast<const char*>(tensor.unsafe_storage().unsafeGetStorageImpl()->data()) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.dtype().itemsize());
}

// The bytes [first, last) among which all elements of a tensor are; for one of at least one.
std::pair<const char*, const char*> bytes_of(const c10::TensorImpl& tensor);

// A set of pointers that answers at once and errs to one side: one question in sixteen is answered
// with "perhaps" although the pointer is not in it.
class PointerFilter {
 public:
  explicit PointerFilter(size_t capacity);
  void add(const void* pointer) {
    words_[bit_of(pointer) / 64] |= uint64_t{1} << bit_of(pointer) % 64;
  }
  bool may_hold(const void* pointer) const {
    return (words_[bit_of(pointer) / 64] >> bit_of(pointer) % 64 & 1) != 0;
  }

 private:
  // The upper bits of a product with the golden ratio depend on all bits of the address.
  size_t bit_of(const void* pointer) const {
    return reinterpret_cast<uintptr_t>(pointer) * 0x9e3779b97f4a7c15u >> shift_;
  }

  int shift_ = 58;
  std::vector<uint64_t> words_;
};

// One tensor of the optimizer's.
class Watched {
 public:
  Watched(PyObject* object, Geometries& geometries);

  PyObject* object() const { return object_; }

  // Whether it is the tensor that it was, in the same memory. The object must be alive.
  bool unchanged(const Geometries& geometries) const {
    const at::Tensor* const tensor = as_tensor(object_);
    return tensor != nullptr && tensor->unsafeGetTensorImpl() == impl_ &&
           geometries[geometry_].fits(*impl_) &&
           impl_->unsafe_storage().unsafeGetStorageImpl() == storage_ &&
           first_byte(*impl_) == data_;
  }

  // Only while `unchanged` is known to hold.
  c10::TensorImpl& impl() const { return *impl_; }
  const at::Tensor& tensor() const { return *as_tensor(object_); }
  // Only to compare with: it may be gone.
  const c10::StorageImpl* storage() const { return storage_; }

  // Asks for the memory that `unchanged` looks at. The tensor may be gone.
  __attribute__((always_inline)) void prefetch() const {
    __builtin_prefetch(reinterpret_cast<const char*>(object_) + sizeof(PyObject));
    const auto* const bytes = reinterpret_cast<const char*>(impl_);
    for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(bytes + at);
    __builtin_prefetch(reinterpret_cast<const char*>(storage_) + sizeof(c10::intrusive_ptr_target));
  }

 private:
  PyObject* object_;
  c10::TensorImpl* impl_;
  const c10::StorageImpl* storage_;
  const void* data_;
  int32_t geometry_;
};

}  // namespace fusedopt
