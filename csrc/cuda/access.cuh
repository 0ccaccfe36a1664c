// How the apply pass reaches the elements of a piece. A piece is a list of accesses, each of up to
// kVector elements: first whole vectors, then whatever cannot be reached in aligned 16 bytes. All
// of them meet in the same registers, so that a kernel holds the code of its rule once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/control.h"
#include "cuda/kernels.h"
#include "cuda/operand.cuh"
#include "rules/common.h"

namespace fusedopt::cuda {

// The types of one apply kernel and what follows from them.
template <typename Rule_, int kVariant_, typename Param_, typename Grad_, typename State_>
struct ApplyTypes {
  using Rule = Rule_;
  using Param = Param_;
  using Grad = Grad_;
  using State = State_;
  using Compute = ComputeOf<Param>;
  static constexpr int kVariant = kVariant_;
  static constexpr int kStates = rules::count_states<Rule>(kVariant);
  static constexpr int kStateArray = kStates > 0 ? kStates : 1;
  // Elements of an access: 16 bytes of the narrowest operand (of mixed ones, of the type to compute
  // in), so that every operand is read in whole 16 bytes. That keeps enough bytes under way: an
  // H200 needs latency x bandwidth, 0.8 us x 4.8 TB/s / 132 = 29 KB for each multiprocessor, and
  // 1024 resident threads with 32 bytes (SGD without momentum) to 80 bytes (AMSGrad) have 32 to 80
  // KB.
  static constexpr int kVector =
      kAccessBytes / static_cast<int>(std::min({sizeof(Param), sizeof(Grad), sizeof(State)}));
  // Values of the compute type that an access holds, and blocks that a multiprocessor shall hold:
  // as many as there are registers for, which with mixed types also hold those types.
  static constexpr int kRegisters = kVector * (2 + kStates);
  static constexpr bool kFloat = sizeof(Compute) == sizeof(float);
  static constexpr int kBlocks = kIsMixed<Param>              ? (kFloat ? 3 : 2)
                                 : kFloat && kRegisters <= 16 ? 4
                                                              : 3;
};

// The values of one access on their way through registers.
template <typename Types>
struct Elements {
  using T = typename Types::Compute;
  T param[Types::kVector];
  T grad[Types::kVector];
  T state[Types::kStateArray][Types::kVector];

  // `numbers` stand in shared memory.
  template <typename Numbers>
  FUSEDOPT_DEVICE void update(const Numbers& numbers) {
    transform(numbers.transform, numbers.clamps, numbers.scales);
#pragma unroll
    for (int i = 0; i < Types::kVector; ++i) {
      T own[Types::kStateArray];
#pragma unroll
      for (int k = 0; k < Types::kStates; ++k) own[k] = state[k][i];
      reread_shared_memory();
      Types::Rule::template update<Types::kVariant>(numbers.constants, param[i], grad[i], own);
#pragma unroll
      for (int k = 0; k < Types::kStates; ++k) state[k][i] = own[k];
    }
  }

 private:
  // Leaves out what changes nothing.
  FUSEDOPT_DEVICE void transform(const GradTransform<T>& transform, int clamps, int scales) {
    reread_shared_memory();
    if (clamps) {
#pragma unroll
      for (T& x : grad) x = transform(x);
    } else if (scales) {
#pragma unroll
      for (T& x : grad) x = transform.scaled(x);
    }
  }
};

template <typename Types>
class PieceAccess {
 public:
  // `grad` null: a piece without accesses.
  FUSEDOPT_DEVICE PieceAccess(const TensorRow& row, const void* grad, const Piece& piece)
      : param_(row.param),
        grad_(Operand{const_cast<void*>(grad), row.grad.type}),
        layout_(row.layout),
        begin_(piece.begin) {
#pragma unroll
    for (int k = 0; k < Types::kStates; ++k) state_[k] = OperandAccess<State>(row.state[k]);
    const int length = grad != nullptr ? piece.length : 0;
    if (layout_ != nullptr) {
      singles_ = count_ = length;
      return;
    }
    param_.advance(begin_);
    grad_.advance(begin_);
#pragma unroll
    for (int k = 0; k < Types::kStates; ++k) state_[k].advance(begin_);
    const int head = vector_head();
    head_ = min(head < 0 ? length : head, length);
    vectors_ = (length - head_) / Types::kVector;
    singles_ = length - vectors_ * Types::kVector;
    constexpr int kRound = kThreads * Types::kVector;
    const bool few =
        singles_ <= kThreads;  // one element an access, else a round of kThreads accesses
    count_ = vectors_ + (few ? singles_ : (singles_ + kRound - 1) / kRound * kThreads);
  }

  FUSEDOPT_DEVICE int count() const { return count_; }

  // Asks for about what this thread will read first, if rows are dense, before anything is known of
  // alignment; needs no registers afterwards.
  FUSEDOPT_DEVICE static void prefetch(const TensorRow& row, const void* grad, const Piece& piece) {
    const int at = threadIdx.x * Types::kVector;
    if (row.layout != nullptr || grad == nullptr || at >= piece.length) return;
    OperandAccess<Param>(row.param).prefetch(piece.begin + at);
    OperandAccess<Grad>({const_cast<void*>(grad), row.grad.type}).prefetch(piece.begin + at);
#pragma unroll
    for (int k = 0; k < Types::kStates; ++k) {
      OperandAccess<State>(row.state[k]).prefetch(piece.begin + at);
    }
  }

  // Reads the elements of access i; those that it does not have stay as they are.
  FUSEDOPT_DEVICE void load(int i, Elements<Types>& to) const {
    const bool vector = i < vectors_;
    if (vector) {
      const int at = head_ + i * Types::kVector;
      param_.fetch_vector(at, to.param);
      grad_.fetch_vector(at, to.grad);
#pragma unroll
      for (int k = 0; k < Types::kStates; ++k) state_[k].fetch_vector(at, to.state[k]);
    } else {
      for_each_single(i, [&](int e, const auto& at) {
        param_.fetch(at(0), to.param[e]);
        grad_.fetch(at(1), to.grad[e]);
#pragma unroll
        for (int k = 0; k < Types::kStates; ++k) state_[k].fetch(at(2 + k), to.state[k][e]);
      });
    }
    param_.settle(to.param, vector);
    grad_.settle(to.grad, vector);
#pragma unroll
    for (int k = 0; k < Types::kStates; ++k) state_[k].settle(to.state[k], vector);
  }

  FUSEDOPT_DEVICE void store(int i, const Elements<Types>& from) const {
    if (i < vectors_) {
      const int at = head_ + i * Types::kVector;
      param_.store_vector(at, from.param);
#pragma unroll
      for (int k = 0; k < Types::kStates; ++k) state_[k].store_vector(at, from.state[k]);
    } else {
      for_each_single(i, [&](int e, const auto& at) {
        param_.store(at(0), from.param[e]);
#pragma unroll
        for (int k = 0; k < Types::kStates; ++k) state_[k].store(at(2 + k), from.state[k][e]);
      });
    }
  }

 private:
  using Param = typename Types::Param;
  using Grad = typename Types::Grad;
  using State = typename Types::State;

  // How many elements stand before the first vector of every operand; -1 when there is none,
  // because the operands are misaligned by different amounts.
  FUSEDOPT_DEVICE int vector_head() const {
    int head = max(param_.vector_head(), grad_.vector_head());
#pragma unroll
    for (int k = 0; k < Types::kStates; ++k) head = max(head, state_[k].vector_head());
    bool common = param_.takes_vector(head) && grad_.takes_vector(head);
#pragma unroll
    for (int k = 0; k < Types::kStates; ++k) common = common && state_[k].takes_vector(head);
    return common ? head : -1;
  }

  // Calls visit(e, at) for the elements of access i, which is no vector: element e of the access
  // stands at at(operand). Neighbouring accesses have neighbouring elements, so that a warp reads
  // whole sectors.
  template <typename Visit>
  FUSEDOPT_DEVICE void for_each_single(int i, Visit visit) const {
    if (layout_ != nullptr) {
      int64_t offsets[2 + Types::kStates];
      strided_offsets(layout_, begin_ + i, offsets);
      visit(0, [&offsets](int operand) { return offsets[operand]; });
      return;
    }
    const int access = i - vectors_;
    const int first = access / kThreads * kThreads * Types::kVector + access % kThreads;
#pragma unroll
    for (int e = 0; e < Types::kVector; ++e) {
      const int single = first + e * kThreads;
      const int at = single < head_ ? single : single + vectors_ * Types::kVector;
      if (single < singles_) visit(e, [at](int) { return at; });
    }
  }

  OperandAccess<Param> param_;
  OperandAccess<Grad> grad_;
  OperandAccess<State> state_[Types::kStateArray];
  const int64_t* layout_;  // not null: every element is a single one, and the pointers are the
                           // tensor's, not the piece's
  int64_t begin_;
  int head_ = 0;     // elements before the first vector
  int vectors_ = 0;  // accesses [0, vectors) are vectors
  int singles_;      // elements outside of vectors
  int count_;        // of accesses
};

}  // namespace fusedopt::cuda
