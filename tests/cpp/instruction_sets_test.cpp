// Tests that every instruction set that this CPU runs, with one thread and with two, gives the same
// bits for every rule, variant and number type, with all that the passes do to gradients.
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "problem.h"

namespace fusedopt {
namespace {

// One tensor of every size up to 70 and one of two pieces.
std::vector<int64_t> sizes() {
  std::vector<int64_t> all(70);
  std::iota(all.begin(), all.end(), 0);
  all.push_back(cpu::kPieceLength + 33);
  return all;
}

void test_instruction_sets() {
  const auto sets = cpu::instruction_sets();
  CHECK(!sets.empty(), "no instruction set");
  for (size_t rule = 0; rule < all_rules().size; ++rule) {
    const RuleInfo& info = all_rules().data[rule];
    for (int variant = 0; variant < 1 << info.variants.size; ++variant) {
      for (const DType type :
           {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
        for (const bool fenced : {false, true}) {
          cpu::use_instruction_set(sets.back());
          const auto expected = Problem(rule, type, variant, fenced, sizes()).step(1);
          const auto start = Problem(rule, type, variant, fenced, sizes()).operands[0];
          CHECK(std::memcmp(start.data(), expected.data(), start.size()) != 0, "nothing happened");
          for (const std::string& name : sets) {
            cpu::use_instruction_set(name);
            for (const int threads : {1, 2}) {
              CHECK(Problem(rule, type, variant, fenced, sizes()).step(threads) == expected,
                    "%s variant %d type %d differs on %s with %d threads", info.name, variant,
                    int(type), name.c_str(), threads);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedopt

int main() {
  fusedopt::test_instruction_sets();
  return fusedopt::report();
}
