// The device's copy of a table and the two passes over it.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "core/control.h"
#include "core/layouts.h"
#include "cuda/image.h"
#include "cuda/launches.h"
#include "cuda/live_table.h"

namespace fusedopt::cuda {
namespace {

cudaStream_t as_stream(StreamHandle stream) { return reinterpret_cast<cudaStream_t>(stream); }

ReduceKernel reduce_kernel_of(const Table& table) {
  return reduce_kernel_of_all_rules(
      std::any_of(table.tensors, table.tensors + table.tensor_count, [](const TensorRow& row) {
        return computes_in_float64(row) != (row.grad.type == DType::kFloat64);
      }));
}

}  // namespace

class DevicePlan::Impl {
 public:
  Impl(size_t rule, const Table& table, const Allocate& allocate, cudaStream_t stream)
      : Impl(cut_launches(rule, table), table, allocate, stream) {}

  bool update(const TensorRow* tensors, const GroupRow* groups, cudaStream_t stream) {
    clamps_ = clips_by_value(groups, group_count_);
    const bool captured = live_.update(tensors, groups, stream);
    if (captured) keep_memory();
    return captured;
  }

  void reduce(const ReduceRequest& request, cudaStream_t stream) {
    launch_reduce(request, piece_count_, stream);
  }

  void apply(const ApplyRequest& request, cudaStream_t stream) {
    StepControl* record = request.control_given ? nullptr : request.control;
    bool launched = false;
    // After a reduce pass backwards, as the kernel takes the pieces: the gradients that were read
    // last are still in the second-level cache.
    for (size_t i = 0; i < launches_.size(); ++i) {
      const Launch& launch = launches_[request.control_given ? launches_.size() - 1 - i : i];
      const auto rows = host_rows_.begin() + launch.first_row;
      if (std::none_of(rows, rows + launch.row_count,
                       [&](int32_t row) { return live_.has_grad(row); })) {
        continue;
      }
      ApplyParams params{};
      params.table = device_table();
      params.pieces = pieces_ + launch.first_piece;
      params.piece_count = launch.piece_count;
      params.rows = rows_ + launch.first_row;
      params.row_count = launch.row_count;
      params.inputs = request.inputs;
      params.control = request.control_given ? request.control : nullptr;
      params.record = record;
      params.clips = request.clip_per_param ? clips_ : nullptr;
      params.ticket = tickets_;
      try {
        launch_kernel(launch.kernel, params, std::max<int64_t>(launch.piece_count, 1), stream,
                      launch.name);
      } catch (const std::runtime_error& error) {
        if (!launched) throw;
        throw std::runtime_error(error.what() +
                                 std::string("; the step is half done: parameters of other types "
                                             "or variants are updated; go on from a checkpoint"));
      }
      launched = true;
      record = nullptr;
    }
    // Without any gradient nothing was launched; the control block is written all the same.
    if (record != nullptr)
      launch_reduce({request.inputs, INFINITY, false, record, nullptr}, 0, stream);
  }

 private:
  Impl(Launches cut, const Table& table, const Allocate& allocate, cudaStream_t stream)
      : launches_(std::move(cut.launches)),
        reduce_kernel_(reduce_kernel_of(table)),
        host_rows_(std::move(cut.rows)),
        tensor_count_(table.tensor_count),
        group_count_(table.group_count),
        piece_count_(static_cast<int64_t>(cut.pieces.size())),
        filled_count_(std::count_if(cut.piece_counts.begin(), cut.piece_counts.end(),
                                    [](int64_t count) { return count > 0; })),
        live_(table) {
    // Not at the first launch, which may come while a stream is under capture.
    check(load_kernel(reduce_kernel_), "loading the reduce kernel");
    for (const Launch& launch : launches_) {
      check(load_kernel(launch.kernel), "loading " + launch.name);
    }
    send(cut, table, allocate, stream);
  }

  // Puts everything on the device, in one piece of memory.
  void send(const Launches& cut, const Table& table, const Allocate& allocate,
            cudaStream_t stream) {
    Image image;
    const size_t layouts = image.add(collect_layouts(table.tensors, table.tensor_count));
    const size_t tensors = image.add(std::vector(table.tensors, table.tensors + tensor_count_));
    const size_t live = image.add(live_.values());
    const size_t rows = image.add(host_rows_);
    const size_t pieces = image.add(cut.pieces);
    const size_t first_piece = image.add(cut.first_piece);
    const size_t piece_counts = image.add(cut.piece_counts);
    const size_t partials = image.add_zeros<Partial>(std::max(piece_count_, tensor_count_));
    const size_t tensor_totals = image.add_zeros<Partial>(tensor_count_);
    const size_t clips = image.add_zeros<double>(tensor_count_);
    const size_t tickets = image.add_zeros<uint32_t>(2 + tensor_count_);

    const bool capturing = is_capturing(stream);
    memory_ = capturing ? allocate_during_capture(image.size()) : allocate(image.size());
    std::byte* const base = memory_.get();
    point_to_layouts(reinterpret_cast<TensorRow*>(image.data() + tensors), tensor_count_,
                     reinterpret_cast<const int64_t*>(base + layouts));
    if (capturing) {
      copy_during_capture(base, image.data(), image.size());
    } else {
      // Pageable memory has been read when the call returns.
      const RelaxedCapture relaxed;
      check(cudaMemcpyAsync(base, image.data(), image.size(), cudaMemcpyHostToDevice, stream),
            "copying " + std::to_string(image.size()) + " bytes of the table");
    }
    tensors_ = reinterpret_cast<TensorRow*>(base + tensors);
    live_.set_home(base + live);
    rows_ = reinterpret_cast<int32_t*>(base + rows);
    pieces_ = reinterpret_cast<Piece*>(base + pieces);
    first_piece_ = reinterpret_cast<int64_t*>(base + first_piece);
    piece_counts_ = reinterpret_cast<int64_t*>(base + piece_counts);
    partials_ = reinterpret_cast<Partial*>(base + partials);
    tensor_totals_ = reinterpret_cast<Partial*>(base + tensor_totals);
    clips_ = reinterpret_cast<double*>(base + clips);
    tickets_ = reinterpret_cast<uint32_t*>(base + tickets);
  }

  void launch_reduce(const ReduceRequest& request, int64_t pieces, cudaStream_t stream) {
    ReduceParams params{};
    params.table = device_table();
    params.pieces = pieces_;
    params.piece_count = pieces;
    params.tensor_count = pieces > 0 ? tensor_count_ : 0;
    params.filled_count = filled_count_;
    params.first_piece = first_piece_;
    params.piece_counts = piece_counts_;
    params.inputs = request.inputs;
    params.max_grad_norm = request.max_grad_norm;
    params.skip_nonfinite = request.skip_nonfinite;
    params.clamps = clamps_;
    params.partials = partials_;
    params.tensor_totals = tensor_totals_;
    params.clips = clips_;
    params.ticket = tickets_ + 1;
    params.tensor_tickets = tickets_ + 2;
    params.control = request.control;
    params.totals = request.totals;
    launch_kernel(reduce_kernel_, params, std::max<int64_t>(pieces, 1), stream,
                  "the reduce kernel");
  }

  DeviceTable device_table() const { return {tensors_, live_.grads(), live_.groups()}; }

  void keep_memory() {
    if (!kept_) keep_forever(memory_);
    kept_ = true;
  }

  std::vector<Launch> launches_;
  ReduceKernel reduce_kernel_;
  std::vector<int32_t> host_rows_;
  int64_t tensor_count_;
  int64_t group_count_;
  int64_t piece_count_;
  int64_t filled_count_;
  bool clamps_ = false;  // whether a group of this step limits values
  LiveTable live_;
  Memory memory_;  // of all that follows
  bool kept_ = false;
  // The table: written once.
  const TensorRow* tensors_;
  const int32_t* rows_;
  const Piece* pieces_;
  const int64_t* first_piece_;
  const int64_t* piece_counts_;
  // What the kernels write.
  Partial* partials_;
  Partial* tensor_totals_;
  double* clips_;
  uint32_t* tickets_;
};

DevicePlan::DevicePlan(size_t rule, int device, const Table& table, const Allocate& allocate,
                       StreamHandle stream) {
  const std::string reason = unavailable(device);
  if (!reason.empty()) {
    throw std::runtime_error("fusedopt: CUDA device " + std::to_string(device) +
                             " cannot be used: " + reason);
  }
  impl_ = std::make_unique<Impl>(rule, table, allocate, as_stream(stream));
}

DevicePlan::~DevicePlan() = default;

bool DevicePlan::update(const TensorRow* tensors, const GroupRow* groups, StreamHandle stream) {
  return impl_->update(tensors, groups, as_stream(stream));
}

void DevicePlan::reduce(const ReduceRequest& request, StreamHandle stream) {
  impl_->reduce(request, as_stream(stream));
}

void DevicePlan::apply(const ApplyRequest& request, StreamHandle stream) {
  impl_->apply(request, as_stream(stream));
}

}  // namespace fusedopt::cuda
