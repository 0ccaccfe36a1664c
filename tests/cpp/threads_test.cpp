// Tests that many threads in one step, and two steps at once, leave the bits that one thread
// leaves. `make test-tsan` runs it under ThreadSanitizer.
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "problem.h"

namespace fusedopt {
namespace {

// Tensors of several tasks, of one, and many that share a task.
std::vector<int64_t> sizes() {
  std::vector<int64_t> all(40, 777);
  for (const int64_t pieces : {5, 1, 3}) all.push_back(pieces * cpu::kPieceLength - 11);
  return all;
}

void test_threads(size_t rule, DType type) {
  constexpr int kThreads = 4;
  const int variant = (1 << all_rules().data[rule].variants.size) - 1;
  const auto make = [&] { return Problem(rule, type, variant, true, sizes()); };
  const auto expected = make().step(1);
  std::vector<uint8_t> results[2];
  std::thread other([&] { results[1] = make().step(kThreads); });
  results[0] = make().step(kThreads);
  other.join();
  for (const auto& result : results) {
    CHECK(result == expected, "%s, type %d", all_rules().data[rule].name, int(type));
  }
}

}  // namespace
}  // namespace fusedopt

int main() {
  using namespace fusedopt;
  for (size_t rule = 0; rule < all_rules().size; ++rule) {
    for (const DType type : {DType::kFloat32, DType::kFloat16}) test_threads(rule, type);
  }
  return report();
}
