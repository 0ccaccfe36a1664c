// Compares a step's values with those on the device and sends what differs.
#include "cuda/live_table.h"

#include <algorithm>
#include <cstring>

namespace fusedopt::cuda {

LiveTable::LiveTable(const Table& table)
    : tensor_count_(table.tensor_count),
      grads_at_(table.group_count * sizeof(GroupRow)),
      wanted_(grads_at_ + table.tensor_count * sizeof(void*)),
      uploaded_(fill(table.tensors, table.groups)),
      memory_(uploaded_.data(), uploaded_.size()),
      current_(memory_.data()),
      staging_(uploaded_.size()) {}

const std::vector<std::byte>& LiveTable::fill(const TensorRow* tensors, const GroupRow* groups) {
  if (grads_at_ > 0) memcpy(wanted_.data(), groups, grads_at_);
  const void** grads = reinterpret_cast<const void**>(wanted_.data() + grads_at_);
  for (int64_t i = 0; i < tensor_count_; ++i) grads[i] = tensors[i].grad;
  return wanted_;
}

bool LiveTable::update(const TensorRow* tensors, const GroupRow* groups, cudaStream_t stream) {
  fill(tensors, groups);
  if (is_capturing(stream)) {
    captured_.emplace_back(wanted_.data(), wanted_.size());
    captured_.back().keep_forever();
    current_ = captured_.back().data();
    return true;
  }
  current_ = memory_.data();
  const auto changed = std::mismatch(wanted_.begin(), wanted_.end(), uploaded_.begin()).first;
  if (changed == wanted_.end()) return false;
  const auto unchanged = std::mismatch(wanted_.rbegin(), wanted_.rend(), uploaded_.rbegin()).first;
  const size_t first = changed - wanted_.begin();
  const size_t size = unchanged.base() - changed;
  // Should the copy fail, the device no longer holds what `uploaded_` says: leave a difference
  // behind.
  uploaded_[first] = ~wanted_[first];
  staging_.copy(wanted_.data() + first, memory_.data() + first, size, stream);
  memcpy(uploaded_.data() + first, wanted_.data() + first, size);
  return false;
}

}  // namespace fusedopt::cuda
