// Compares a step's values with those on the device and sends what differs.
#include "cuda/live_table.h"

#include <algorithm>
#include <cstring>

namespace fusedopt::cuda {

LiveTable::LiveTable(const Table& table)
    : grads_at_(table.group_count * kGroupWords),
      wanted_(grads_at_ + table.tensor_count),
      uploaded_(fill(table.tensors, table.groups)),
      staging_(uploaded_.size() * sizeof(int64_t)) {}

const std::vector<int64_t>& LiveTable::fill(const TensorRow* tensors, const GroupRow* groups) {
  if (grads_at_ > 0) memcpy(wanted_.data(), groups, grads_at_ * sizeof(int64_t));
  for (size_t i = grads_at_; i < wanted_.size(); ++i) {
    wanted_[i] = reinterpret_cast<int64_t>(tensors[i - grads_at_].grad.data);
  }
  return wanted_;
}

bool LiveTable::update(const TensorRow* tensors, const GroupRow* groups, cudaStream_t stream) {
  fill(tensors, groups);
  if (is_capturing(stream)) {
    if (wanted_.empty()) return true;
    const size_t size = wanted_.size() * sizeof(int64_t);
    const Memory captured = allocate_during_capture(size);
    copy_during_capture(captured.get(), wanted_.data(), size);
    keep_forever(captured);
    current_ = reinterpret_cast<const int64_t*>(captured.get());
    return true;
  }
  current_ = home_;
  size_t first = 0;
  size_t last = wanted_.size();
  if (!uncertain_) {
    first =
        std::mismatch(wanted_.begin(), wanted_.end(), uploaded_.begin()).first - wanted_.begin();
    if (first == last) return false;
    while (wanted_[last - 1] == uploaded_[last - 1]) --last;
  }
  uncertain_ = true;
  staging_.copy(&wanted_[first], home_ + first, (last - first) * sizeof(int64_t), stream);
  std::copy(wanted_.begin() + first, wanted_.begin() + last, uploaded_.begin() + first);
  uncertain_ = false;
  return false;
}

}  // namespace fusedopt::cuda
