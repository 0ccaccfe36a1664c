// The device's copy of a table and the two passes over it.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda/launches.h"
#include "cuda/live_table.h"

namespace fusedopt::cuda {
namespace {

template <typename T>
DeviceMemory copy_of(const std::vector<T>& from) {
  return DeviceMemory(from.data(), from.size() * sizeof(T));
}

template <typename T>
DeviceMemory zeros(size_t count) {
  return copy_of(std::vector<T>(count));
}

template <typename T>
T* as(const DeviceMemory& memory) {
  return reinterpret_cast<T*>(memory.data());
}

cudaStream_t as_stream(StreamHandle stream) { return reinterpret_cast<cudaStream_t>(stream); }

// The layouts of all rows, one behind the other.
std::vector<int64_t> collect_layouts(const Table& table) {
  std::vector<int64_t> words;
  for (const TensorRow* row = table.tensors; row < table.tensors + table.tensor_count; ++row) {
    if (row->layout == nullptr) continue;
    words.insert(words.end(), row->layout, row->layout + Layout::words(Layout::ndim(row->layout)));
  }
  return words;
}

// The rows with their layouts where `layouts`, the device's copy of collect_layouts, has them.
std::vector<TensorRow> rows_with_layouts(const Table& table, const int64_t* layouts) {
  std::vector<TensorRow> rows(table.tensors, table.tensors + table.tensor_count);
  for (TensorRow& row : rows) {
    if (row.layout == nullptr) continue;
    const int64_t words = Layout::words(Layout::ndim(row.layout));
    row.layout = layouts;
    layouts += words;
  }
  return rows;
}

// `device`, before anything is made on it; throws when it cannot be used.
int usable_device(int device) {
  const std::string reason = unavailable(device);
  if (!reason.empty()) {
    throw std::runtime_error("fusedopt: CUDA device " + std::to_string(device) +
                             " cannot be used: " + reason);
  }
  return device;
}

}  // namespace

// Made, used and destroyed with the plan's device current.
class DevicePlan::Impl {
 public:
  Impl(size_t rule, const Table& table) : Impl(cut_launches(rule, table), table) {}

  bool update(const TensorRow* tensors, const GroupRow* groups, cudaStream_t stream) {
    const bool captured = live_.update(tensors, groups, stream);
    if (captured) keep_forever();
    return captured;
  }

  void reduce(const ReduceRequest& request, cudaStream_t stream) {
    launch_reduce(request, piece_count_, stream);
    reduced_ = true;
  }

  void apply(const ApplyRequest& request, cudaStream_t stream) {
    StepControl* record = request.control_given ? nullptr : request.control;
    for (const Launch& launch : launches_) {
      const auto rows = host_rows_.begin() + launch.first_row;
      if (std::none_of(rows, rows + launch.row_count,
                       [&](int32_t row) { return live_.has_grad(row); })) {
        continue;
      }
      ApplyParams params{};
      params.table = device_table();
      params.pieces = as<Piece>(pieces_) + launch.first_piece;
      params.piece_count = launch.piece_count;
      params.rows = as<int32_t>(rows_) + launch.first_row;
      params.row_count = launch.row_count;
      params.inputs = request.inputs;
      params.control = request.control_given ? request.control : nullptr;
      params.record = record;
      params.clips = request.control_given && reduced_ ? as<double>(clips_) : nullptr;
      params.ticket = as<uint32_t>(tickets_);
      launch_kernel(launch.kernel, params, std::max<int64_t>(launch.piece_count, 1), stream,
                    launch.name);
      record = nullptr;
    }
    // Without any gradient nothing was launched; the control block is written all the same.
    if (record != nullptr) launch_reduce({request.inputs, -1.0, false, record, nullptr}, 0, stream);
    reduced_ = false;
  }

 private:
  Impl(Launches cut, const Table& table)
      : launches_(std::move(cut.launches)),
        host_rows_(std::move(cut.rows)),
        tensor_count_(table.tensor_count),
        piece_count_(table.piece_count),
        filled_count_(std::count_if(cut.piece_counts.begin(), cut.piece_counts.end(),
                                    [](int64_t count) { return count > 0; })),
        live_(table),
        layouts_(copy_of(collect_layouts(table))),
        tensors_(copy_of(rows_with_layouts(table, as<int64_t>(layouts_)))),
        rows_(copy_of(host_rows_)),
        pieces_(copy_of(cut.pieces)),
        first_piece_(copy_of(cut.first_piece)),
        piece_counts_(copy_of(cut.piece_counts)),
        partials_(zeros<Partial>(piece_count_)),
        tensor_totals_(zeros<Partial>(tensor_count_)),
        clips_(zeros<double>(tensor_count_)),
        tickets_(zeros<uint32_t>(2 + tensor_count_)) {
    // Not at the first launch, which may come while a stream is under capture.
    for (const Launch& launch : launches_) {
      check(load_kernel(launch.kernel), "loading " + launch.name);
    }
  }

  void launch_reduce(const ReduceRequest& request, int64_t pieces, cudaStream_t stream) {
    ReduceParams params{};
    params.table = device_table();
    params.pieces = as<Piece>(pieces_);
    params.piece_count = pieces;
    params.tensor_count = pieces > 0 ? tensor_count_ : 0;
    params.filled_count = filled_count_;
    params.first_piece = as<int64_t>(first_piece_);
    params.piece_counts = as<int64_t>(piece_counts_);
    params.inputs = request.inputs;
    params.max_grad_norm = request.max_grad_norm;
    params.skip_nonfinite = request.skip_nonfinite;
    params.partials = as<Partial>(partials_);
    params.tensor_totals = as<Partial>(tensor_totals_);
    params.clips = as<double>(clips_);
    params.ticket = as<uint32_t>(tickets_) + 1;
    params.tensor_tickets = as<uint32_t>(tickets_) + 2;
    params.control = request.control;
    params.totals = request.totals;
    launch_kernel(reduce_kernel_of_all_rules(), params, std::max<int64_t>(pieces, 1), stream,
                  "the reduce kernel");
  }

  DeviceTable device_table() const {
    return {as<TensorRow>(tensors_), live_.grads(), live_.groups()};
  }

  void keep_forever() {
    for (DeviceMemory* memory : {&layouts_, &tensors_, &rows_, &pieces_, &first_piece_,
                                 &piece_counts_, &partials_, &tensor_totals_, &clips_, &tickets_}) {
      memory->keep_forever();
    }
  }

  std::vector<Launch> launches_;
  std::vector<int32_t> host_rows_;
  int64_t tensor_count_;
  int64_t piece_count_;
  int64_t filled_count_;
  bool reduced_ = false;  // a reduce pass has left clip coefficients for the coming apply pass
  LiveTable live_;
  // The table: written once.
  DeviceMemory layouts_;
  DeviceMemory tensors_;
  DeviceMemory rows_;
  DeviceMemory pieces_;
  DeviceMemory first_piece_;
  DeviceMemory piece_counts_;
  // What the kernels write.
  DeviceMemory partials_;
  DeviceMemory tensor_totals_;
  DeviceMemory clips_;
  DeviceMemory tickets_;
};

DevicePlan::DevicePlan(size_t rule, int device, const Table& table)
    : device_(usable_device(device)) {
  const DeviceGuard guard(device_);
  impl_ = std::make_unique<Impl>(rule, table);
}

DevicePlan::~DevicePlan() {
  try {
    const DeviceGuard guard(device_);
    impl_.reset();
  } catch (const std::runtime_error&) {
    // The driver is gone, at the end of the process, and the memory with it.
  }
}

bool DevicePlan::update(const TensorRow* tensors, const GroupRow* groups, StreamHandle stream) {
  const DeviceGuard guard(device_);
  return impl_->update(tensors, groups, as_stream(stream));
}

void DevicePlan::reduce(const ReduceRequest& request, StreamHandle stream) {
  const DeviceGuard guard(device_);
  impl_->reduce(request, as_stream(stream));
}

void DevicePlan::apply(const ApplyRequest& request, StreamHandle stream) {
  const DeviceGuard guard(device_);
  impl_->apply(request, as_stream(stream));
}

}  // namespace fusedopt::cuda
