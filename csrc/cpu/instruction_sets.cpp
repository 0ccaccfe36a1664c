// The table of everything that is compiled for several instruction sets, and the choice at load
// time.
#include "cpu/instruction_sets.h"

#include <atomic>
#include <stdexcept>

#include "cpu/passes.h"

namespace fusedopt::cpu {

#define FUSEDOPT_ISA_ENTRY(isa, supported)                  \
  namespace isa {                                           \
  void reduce(const Job& job, int64_t first, int64_t last); \
  extern const PieceLoop kApply[];                          \
  }
#include "isa_list.inc"
#undef FUSEDOPT_ISA_ENTRY

namespace {

const std::vector<InstructionSet>& usable() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> all = {
#define FUSEDOPT_ISA_ENTRY(isa, supported) {#isa, bool(supported), isa::reduce, isa::kApply},
#include "isa_list.inc"
#undef FUSEDOPT_ISA_ENTRY
    };
    std::vector<InstructionSet> here;
    for (const InstructionSet& set : all) {
      if (set.supported) here.push_back(set);
    }
    return here;
  }();
  return sets;
}

std::atomic<size_t> chosen{0};

}  // namespace

const InstructionSet& current_instruction_set() {
  if (usable().empty()) throw std::runtime_error("fusedopt: this CPU lacks x86-64-v2 (SSE4.2)");
  return usable()[chosen];
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : usable()) names.emplace_back(set.name);
  return names;
}

std::string instruction_set() { return current_instruction_set().name; }

void use_instruction_set(const std::string& name) {
  for (size_t i = 0; i < usable().size(); ++i) {
    if (usable()[i].name == name) {
      chosen = i;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one of those this CPU runs");
}

}  // namespace fusedopt::cpu
