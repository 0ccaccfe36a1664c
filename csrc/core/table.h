// The plain table that describes one optimizer's step to the loops: which memory, in which pieces,
// under which group's hyperparameters. Written by the plan, read by the CPU loops and the CUDA
// kernels; pointers and numbers only.
#pragma once

#include <cstdint>

#include "core/numbers.h"

namespace fusedopt {

constexpr int kMaxStates = 4;
constexpr int kMaxHyper = 12;
constexpr int kOperands =
    2 + kMaxStates;  // param, grad, states: the order of everything indexed by operand

// One operand of a row: its memory and how numbers are stored there. No two need be alike.
struct Operand {
  void* data;  // null: there is none
  DType type;
};

// One parameter with everything that belongs to it. Without a gradient it takes no part in this
// step.
struct TensorRow {
  Operand param;
  Operand grad;  // only read
  // The rule's states come first, its scalars (core/scalars.h) last, at least one null between.
  Operand state[kMaxStates];
  void* step;  // 0-dim counter of applied steps, of step_type; null: the state does not exist yet
  const int64_t* layout;  // null: every operand is dense in the same order; else see Layout
  int64_t numel;
  int32_t group;
  DType step_type;  // float32 or float64
};

// Whether the passes compute with this row in float64; else they do in float32, whatever its
// operands are stored in.
FUSEDOPT_NUMBERS_HD bool computes_in_float64(const TensorRow& row) {
  return row.param.type == DType::kFloat64;
}

// The number of the step under way: the counter plus 1, added in the counter's own type.
FUSEDOPT_NUMBERS_HD double next_step(const TensorRow& row) {
  return row.step_type == DType::kFloat64 ? *static_cast<const double*>(row.step) + 1.0
                                          : *static_cast<const float*>(row.step) + 1.0f;
}

FUSEDOPT_NUMBERS_HD void advance_step(const TensorRow& row) {
  if (row.step_type == DType::kFloat64) {
    *static_cast<double*>(row.step) += 1.0;
  } else {
    *static_cast<float*>(row.step) += 1.0f;
  }
}

// The layout of a row whose operands are not all dense in one order: `ndim`, then `ndim` sizes,
// then for each operand (param, grad, states) `ndim` strides, counted in elements. Elements are
// numbered in row-major order of the sizes.
struct Layout {
  static constexpr int64_t words(int64_t ndim) { return 1 + ndim * (1 + kOperands); }
  static FUSEDOPT_NUMBERS_HD int64_t ndim(const int64_t* layout) { return layout[0]; }
  static FUSEDOPT_NUMBERS_HD const int64_t* sizes(const int64_t* layout) { return layout + 1; }
  static FUSEDOPT_NUMBERS_HD const int64_t* strides(const int64_t* layout, int operand) {
    return layout + 1 + layout[0] * (1 + operand);
  }
};

// One group's hyperparameters, in the order of the rule's kHyperNames.
struct GroupRow {
  double hyper[kMaxHyper];
  double max_grad_value;           // infinity: no clamp
  double max_grad_norm_per_param;  // infinity: no clip
  const void*
      lr;  // null: hyper[0]; else the 0-dim tensor on the device that holds the learning rate
  DType lr_type;
  int32_t variant;
};

// A run of consecutive elements of one tensor: the unit of work. Never empty.
struct Piece {
  int64_t begin;
  int32_t length;
  int32_t tensor;
};

// What the reduce pass finds in one piece.
struct Partial {
  double sum_squares;  // of the gradients after unscaling and the clamp by value
  int64_t nonfinite;   // 1 when any raw gradient element is inf or nan
};

// The few numbers between the reduce pass and the apply pass. Lives on the parameters' device.
struct StepControl {
  double unscale;    // multiplies every gradient first: 1 / loss scale
  double clip;       // multiplies it last: the global norm's coefficient
  double norm;       // the global norm, as last_grad_norm reports it
  double nonfinite;  // 1 when any raw gradient element is inf or nan
  double skip;       // 1: the apply pass leaves everything as it is
};
constexpr int kControlNumbers = sizeof(StepControl) / sizeof(double);

struct Table {
  const TensorRow* tensors;
  const GroupRow* groups;
  const Piece* pieces;  // those of one tensor stand together, in order
  int64_t tensor_count;
  int64_t group_count;
  int64_t piece_count;
};

}  // namespace fusedopt
