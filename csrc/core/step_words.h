// The part of a table that changes from step to step, as words that are compared with what a device
// has and sent where they differ.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "core/table.h"

namespace fusedopt {

constexpr size_t kGroupWords = sizeof(GroupRow) / sizeof(int64_t);
static_assert(kGroupWords * sizeof(int64_t) == sizeof(GroupRow));
static_assert(sizeof(void*) == sizeof(int64_t));

// Fills `words` with the group rows and, behind them, the address of every row's gradient.
inline void write_step_words(const GroupRow* groups, size_t group_count, const TensorRow* tensors,
                             std::vector<int64_t>& words) {
  const size_t grads_at = group_count * kGroupWords;
  if (grads_at > 0) std::memcpy(words.data(), groups, grads_at * sizeof(int64_t));
  for (size_t i = grads_at; i < words.size(); ++i) {
    words[i] = reinterpret_cast<int64_t>(tensors[i - grads_at].grad.data);
  }
}

// The range [first, last) in which `held` differs from `words`; (0, 0) where it does not.
inline std::pair<size_t, size_t> difference(const std::vector<int64_t>& words,
                                            const int64_t* held) {
  const size_t first = std::mismatch(words.begin(), words.end(), held).first - words.begin();
  size_t last = words.size();
  if (first == last) return {0, 0};
  while (words[last - 1] == held[last - 1]) --last;
  return {first, last};
}

}  // namespace fusedopt
