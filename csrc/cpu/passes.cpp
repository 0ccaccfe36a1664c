// Runs the loops of the chosen instruction set over a table, in one parallel region a pass.
#include "cpu/passes.h"

#include <omp.h>

#include <algorithm>
#include <cfenv>

#include "core/control.h"
#include "core/rule_info.h"
#include "core/sum_order.h"
#include "cpu/instruction_sets.h"

namespace fusedopt::cpu {
namespace {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 8 * 1024;
// The elements of a task: enough tasks for the threads to finish together, but long runs of memory,
// since a run's first pages are slow. Tasks of 16 pieces made the passes over 124 million elements
// 2 to 3 % faster than tasks of one.
constexpr int64_t kSmallestTask = kPieceLength;
constexpr int64_t kLargestTask = 16 * kPieceLength;
constexpr int64_t kTasks = 256;
// What handling a piece costs, in elements.
constexpr int64_t kPieceOverhead = 64;

void for_each_task(const Job& job, int threads, PieceLoop loop) {
  const int64_t count = job.task_count;
  threads = static_cast<int>(
      std::min<int64_t>(threads, 1 + count * kSmallestTask / kElementsPerThread / 2));
  if (threads == 1) return loop(job, 0, job.table.piece_count);
  // Rounding and the flushing of denormals (torch.set_flush_denormal) belong to a thread: the
  // others compute as the caller does, or results would depend on who took which task.
  std::fenv_t callers;
  std::fegetenv(&callers);
#pragma omp parallel num_threads(threads)
  {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&callers);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < count; ++task) {
      loop(job, job.tasks[task], job.tasks[task + 1]);
    }
    std::fesetenv(&own);
  }
}

}  // namespace

Partial reduce(Job& job, std::vector<double>& param_clips, int threads) {
  for_each_task(job, threads, current_instruction_set().reduce);
  const Table& table = job.table;
  const bool clips = clips_by_param(table.groups, table.group_count);
  param_clips.assign(clips ? table.tensor_count : 0, 1.0);
  job.param_clips = clips ? param_clips.data() : nullptr;

  // By tensor, and by piece of one tensor.
  std::vector<double> totals(table.tensor_count, 0.0);
  std::vector<double> sums;
  int64_t nonfinite = 0;
  for (int64_t i = 0; i < table.piece_count;) {
    const int32_t tensor = table.pieces[i].tensor;
    const TensorRow& row = table.tensors[tensor];
    sums.clear();
    for (; i < table.piece_count && table.pieces[i].tensor == tensor; ++i) {
      if (row.grad.data == nullptr) continue;
      sums.push_back(job.partials[i].sum_squares);
      nonfinite |= job.partials[i].nonfinite;
    }
    const ParamClip clip = clip_by_param(add_neighbours(sums.data(), sums.size()),
                                         table.groups[row.group].max_grad_norm_per_param);
    totals[tensor] = clip.sum_squares;
    if (clips) param_clips[tensor] = clip.coefficient;
  }
  return {add_neighbours(totals.data(), table.tensor_count), nonfinite};
}

void apply(Job& job, size_t rule, int threads) {
  if (job.control.skip != 0.0) return;
  const Table& table = job.table;
  job.transforms = job.control.unscale != 1.0 || job.control.clip != 1.0 ||
                   job.param_clips != nullptr || clips_by_value(table.groups, table.group_count);
  for_each_task(job, threads, current_instruction_set().apply[rule]);
  if (const auto advance = all_rules().data[rule].advance_scalars) advance(table);
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    if (table.tensors[i].grad.data != nullptr) advance_step(table.tensors[i]);
  }
}

std::vector<int64_t> cut_tasks(const std::vector<Piece>& pieces) {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.length + kPieceOverhead;
  const int64_t enough = std::clamp(total / kTasks, kSmallestTask, kLargestTask);
  std::vector<int64_t> starts{0};
  int64_t work = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    work += pieces[i].length + kPieceOverhead;
    if (work >= enough) {
      starts.push_back(static_cast<int64_t>(i) + 1);
      work = 0;
    }
  }
  if (starts.back() != static_cast<int64_t>(pieces.size())) {
    starts.push_back(static_cast<int64_t>(pieces.size()));
  }
  return starts;
}

}  // namespace fusedopt::cpu
