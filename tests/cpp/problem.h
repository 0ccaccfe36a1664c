// A table of tensors over memory of its own and a step of it on the CPU, for the C++ tests.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "core/control.h"
#include "core/numbers.h"
#include "core/rule_info.h"
#include "cpu/passes.h"

namespace fusedopt {

// Tensors of these sizes with the memory that a step works on; `fenced` leaves an element between
// them, so that they are aligned in all ways.
struct Problem {
  Problem(size_t rule, DType type, int variant, bool fenced, const std::vector<int64_t>& sizes)
      : rule(rule) {
    std::mt19937 random(7);
    int64_t total = 0;
    for (const int64_t size : sizes) total += size + fenced;
    const int width = size_of(type);
    for (std::vector<uint8_t>& memory : operands) memory.resize((total + 1) * width);
    for (size_t k = 0; k < 2 + kMaxStates; ++k) {
      for (int64_t i = 0; i < total; ++i) {
        const float x = std::uniform_real_distribution<float>(-1, 1)(random);
        // The first state is an average of squares, or may be; centered RMSprop subtracts the
        // square of the second.
        set(k, i, type, k < 2 ? x : k == 2 ? 1 + x * x : 0.5f * x * x);
      }
    }
    steps.assign(sizes.size(), 3.0f);
    const size_t scalar_count = all_rules().data[rule].scalars.size;
    scalars.assign(sizes.size() * scalar_count, 0.5f);
    int64_t at = fenced;
    for (size_t t = 0; t < sizes.size(); ++t) {
      TensorRow row{};
      row.param = {&operands[0][at * width], type};
      row.grad = {&operands[1][at * width], type};
      for (int k = 0; k < kMaxStates; ++k) row.state[k] = {&operands[2 + k][at * width], type};
      for (size_t k = 0; k < scalar_count; ++k) {
        row.state[kMaxStates - scalar_count + k] = {&scalars[t * scalar_count + k],
                                                    DType::kFloat32};
      }
      row.step = &steps[t];
      row.numel = sizes[t];
      rows.push_back(row);
      at += sizes[t] + fenced;
      for (int64_t begin = 0; begin < sizes[t]; begin += cpu::kPieceLength) {
        const int64_t length = std::min<int64_t>(cpu::kPieceLength, sizes[t] - begin);
        pieces.push_back({begin, static_cast<int32_t>(length), static_cast<int32_t>(t)});
      }
    }
    group.max_grad_value = 0.7;
    group.max_grad_norm_per_param = 0.9;
    group.variant = variant;
    const double hyper[] = {0.01, 0.1, 0.0, 0.0, 0.9, 0.95, 1e-6};
    std::memcpy(group.hyper, hyper, sizeof(hyper));
  }

  void set(size_t operand, int64_t index, DType type, float x) {
    uint8_t* const at = &operands[operand][index * size_of(type)];
    switch (type) {
      case DType::kFloat32:
        return store_as(*reinterpret_cast<float*>(at), x);
      case DType::kFloat64:
        return store_as(*reinterpret_cast<double*>(at), x);
      case DType::kFloat16:
        return store_as(*reinterpret_cast<Float16*>(at), x);
      case DType::kBFloat16:
        return store_as(*reinterpret_cast<BFloat16*>(at), x);
    }
  }

  // A step with every clip, and everything it left behind.
  std::vector<uint8_t> step(int threads) {
    const std::vector<int64_t> tasks = cpu::cut_tasks(pieces);
    std::vector<Partial> partials(pieces.size());
    std::vector<double> clips;
    cpu::Job job{};
    job.table = {rows.data(),          &group, pieces.data(),
                 int64_t(rows.size()), 1,      int64_t(pieces.size())};
    job.tasks = tasks.data();
    job.task_count = static_cast<int64_t>(tasks.size()) - 1;
    job.partials = partials.data();
    job.transforms = true;
    job.control.unscale = 0.5;
    const Partial found = cpu::reduce(job, clips, threads);
    job.control = settle(0.5, found.sum_squares, found.nonfinite != 0, false, 1.0, false);
    cpu::apply(job, rule, threads);
    std::vector<uint8_t> all;
    for (const auto& memory : operands) all.insert(all.end(), memory.begin(), memory.end());
    const auto* numbers = reinterpret_cast<const uint8_t*>(scalars.data());
    all.insert(all.end(), numbers, numbers + scalars.size() * sizeof(float));
    const auto* control = reinterpret_cast<const uint8_t*>(&job.control);
    all.insert(all.end(), control, control + sizeof(job.control));
    for (const float step : steps) CHECK(step == 4.0f, "counter is %g", step);
    return all;
  }

  std::vector<uint8_t> operands[2 + kMaxStates];
  std::vector<float> steps, scalars;
  std::vector<TensorRow> rows;
  std::vector<Piece> pieces;
  GroupRow group{};
  size_t rule;
};

}  // namespace fusedopt
