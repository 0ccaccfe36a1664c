// Compares a step's values with those on the device and sends what differs.
#include "cuda/live_table.h"

#include <algorithm>
#include <tuple>

namespace fusedopt::cuda {

LiveTable::LiveTable(const Table& table)
    : group_count_(table.group_count),
      grads_at_(group_count_ * kGroupWords),
      wanted_(grads_at_ + table.tensor_count),
      staging_(wanted_.size() * sizeof(int64_t)) {
  write_step_words(table.groups, group_count_, table.tensors, wanted_);
  uploaded_ = wanted_;
}

bool LiveTable::update(const TensorRow* tensors, const GroupRow* groups, cudaStream_t stream) {
  write_step_words(groups, group_count_, tensors, wanted_);
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
  if (!uncertain_) std::tie(first, last) = difference(wanted_, uploaded_.data());
  if (first == last) return false;
  uncertain_ = true;
  staging_.copy(&wanted_[first], home_ + first, (last - first) * sizeof(int64_t), stream);
  std::copy(wanted_.begin() + first, wanted_.begin() + last, uploaded_.begin() + first);
  uncertain_ = false;
  return false;
}

}  // namespace fusedopt::cuda
