// The interface of the CUDA backend, as the step plan calls it: raw pointers and a stream handle,
// no CUDA header, no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/table.h"

namespace fusedopt::cuda {

// Why no GPU can be used here, with the remedy; empty when a driver and a device answer. Never
// throws.
std::string unavailable();
// The same for one device, which must be the current one: whether this build holds code that it can
// run.
std::string unavailable(int device);

struct DeviceInfo {
  int multiprocessors;
  int major;  // compute capability
  int minor;
};
DeviceInfo describe_device(int device);

// How many elements of a tensor make one piece: pieces enough to keep all multiprocessors busy and
// to even out their speed, yet long enough to pay for their start. A power of two between 1 Ki and
// 64 Ki.
int32_t choose_piece_length(int64_t elements, int64_t tensors, int multiprocessors);

// A cudaStream_t as a number, the way torch.cuda.Stream.cuda_stream gives it; 0 is the default
// stream.
using StreamHandle = uintptr_t;

// What a step gets from others, read on the device; null where there is nothing.
struct StepInputs {
  const float* grad_scale;  // gradients are divided by it
  const double* unscale;    // or multiplied by this; not both
  const float* found_inf;   // anything but 0: skip the step
};

// Device memory that somebody else manages: given back with the last copy, when the work that is
// enqueued by then is done.
using Memory = std::shared_ptr<std::byte>;
// Gives that many bytes of the current device, at a multiple of 256, to be used on the stream of
// the plan that asks. More than 0; throws when there are none.
using Allocate = std::function<Memory(size_t)>;

struct ReduceRequest {
  StepInputs inputs;
  double max_grad_norm;  // infinity: only measure
  bool skip_nonfinite;
  StepControl* control;  // on the device, written; or null
  double* totals;  // on the device, written: sum over tensors of (norm x coefficient)^2, nonfinite;
                   // or null
};

struct ApplyRequest {
  StepInputs inputs;     // used, and `control` written from them, when this step had no reduce pass
  StepControl* control;  // on the device
  bool control_given;    // `control` holds this step's numbers already: read it, ignore `inputs`
  bool clip_per_param = false;  // by each parameter's own norm, as the last `reduce` found it
};

// One rule over one table on one device. Owns the device's copy of the table and the scratch of the
// passes. One step is: update (once or more), then reduce if anything needs it, then apply, on one
// stream. Steps of one plan must follow one another on the device, on one stream or on streams that
// wait for each other, as the parameters demand anyway. The plan's device must be the current one
// in every call, the destructor included.
//
// CUDA graphs: a step on a stream under capture uses a table of its own, which stays as it was
// captured; the memory of a plan that was captured is never freed, because a graph cannot be asked
// whether it still exists.
//
// All members throw std::runtime_error naming what failed, and may wait for the device.
class DevicePlan {
 public:
  // Copies the table (host memory, layouts too) to the device, in any order of types and variants.
  // `rule` indexes all_rules().
  DevicePlan(size_t rule, int device, const Table& table, const Allocate& allocate,
             StreamHandle stream);
  ~DevicePlan();
  DevicePlan(const DevicePlan&) = delete;
  DevicePlan& operator=(const DevicePlan&) = delete;

  // This step's gradient pointers and group rows; everything else in the rows must be as it was at
  // construction, else make a new plan. One asynchronous copy of what changed; none when nothing
  // did. Returns whether the stream is under capture.
  bool update(const TensorRow* tensors, const GroupRow* groups, StreamHandle stream);

  // Reads every gradient once. One launch.
  void reduce(const ReduceRequest& request, StreamHandle stream);

  // The update: one launch for each kernel that has a gradient. Where one fails after others, what
  // those update stays updated, and the error says so.
  void apply(const ApplyRequest& request, StreamHandle stream);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fusedopt::cuda
