// The part of a table that changes from step to step, gradient pointers and group rows, and its way
// to the device.
#pragma once

#include <list>
#include <vector>

#include "cuda/staging.h"

namespace fusedopt::cuda {

class LiveTable {
 public:
  // On the current device.
  explicit LiveTable(const Table& table);

  // Takes over this step's values: one asynchronous copy of what changed. On a stream under capture
  // they go to a place of their own, at once and for good: the graph must find the same values at
  // every replay, whatever steps come between, and a copy inside the graph would read the pinned
  // buffer again each time. Returns whether the stream is under capture.
  bool update(const TensorRow* tensors, const GroupRow* groups, cudaStream_t stream);

  // What the launches of this step read.
  const GroupRow* groups() const { return reinterpret_cast<const GroupRow*>(current_); }
  const void* const* grads() const {
    return reinterpret_cast<const void* const*>(current_ + grads_at_);
  }

  // Whether this row has a gradient in this step.
  bool has_grad(int32_t row) const { return host_grads()[row] != nullptr; }

 private:
  // Puts a step's values into `wanted_`.
  const std::vector<std::byte>& fill(const TensorRow* tensors, const GroupRow* groups);
  const void* const* host_grads() const {
    return reinterpret_cast<const void* const*>(wanted_.data() + grads_at_);
  }

  int64_t tensor_count_;
  size_t grads_at_;                // bytes of the group rows, which stand first
  std::vector<std::byte> wanted_;  // this step's values
  std::vector<std::byte>
      uploaded_;  // what `memory_` holds, or will hold once the stream gets there
  DeviceMemory memory_;
  std::list<DeviceMemory> captured_;
  const std::byte* current_;
  StagingRing staging_;
};

}  // namespace fusedopt::cuda
