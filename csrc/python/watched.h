// What a plan knows of the tensors that its rows point into, kept without keeping them alive: raw
// pointers, compared in every step with what param_groups and state hold by then. A tensor that
// came to stand at an old one's address either equals it in all that a row needs, or is noticed.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/impl/COWDeleter.h>
#include <torch/csrc/autograd/python_variable.h>

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
        ndim_(tensor.sizes().size()),
        sizes_and_strides_(tensor.sizes().vec()) {
    for (const int64_t stride : tensor.strides()) sizes_and_strides_.push_back(stride);
  }

  bool fits(const c10::TensorImpl& tensor) const {
    if (!same_kind(tensor)) return false;
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    if (sizes.size() != ndim_) return false;
    const int64_t* const expected = sizes_and_strides_.data();
    for (size_t d = 0; d < ndim_; ++d) {
      if (sizes[d] != expected[d] || strides[d] != expected[ndim_ + d]) return false;
    }
    return true;
  }

  // Comes first: the keys also tell whether there are strides and a storage to ask for.
  bool same_kind(const c10::TensorImpl& tensor) const {
    return tensor.key_set() == keys_ && tensor.dtype() == dtype_ && tensor.device() == device_;
  }

 private:
  c10::DispatchKeySet keys_;
  caffe2::TypeMeta dtype_;
  c10::Device device_;
  size_t ndim_;
  std::vector<int64_t> sizes_and_strides_;
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

// The memory behind a tensor's version; only to prefetch.
const void* version_place(const c10::TensorImpl& tensor);

// Tells autograd that a tensor was written, as bump_version() does at four times the cost: the
// interpreter's lock is held, and who writes the same tensor at the same time without has a race
// anyway.
void bump_version(const c10::TensorImpl& tensor);

// A tensor's memory. Without the checks of data_ptr(), which look at flags in another cache line.
inline const at::DataPtr& memory_of(const c10::TensorImpl& tensor) {
  return tensor.unsafe_storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
}

// Where a tensor's elements begin.
inline const void* first_byte(const c10::TensorImpl& tensor) {
  return static_cast<const char*>(memory_of(tensor).get()) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.dtype().itemsize());
}

// The bytes [first, last) among which all elements of a tensor are; for one of at least one.
std::pair<const char*, const char*> bytes_of(const c10::TensorImpl& tensor);

// What only prefetches is always inlined: g++ takes it for a function without effect and drops the
// call. The address may be any.
#define FUSEDOPT_PREFETCH __attribute__((always_inline)) inline

FUSEDOPT_PREFETCH void prefetch_tensor(const c10::TensorImpl* tensor) {
  const auto* const bytes = reinterpret_cast<const char*>(tensor);
  for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(bytes + at);
  __builtin_prefetch(bytes + sizeof(c10::TensorImpl) - 1);  // it seldom begins with a line
}

FUSEDOPT_PREFETCH void prefetch_storage(const c10::StorageImpl* storage) {
  __builtin_prefetch(reinterpret_cast<const char*>(storage) + sizeof(c10::intrusive_ptr_target));
}

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

// One tensor of the optimizer's. Small, for a step goes through those of all parameters.
class Watched {
 public:
  Watched(PyObject* object, Geometries& geometries)
      : object_(object),
        impl_(tensor().unsafeGetTensorImpl()),
        storage_(impl_->unsafe_storage().unsafeGetStorageImpl()),
        data_(first_byte(*impl_)),
        geometry_(geometries.number_of(*impl_)) {}

  PyObject* object() const { return object_; }

  // Whether an object that is alive is the one that was watched, and holds the same tensor: others
  // may have been swapped in (torch.utils.swap_tensors), which no reference of ours must hinder.
  bool is(PyObject* object) const {
    if (object != object_) return false;
    const at::Tensor* const tensor = as_tensor(object);
    return tensor != nullptr && tensor->unsafeGetTensorImpl() == impl_;
  }

  // Whether the object, which must be alive and a tensor, holds the same one, as it was, in the
  // same memory.
  bool unchanged(const Geometries& geometries) const {
    return holds_same() && geometries[geometry_].fits(*impl_) && same_memory();
  }
  // The same for a tensor of one element, of which sizes and strides say nothing: they fill a cache
  // line of their own.
  bool holds_its_number(const Geometries& geometries) const {
    return holds_same() && geometries[geometry_].same_kind(*impl_) && same_memory();
  }

  // Only while it is known to be the one that was watched.
  c10::TensorImpl& impl() const { return *impl_; }
  const at::Tensor& tensor() const { return THPVariable_Unpack(object_); }
  // Only to compare with: it may be gone.
  const c10::StorageImpl* storage() const { return storage_; }

  // Asks for the memory that the checks look at. The tensor may be gone.
  FUSEDOPT_PREFETCH void prefetch() const {
    __builtin_prefetch(reinterpret_cast<const char*>(object_) + sizeof(PyObject));
    prefetch_tensor(impl_);
    prefetch_storage(storage_);
  }

 private:
  bool holds_same() const { return tensor().unsafeGetTensorImpl() == impl_; }
  // Where it was, and lent to nobody (torch._lazy_clone).
  bool same_memory() const {
    return impl_->unsafe_storage().unsafeGetStorageImpl() == storage_ &&
           first_byte(*impl_) == data_ &&
           memory_of(*impl_).get_deleter() != &c10::impl::cow::cow_deleter;
  }

  PyObject* object_;
  c10::TensorImpl* impl_;
  const c10::StorageImpl* storage_;
  const void* data_;
  int32_t geometry_;
};

}  // namespace fusedopt
