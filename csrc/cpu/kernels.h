// The interface between the CPU passes and the loops that are compiled once for every instruction
// set.
#pragma once

#include <cstdint>

#include "core/table.h"

namespace fusedopt::cpu {

// How many elements of a tensor make one piece.
constexpr int32_t kPieceLength = 16 * 1024;

// One pass over a table. Pieces are grouped into tasks of about equal work; task i is [tasks[i],
// tasks[i + 1]).
struct Job {
  Table table;
  const int64_t* tasks;
  int64_t task_count;
  StepControl control;
  const double* param_clips;  // by tensor; null: none clips by its own norm
  bool transforms;            // whether the apply pass has anything to do to the gradients
  Partial* partials;          // by piece, written by the reduce pass
};

// Loops over the pieces [first, last) of a job.
using PieceLoop = void (*)(const Job& job, int64_t first, int64_t last);

// The loops of one instruction set; `apply` is in the order of all_rules().
struct InstructionSet {
  const char* name;
  bool supported;  // by the CPU this runs on
  PieceLoop reduce;
  const PieceLoop* apply;
};

}  // namespace fusedopt::cpu
