// Which of the compiled instruction sets the passes use.
#pragma once

#include "cpu/kernels.h"

namespace fusedopt::cpu {

// The best one that this CPU can run, unless use_instruction_set chose another.
const InstructionSet& current_instruction_set();

}  // namespace fusedopt::cpu
