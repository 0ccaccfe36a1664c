// The two passes on the CPU and what stands between them. Used by the step plan; knows nothing of
// torch.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fusedopt::cpu {

// What a step asks of the reduce pass and of the numbers it leaves.
struct StepInputs {
  double unscale;        // 1 / loss scale
  double max_grad_norm;  // infinity: measure only; negative: no global norm
  bool found_inf;        // somebody else already found inf or nan
  bool skip_nonfinite;
};

// Reads every gradient once. Fills job.partials, job.param_clips (by tensor; left null when no
// group clips by parameter), and control.nonfinite; returns the sum of the squared norms of all
// gradients after unscaling and the clips by value and parameter.
double reduce(Job& job, std::vector<double>& param_clips, int threads);

// Settles clip, norm and skip from the sum that `reduce` (of one or several plans) found.
void settle(StepControl& control, double sum_squares, const StepInputs& inputs);

// Updates every row with a gradient, then adds 1 to its counter; nothing at all when control.skip
// is set.
void apply(Job& job, size_t rule, int threads);

// Cuts [0, piece_count) into tasks of about equal work.
std::vector<int64_t> cut_tasks(const std::vector<Piece>& pieces);

// The instruction sets that this machine can run, best first, the chosen one, and the choice by
// name (for tests).
std::vector<std::string> instruction_sets();
std::string instruction_set();
void use_instruction_set(const std::string& name);

}  // namespace fusedopt::cpu
