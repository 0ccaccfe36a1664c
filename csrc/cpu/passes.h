// The two passes on the CPU and what stands between them. Used by the step plan; knows nothing of
// torch.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fusedopt::cpu {

// Reads every gradient once, under control.unscale. Fills job.partials and job.param_clips (by
// tensor; left null when no group clips by parameter); returns what it found in all of them, after
// the clips by value and parameter.
Partial reduce(Job& job, std::vector<double>& param_clips, int threads);

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
