// The apply pass of one rule (FUSEDOPT_RULE) for one instruction set (FUSEDOPT_ISA): reads
// parameter, gradient and state once, writes parameter and state once.
#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "core/control.h"
#include "core/scalars.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/operand.h"
#include FUSEDOPT_RULE_HEADER

namespace fusedopt::cpu {
namespace FUSEDOPT_ISA {
namespace {

using Rule = rules::FUSEDOPT_RULE;

constexpr int kScalars = rules::kScalarCount<Rule>;

constexpr int array_length(int variant) { return std::max(1, rules::count_states<Rule>(variant)); }

// S: how the operands lie in memory; T: what the rule computes in.
template <int kVariant, bool kTransform, typename T, typename S>
void update_block(const typename Rule::template Constants<T>& constants,
                  const GradTransform<T>& transform, S* param, const S* grad,
                  const std::array<S*, kMaxStates>& states, int count) {
  constexpr int kStates = array_length(kVariant);
  constexpr int kUsed = rules::count_states<Rule>(kVariant);
  const auto c = constants;
  const auto t = transform;
  S* const memory[] = {states[0], states[1], states[2], states[3]};
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    T state[kStates] = {};
    for (int k = 0; k < kUsed; ++k) state[k] = load_as<T>(memory[k][i]);
    T value = load_as<T>(param[i]);
    T g = load_as<T>(grad[i]);
    if constexpr (kTransform) g = t(g);
    Rule::template update<kVariant>(c, value, g, state);
    store_as(param[i], value);
    for (int k = 0; k < kUsed; ++k) store_as(memory[k][i], state[k]);
  }
}

// Whether every operand of a row lies densely in one order and is of one type.
template <int kVariant>
bool is_uniform(const TensorRow& row, DType type) {
  bool uniform = row.layout == nullptr && row.param.type == type && row.grad.type == type;
  for (int k = 0; k < rules::count_states<Rule>(kVariant); ++k) {
    uniform &= row.state[k].type == type;
  }
  return uniform;
}

// A piece of a row whose operands are all arrays of S.
template <int kVariant, bool kTransform, typename S, typename T>
void update_uniform(const typename Rule::template Constants<T>& constants,
                    const GradTransform<T>& transform, const TensorRow& row, const Piece& piece) {
  constexpr int kUsed = rules::count_states<Rule>(kVariant);
  S* const param = static_cast<S*>(row.param.data) + piece.begin;
  const S* const grad = static_cast<const S*>(row.grad.data) + piece.begin;
  std::array<S*, kMaxStates> states{};
  for (int k = 0; k < kUsed; ++k) states[k] = static_cast<S*>(row.state[k].data) + piece.begin;
  if constexpr (!std::is_same_v<S, Float16>) {
    update_block<kVariant, kTransform>(constants, transform, param, grad, states, piece.length);
  } else {
    // g++ 12 does not vectorise the conversion of halves. Few at a time, so that the reads of all
    // operands stay in flight together.
    constexpr int kFew = 64;
    T buffers[2 + array_length(kVariant)][kFew];
    std::array<T*, kMaxStates> staged{};
    for (int k = 0; k < kUsed; ++k) staged[k] = buffers[2 + k];
    for (int at = 0; at < piece.length; at += kFew) {
      const int count = std::min(kFew, piece.length - at);
      widen_run(param + at, count, buffers[0]);
      widen_run(grad + at, count, buffers[1]);
      for (int k = 0; k < kUsed; ++k) widen_run(states[k] + at, count, staged[k]);
      update_block<kVariant, kTransform>(constants, transform, buffers[0], buffers[1], staged,
                                         count);
      narrow_run(buffers[0], count, param + at);
      for (int k = 0; k < kUsed; ++k) narrow_run(staged[k], count, states[k] + at);
    }
  }
}

// A piece of any other row, through buffers of the compute type.
template <int kVariant, bool kTransform, typename T>
void update_staged(const typename Rule::template Constants<T>& constants,
                   const GradTransform<T>& transform, const TensorRow& row, const Piece& piece) {
  constexpr int kUsed = rules::count_states<Rule>(kVariant);
  const Array<T> param{row.param, row.layout, 0};
  const Array<T> grad{row.grad, row.layout, 1};
  const auto state = [&](int k) { return Array<T>{row.state[k], row.layout, 2 + k}; };
  std::array<T*, kMaxStates> states{};
  T buffers[2 + array_length(kVariant)][kBlock];
  const int64_t end = piece.begin + piece.length;
  for (int64_t at = piece.begin; at < end;) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    T* const p = param.read(at, count, buffers[0]);
    const T* const g = grad.read(at, count, buffers[1]);
    for (int k = 0; k < kUsed; ++k) states[k] = state(k).read(at, count, buffers[2 + k]);
    update_block<kVariant, kTransform>(constants, transform, p, g, states, count);
    param.write(at, count, p);
    for (int k = 0; k < kUsed; ++k) state(k).write(at, count, states[k]);
    at += count;
  }
}

template <int kVariant, bool kTransform, typename T>
void update_piece(const typename Rule::template Constants<T>& constants,
                  const GradTransform<T>& transform, const TensorRow& row, const Piece& piece) {
  if (is_uniform<kVariant>(row, Array<T>::kOwnType)) {
    return update_uniform<kVariant, kTransform, T>(constants, transform, row, piece);
  }
  if constexpr (std::is_same_v<T, float>) {
    if (is_uniform<kVariant>(row, DType::kBFloat16)) {
      return update_uniform<kVariant, kTransform, BFloat16>(constants, transform, row, piece);
    }
    if (is_uniform<kVariant>(row, DType::kFloat16)) {
      return update_uniform<kVariant, kTransform, Float16>(constants, transform, row, piece);
    }
  }
  update_staged<kVariant, kTransform>(constants, transform, row, piece);
}

// Where run-time flags become template arguments.
template <typename T, size_t... kVariants>
constexpr auto piece_updates(std::index_sequence<kVariants...>) {
  using Update = void (*)(const typename Rule::template Constants<T>&, const GradTransform<T>&,
                          const TensorRow&, const Piece&);
  return std::array<std::array<Update, 2>, sizeof...(kVariants)>{
      {{&update_piece<kVariants, false, T>, &update_piece<kVariants, true, T>}...}};
}

// Constants are computed again only where the group, the step or the scalars differ from the piece
// before.
template <typename T>
class ConstantsCache {
 public:
  const typename Rule::template Constants<T>& get(const GroupRow* group, const TensorRow& row) {
    const double step = next_step(row);
    const auto scalars = load_scalars<kScalars>(row);
    if (group != group_ || step != step_ || !same_scalars(scalars, scalars_)) {
      typename Rule::Hyper hyper;
      static_assert(sizeof(hyper) <= sizeof(group->hyper));
      memcpy(&hyper, group->hyper, sizeof(hyper));
      constants_ = make_constants<Rule, T>(hyper, step, scalars);
      group_ = group;
      step_ = step;
      scalars_ = scalars;
    }
    return constants_;
  }

 private:
  const GroupRow* group_ = nullptr;
  double step_ = 0.0;
  rules::Scalars<kScalars> scalars_{};
  typename Rule::template Constants<T> constants_ =
      make_constants<Rule, T>(typename Rule::Hyper{}, 1.0, scalars_);
};

template <typename T>
void apply_piece(const Job& job, const TensorRow& row, const Piece& piece,
                 ConstantsCache<T>& cache) {
  static constexpr auto kUpdates = piece_updates<T>(std::make_index_sequence<Rule::kVariants>());
  const GroupRow* group = &job.table.groups[row.group];
  const double param_clip = job.param_clips == nullptr ? 1.0 : job.param_clips[piece.tensor];
  const GradTransform<T> transform{T(job.control.unscale), T(group->max_grad_value), T(param_clip),
                                   T(job.control.clip)};
  kUpdates[group->variant][job.transforms](cache.get(group, row), transform, row, piece);
}

// Asks for the beginning of a small piece's memory while the one before is worked on; large pieces
// have the hardware's prefetchers. Always inlined: g++ drops the call of a function that only
// prefetches.
__attribute__((always_inline)) inline void prefetch(const Job& job, const Piece& piece) {
  constexpr int kBytes = 256;
  const TensorRow& row = job.table.tensors[piece.tensor];
  if (row.grad.data == nullptr || piece.length > 1024) return;
  __builtin_prefetch(row.step, 1);
  for (int at = 0; at < kBytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(row.param.data) + at, 1);
    __builtin_prefetch(static_cast<const char*>(row.grad.data) + at);
    for (const Operand& state : row.state) {
      __builtin_prefetch(static_cast<const char*>(state.data) + at, 1);
    }
  }
}

}  // namespace

#define FUSEDOPT_CONCAT(a, b) a##b
#define FUSEDOPT_NAME(a, b) FUSEDOPT_CONCAT(a, b)

void FUSEDOPT_NAME(apply_, FUSEDOPT_RULE)(const Job& job, int64_t first, int64_t last) {
  ConstantsCache<float> floats;
  ConstantsCache<double> doubles;
  for (const Piece* piece = job.table.pieces + first; piece < job.table.pieces + last; ++piece) {
    const TensorRow& row = job.table.tensors[piece->tensor];
    if (piece + 1 < job.table.pieces + last) prefetch(job, piece[1]);
    if (row.grad.data == nullptr) continue;
    if (computes_in_float64(row)) {
      apply_piece(job, row, *piece, doubles);
    } else {
      apply_piece(job, row, *piece, floats);
    }
  }
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt::cpu
