// What the step plan does about the memory of a step under way: keeps it alive, tells autograd that
// it is written, finds gradients in it.
#include <algorithm>
#include <stdexcept>

#include "python/plan.h"

namespace fusedopt {

// Whether a gradient lies in memory that the step writes.
bool Plan::writes_grad(size_t index) {
  if (written_.empty()) {
    for (const Slot& slot : slots_) {
      for (int32_t k = 0; k <= slot.state_count; ++k) {
        const c10::TensorImpl& tensor = watched_[slot.first_watched + k].impl();
        if (tensor.numel() != 0) written_.push_back(bytes_of(tensor));
      }
    }
    std::sort(written_.begin(), written_.end());
  }
  const at::Tensor& grad = grad_of(index);
  if (grad.numel() == 0) return false;
  // They do not overlap: what shares memory takes torch's rules (fusedopt/_routing.py).
  const auto [first, last] = bytes_of(*grad.unsafeGetTensorImpl());
  const auto after = std::lower_bound(written_.begin(), written_.end(), std::pair(last, last));
  return after != written_.begin() && std::prev(after)->second > first;
}

void Plan::hold() {
  if (is_held_) {
    throw std::runtime_error(
        "step() was called inside of a step() of the same optimizer; call it before or after");
  }
  held_.reserve(watched_.size() + rows_.size());
  const auto keep = [this](const at::Tensor& tensor) {
    held_.push_back(tensor);
    held_storages_.push_back(tensor.storage());
  };
  for (const Watched& watched : watched_) keep(watched.tensor());
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].grad.data != nullptr) keep(grad_of(i));
  }
  for (PyObject* const lr : groups_.device_lrs()) keep(*as_tensor(lr));
  is_held_ = true;
}

void Plan::release() {
  // What dies here may run Python code, and even begin a step.
  const auto tensors = std::move(held_);
  const auto storages = std::move(held_storages_);
  held_.clear();
  held_storages_.clear();
  is_held_ = false;
}

void Plan::require_held() const {
  if (is_held_) return;
  throw std::runtime_error(
      "the plan was asked for a pass before begin() found it in order; call begin() first in every"
      " step");
}

void Plan::bump_versions() const {
  constexpr size_t kAhead = 24;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Slot& slot = slots_[i];
    const size_t end = slot.first_watched + 1 + slot.state_count;
    for (size_t k = slot.first_watched; k < end; ++k) {
      if (k + kAhead < watched_.size()) {
        __builtin_prefetch(version_place(watched_[k + kAhead].impl()), 1);
      }
      if (rows_[i].grad.data != nullptr) bump_version(watched_[k].impl());
    }
  }
}

}  // namespace fusedopt
