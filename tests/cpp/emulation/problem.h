// A small optimizer for the tests: tensors of any types, alignments and strides between sentinels,
// in two copies. One is given to the code under test; the other is stepped by the rules themselves,
// element by element.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/control.h"
#include "core/rule_info.h"
#include "core/scalars.h"
#include "core/sum_order.h"
#include "cuda/runtime.h"
#include "cuda/types.h"
#include "rules/common.h"

namespace fusedopt::test {

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  if (++failures <= 20) fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// A plan's memory, in the place of torch's.
constexpr auto device_memory = &cuda::allocate_during_capture;

// Where a rule stands among all_rules().
inline size_t rule_index(const std::string& name) {
  size_t index = 0;
  while (all_rules().begin()[index].name != name) ++index;
  return index;
}

// Numbers that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  int below(int limit) { return static_cast<int>(bits() % limit); }

 private:
  uint64_t state_;
};

inline double read(DType type, const std::byte* from) {
  const auto value = [&](auto storage) {
    memcpy(&storage, from, sizeof(storage));
    return load_as<double>(storage);
  };
  switch (type) {
    case DType::kFloat32:
      return value(float{});
    case DType::kFloat64:
      return value(double{});
    case DType::kFloat16:
      return value(Float16{});
    default:
      return value(BFloat16{});
  }
}

inline void write(DType type, std::byte* to, double x) {
  const auto value = [&](auto storage) {
    store_as(storage, x);
    memcpy(to, &storage, sizeof(storage));
  };
  switch (type) {
    case DType::kFloat32:
      return value(float{});
    case DType::kFloat64:
      return value(double{});
    case DType::kFloat16:
      return value(Float16{});
    default:
      return value(BFloat16{});
  }
}

// Memory of `span` elements, `misalignment` elements behind a multiple of 64 bytes, between
// sentinels.
class Buffer {
 public:
  Buffer(DType type, int64_t span, int misalignment)
      : type_(type),
        offset_(kGuard + misalignment * size_of(type)),
        size_((offset_ + span * size_of(type) + 2 * kGuard) / kGuard * kGuard),
        memory_(static_cast<std::byte*>(aligned_alloc(kGuard, size_)), &free) {
    memset(memory_.get(), 0x5a, size_);
  }
  std::byte* at(int64_t element) const {
    return memory_.get() + offset_ + element * size_of(type_);
  }
  double get(int64_t element) const { return read(type_, at(element)); }
  void set(int64_t element, double x) { write(type_, at(element), x); }
  bool same_bytes(const Buffer& other) const {
    return memcmp(memory_.get(), other.memory_.get(), size_) == 0;
  }
  void copy_from(const Buffer& other) { memcpy(memory_.get(), other.memory_.get(), size_); }

 private:
  static constexpr int64_t kGuard = 64;
  DType type_;
  int64_t offset_;
  int64_t size_;
  std::unique_ptr<std::byte, void (*)(void*)> memory_;
};

// Of parameter, gradient and states, the last one also of all further states.
struct Types {
  Types(const cuda::TypeCombo& usual) : all{usual.param, usual.grad, usual.state} {}
  Types(std::initializer_list<DType> mixed) : all(mixed) {}
  DType operator[](size_t operand) const { return all[std::min(operand, all.size() - 1)]; }
  std::string text() const {
    std::string names;
    for (DType type : all) names.append(names.empty() ? "" : "/").append(cuda::name_of(type));
    return names;
  }

  std::vector<DType> all;
};

struct TensorSpec {
  int64_t numel;
  Types types;
  int group = 0;
  std::vector<int> misalignments = {0};  // of param, grad, states; in turn
  std::vector<int64_t> layout = {};      // see core/table.h; empty: dense
};

struct Tensor {
  TensorSpec spec;
  std::vector<Buffer> mine, reference;  // param, grad, states
  float step = 0.0f, reference_step = 0.0f;
  float scalars[kMaxStates] = {0.5f, 0.5f, 0.5f, 0.5f};  // from the rule's first one on
  float reference_scalars[kMaxStates] = {0.5f, 0.5f, 0.5f, 0.5f};

  Tensor(const TensorSpec& spec_, int states) : spec(spec_) {
    for (int operand = 0; operand < 2 + states; ++operand) {
      const int misalignment = spec.misalignments[operand % spec.misalignments.size()];
      const int64_t span = spec.numel == 0 ? 0 : offset(spec.numel - 1, operand) + 1;
      mine.emplace_back(spec.types[operand], span, misalignment);
      reference.emplace_back(spec.types[operand], span, misalignment);
    }
  }
  // Strides are not negative, so that the last element stands at the largest offset.
  int64_t offset(int64_t index, int operand) const {
    if (spec.layout.empty()) return index;
    int64_t result = 0;
    for (int64_t d = spec.layout[0] - 1; d >= 0; --d) {
      const int64_t size = Layout::sizes(spec.layout.data())[d];
      result += index % size * Layout::strides(spec.layout.data(), operand)[d];
      index /= size;
    }
    return result;
  }
  void set(int operand, int64_t index, double x) {
    mine[operand].set(offset(index, operand), x);
    reference[operand].copy_from(mine[operand]);
  }
};

// What a step is asked for, by value; the tests keep the numbers in memory where kernels find them.
struct StepRequest {
  std::optional<float> grad_scale = {};
  std::optional<float> found_inf = {};
  std::optional<double> max_grad_norm = {};
  bool skip_nonfinite = false;
  bool reduce = false;
};

template <typename Rule>
class Problem {
 public:
  Problem(int variant, std::vector<GroupRow> groups, const std::vector<TensorSpec>& specs,
          int piece_length)
      : variant_(variant), states_(rules::count_states<Rule>(variant)), groups(std::move(groups)) {
    for (GroupRow& group : this->groups) group.variant = variant;
    tensors.reserve(specs.size());
    for (const TensorSpec& spec : specs) {
      Tensor& tensor = tensors.emplace_back(spec, states_);
      TensorRow row{};
      const auto operand = [&](int index) -> Operand {
        return {tensor.mine[index].at(0), spec.types[index]};
      };
      row.param = operand(0);
      row.grad = operand(1);
      for (int k = 0; k < states_; ++k) row.state[k] = operand(2 + k);
      for (int k = 0; k < kScalars; ++k) {
        row.state[kMaxStates - kScalars + k] = {&tensor.scalars[k], DType::kFloat32};
      }
      row.step = &tensor.step;
      row.layout = tensor.spec.layout.empty() ? nullptr : tensor.spec.layout.data();
      row.numel = spec.numel;
      row.group = spec.group;
      for (int64_t begin = 0; begin < spec.numel; begin += piece_length) {
        const int64_t length = std::min<int64_t>(piece_length, spec.numel - begin);
        pieces_.push_back({begin, static_cast<int32_t>(length), static_cast<int32_t>(rows.size())});
      }
      rows.push_back(row);
    }
  }

  Table table() const {
    return {rows.data(),          groups.data(),          pieces_.data(),
            int64_t(rows.size()), int64_t(groups.size()), int64_t(pieces_.size())};
  }

  // Parameters and states of every size down to the subnormals and both zeros, states not negative;
  // gradients are multiples of 1/64 below 4, whose sums of squares are exact in every order.
  void fill(uint64_t seed) {
    Random random(seed);
    for (Tensor& tensor : tensors) {
      for (size_t operand = 0; operand < tensor.mine.size(); ++operand) {
        for (int64_t i = 0; i < tensor.spec.numel; ++i) {
          const double unit = (random.below(511) - 255) / 64.0;
          const int exponent = random.below(8) == 0 ? -random.below(30) : -random.below(4);
          const double value = operand == 1 ? unit : std::ldexp(unit, exponent);
          tensor.set(operand, i, operand >= 2 ? std::fabs(value) : value);
        }
      }
    }
  }

  // Which tensors have a gradient.
  void set_grads(const auto& has_grad) {
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i].grad.data = has_grad(i) ? tensors[i].mine[1].at(0) : nullptr;
    }
  }

  // The control block that a step must leave. Keeps the coefficients of the parameters' own norms
  // for reference_update.
  StepControl reference_control(const StepRequest& request) {
    StepControl control{};
    control.unscale = request.grad_scale ? 1.0 / *request.grad_scale : 1.0;
    control.clip = 1.0;
    clips_.assign(rows.size(), 1.0);
    if (request.reduce) {
      std::vector<double> totals(rows.size());
      for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].grad.data == nullptr) continue;
        totals[i] = computes_in_float64(rows[i]) ? reduce_tensor<double>(i, control, clips_[i])
                                                 : reduce_tensor<float>(i, control, clips_[i]);
      }
      control.norm = std::sqrt(add_neighbours(totals.data(), totals.size()));
      if (request.max_grad_norm) {
        control.clip = clip_coefficient(control.norm, *request.max_grad_norm);
      }
    }
    const bool skip = request.found_inf.value_or(0.0f) != 0.0f ||
                      (request.skip_nonfinite && control.nonfinite != 0.0);
    control.skip = skip ? 1.0 : 0.0;
    return control;
  }

  // Steps the reference under this control block.
  void reference_update(const StepControl& control) {
    if (control.skip != 0.0) return;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].grad.data == nullptr) continue;
      tensors[i].reference_step += 1.0f;
      if (computes_in_float64(rows[i])) {
        update_tensor<double>(i, control, clips_[i]);
      } else {
        update_tensor<float>(i, control, clips_[i]);
      }
    }
  }

  void expect_same(const std::string& what) const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& tensor = tensors[i];
      const std::string name = what + ", tensor " + std::to_string(i) + " of " +
                               std::to_string(tensor.spec.numel) + " elements";
      expect(tensor.step == tensor.reference_step, name + ": step counter " +
                                                       std::to_string(tensor.step) + ", expected " +
                                                       std::to_string(tensor.reference_step));
      expect(memcmp(tensor.scalars, tensor.reference_scalars, sizeof(tensor.scalars)) == 0,
             name + ": scalars");
      for (size_t operand = 0; operand < tensor.mine.size(); ++operand) {
        if (tensor.mine[operand].same_bytes(tensor.reference[operand])) continue;
        int64_t at = 0;
        while (at < tensor.spec.numel && same_value(tensor, operand, tensor.offset(at, operand)))
          ++at;
        expect(false, name + ": operand " + std::to_string(operand) +
                          (at < tensor.spec.numel ? " differs at element " + std::to_string(at)
                                                  : " has memory changed between its elements"));
      }
    }
  }

 private:
  static bool same_value(const Tensor& tensor, size_t operand, int64_t at) {
    return memcmp(tensor.mine[operand].at(at), tensor.reference[operand].at(at),
                  size_of(tensor.spec.types[operand])) == 0;
  }

  template <typename T>
  double reduce_tensor(size_t i, StepControl& control, double& clip) {
    const Tensor& tensor = tensors[i];
    const GroupRow& group = groups[tensor.spec.group];
    std::vector<double> lanes((tensor.spec.numel + kStrip - 1) / kStrip * kLanes);
    for (int64_t e = 0; e < tensor.spec.numel; ++e) {
      const T raw = static_cast<T>(tensor.reference[1].get(tensor.offset(e, 1)));
      if (!std::isfinite(raw)) control.nonfinite = 1.0;
      const double x = clamp_value(raw * T(control.unscale), T(group.max_grad_value));
      lanes[e / kStrip * kLanes + e % kLanes] += x * x;
    }
    const double sum = add_neighbours(lanes.data(), lanes.size());
    if (group.max_grad_norm_per_param == INFINITY) return sum;
    const double norm = std::sqrt(sum);
    clip = clip_coefficient(norm, group.max_grad_norm_per_param);
    return (norm * clip) * (norm * clip);
  }

  template <typename T>
  void update_tensor(size_t i, const StepControl& control, double clip) {
    Tensor& tensor = tensors[i];
    const GroupRow& group = groups[tensor.spec.group];
    typename Rule::Hyper hyper;
    memcpy(&hyper, group.hyper, sizeof(hyper));
    if (group.lr != nullptr) {
      hyper.common.lr = read(group.lr_type, static_cast<const std::byte*>(group.lr));
    }
    rules::Scalars<kScalars> scalars{};
    if constexpr (kScalars > 0) {
      for (int k = 0; k < kScalars; ++k) scalars[k] = {tensor.reference_scalars[k], true};
    }
    const auto constants = make_constants<Rule, T>(hyper, tensor.reference_step, scalars);
    if constexpr (kScalars > 0) {
      Rule::advance(hyper, tensor.reference_step, scalars);
      for (int k = 0; k < kScalars; ++k) {
        tensor.reference_scalars[k] = static_cast<float>(scalars[k].value);
      }
    }
    const GradTransform<T> transform{T(control.unscale), T(group.max_grad_value), T(clip),
                                     T(control.clip)};
    for (int64_t e = 0; e < tensor.spec.numel; ++e) {
      with_variant([&](auto variant) {
        constexpr int kStates = rules::count_states<Rule>(variant);
        T state[kStates > 0 ? kStates : 1] = {};
        auto& buffers = tensor.reference;
        for (int k = 0; k < kStates; ++k) {
          state[k] = static_cast<T>(buffers[2 + k].get(tensor.offset(e, 2 + k)));
        }
        T param = static_cast<T>(buffers[0].get(tensor.offset(e, 0)));
        const T grad = transform(static_cast<T>(buffers[1].get(tensor.offset(e, 1))));
        Rule::template update<variant>(constants, param, grad, state);
        buffers[0].set(tensor.offset(e, 0), param);
        for (int k = 0; k < kStates; ++k) buffers[2 + k].set(tensor.offset(e, 2 + k), state[k]);
      });
    }
  }

  // Calls use(std::integral_constant of the variant).
  template <int kVariant = 0>
  void with_variant(const auto& use) {
    if (kVariant == variant_) return use(std::integral_constant<int, kVariant>{});
    if constexpr (kVariant + 1 < Rule::kVariants) with_variant<kVariant + 1>(use);
  }

  static constexpr int kScalars = rules::kScalarCount<Rule>;

  int variant_;
  int states_;
  std::vector<Piece> pieces_;
  std::vector<double> clips_;

 public:
  std::vector<GroupRow> groups;
  std::vector<TensorRow> rows;
  std::vector<Tensor> tensors;
};

}  // namespace fusedopt::test
