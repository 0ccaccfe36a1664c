// The part of a table that changes from step to step, group rows and gradient pointers, and its way
// to the device.
#pragma once

#include <vector>

#include "core/step_words.h"
#include "cuda/staging.h"

namespace fusedopt::cuda {

class LiveTable {
 public:
  explicit LiveTable(const Table& table);

  // What stands on the device once the table is there, and where that is.
  const std::vector<int64_t>& values() const { return uploaded_; }
  void set_home(std::byte* home) { current_ = home_ = reinterpret_cast<int64_t*>(home); }

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
  bool has_grad(int32_t row) const { return wanted_[grads_at_ + row] != 0; }

 private:
  size_t group_count_;
  size_t grads_at_;                // the group rows stand first
  std::vector<int64_t> wanted_;    // this step's values
  std::vector<int64_t> uploaded_;  // what stands at `home_`, or will once the stream gets there
  bool uncertain_ = false;         // a copy failed: the device may hold anything
  int64_t* home_ = nullptr;
  const int64_t* current_ = nullptr;
  StagingRing staging_;
};

}  // namespace fusedopt::cuda
