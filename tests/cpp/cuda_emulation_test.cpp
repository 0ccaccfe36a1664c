// The CUDA kernels and launchers, run on the CPU, against the rules applied element by element:
// every rule, variant and combination of types, to the bit.
#include "cuda/kernels.h"
#include "emulation.h"
#include "emulation/problem.h"
#include "rules_headers.inc"

namespace fusedopt::test {
namespace {

// The usual combinations of types, and others.
const std::vector<Types>& all_types() {
  constexpr DType f16 = DType::kFloat16, bf16 = DType::kBFloat16;
  constexpr DType f32 = DType::kFloat32, f64 = DType::kFloat64;
  static const std::vector<Types> types = [] {
    std::vector<Types> all(std::begin(cuda::kUsualTypes), std::end(cuda::kUsualTypes));
    all.insert(all.end(), {{f32, f64, f32},
                           {f32, f32, f16, f64, bf16},
                           {bf16, f32, f32},
                           {f16, bf16, f64, f16},
                           {f64, f32, f64},
                           {f64, f64, f32, f16},
                           {f64, f16, bf16}});
    return all;
  }();
  return types;
}

// Hyperparameters by name, so that a new rule needs nothing here.
template <typename Rule>
GroupRow make_group(int which) {
  GroupRow group{};
  for (size_t i = 0; i < Rule::kHyperNames.size(); ++i) {
    const std::string name = Rule::kHyperNames[i];
    const bool flag = name == "maximize" || name == "nesterov" || name == "decoupled_weight_decay";
    group.hyper[i] = flag                     ? (which >> (i % 2)) & 1
                     : name == "lr"           ? 0.01 * (which + 1)
                     : name == "weight_decay" ? 0.1 * which
                     : name == "lr_decay"     ? 0.01
                     : name == "eps"          ? 1e-6
                     : name == "dampening"    ? 0.25 * which
                     : name == "betas.0"      ? 0.45 + 0.2 * which
                                              : 0.9 - 0.1 * which;
  }
  group.max_grad_value = INFINITY;
  group.max_grad_norm_per_param = INFINITY;
  return group;
}

// The values that kernels find behind pointers.
struct Device {
  float grad_scale;
  float found_inf;
  StepControl control;
};

template <typename Rule>
void run_step(cuda::DevicePlan& plan, Problem<Rule>& problem, const StepRequest& request,
              const std::string& what) {
  Device device{};
  memset(&device.control, 0x77, sizeof(device.control));
  device.grad_scale = request.grad_scale.value_or(0.0f);
  device.found_inf = request.found_inf.value_or(0.0f);
  const cuda::StepInputs inputs{request.grad_scale ? &device.grad_scale : nullptr, nullptr,
                                request.found_inf ? &device.found_inf : nullptr};
  const StepControl expected = problem.reference_control(request);
  plan.update(problem.rows.data(), problem.groups.data(), 0);
  if (request.reduce) {
    plan.reduce({inputs, request.max_grad_norm.value_or(INFINITY), request.skip_nonfinite,
                 &device.control, nullptr},
                0);
  }
  plan.apply({inputs, &device.control, request.reduce, request.reduce}, 0);
  const StepControl& control = device.control;
  const auto same = [](double a, double b) { return a == b || (a != a && b != b); };
  expect(control.unscale == expected.unscale, what + ": unscale");
  expect(same(control.clip, expected.clip), what + ": clip " + std::to_string(control.clip) +
                                                ", expected " + std::to_string(expected.clip));
  expect(same(control.norm, expected.norm), what + ": norm " + std::to_string(control.norm) +
                                                ", expected " + std::to_string(expected.norm));
  expect(control.nonfinite == expected.nonfinite, what + ": nonfinite");
  expect(control.skip == expected.skip, what + ": skip");
  problem.reference_update(control);
  problem.expect_same(what);
}

// Every size to 70 and around the borders of pieces; aligned, misaligned together, and misaligned
// apart; strided.
std::vector<TensorSpec> make_specs(const Types& types, int piece) {
  std::vector<TensorSpec> specs;
  for (int size = 0; size <= 70; ++size) {
    const int shift = size % 9;
    specs.push_back({size, types, size % 2,
                     size % 3 == 0   ? std::vector<int>{0}
                     : size % 3 == 1 ? std::vector<int>{shift}
                                     : std::vector<int>{0, shift, 1}});
  }
  for (int size : {piece - 1, piece, piece + 1, 3 * piece + 5}) {
    specs.push_back({size, types, 1, {0}});
    specs.push_back({size, types, 0, {3}});
    specs.push_back({size, types, 1, {0, 1}});
  }
  // 6 x 5 elements: the parameter transposed, the gradient expanded along rows with a gap, states
  // in order.
  std::vector<int64_t> layout = {2, 6, 5, 1, 6, 8, 1};
  for (int k = 0; k < kMaxStates; ++k) layout.insert(layout.end(), {5, 1});
  specs.push_back({30, types, 0, {1}, layout});
  return specs;
}

template <typename Rule>
void test_rule(const std::string& name) {
  // A piece takes more than one round of kThreads accesses of 8, misaligned or not.
  constexpr int kPiece = 4096;
  for (int variant = 0; variant < Rule::kVariants; ++variant) {
    for (size_t i = 0; i < all_types().size(); ++i) {
      // The kernels for mixed types are the same for all of them: half of them for each variant.
      if (i >= std::size(cuda::kUsualTypes) && i % 2 != variant % 2u) continue;
      const Types& types = all_types()[i];
      const std::string what = name + " variant " + std::to_string(variant) + " of " + types.text();
      Problem<Rule> problem(variant, {make_group<Rule>(0), make_group<Rule>(1)},
                            make_specs(types, kPiece), kPiece);
      problem.fill(variant + 1);
      const size_t rule = rule_index(name);
      cuda::DevicePlan plan(rule, 0, problem.table(), device_memory, 0);

      problem.set_grads([](size_t i) { return i % 4 != 3; });
      run_step(plan, problem, {}, what + ", first step");
      emulation::set_reversed(true);
      problem.set_grads([](size_t i) { return i % 5 != 0; });
      run_step(plan, problem, {.grad_scale = 3.0f, .found_inf = 0.0f}, what + ", unscaled");
      run_step(plan, problem, {.found_inf = 2.0f}, what + ", skipped by found_inf");
      emulation::set_reversed(false);

      problem.set_grads([](size_t) { return true; });
      problem.groups[0].max_grad_value = 1.5;
      problem.groups[1].max_grad_norm_per_param = 2.0;
      double lr = 0.02;
      problem.groups[1].lr = &lr;
      problem.groups[1].lr_type = DType::kFloat64;
      const StepRequest all{.grad_scale = 4.0f,
                            .found_inf = 0.0f,
                            .max_grad_norm = 1.0,
                            .skip_nonfinite = true,
                            .reduce = true};
      run_step(plan, problem, all, what + ", all clips");
      run_step(plan, problem, {}, what + ", no clips after clips");
      emulation::set_reversed(true);
      Tensor& victim = problem.tensors[70];
      victim.set(1, 69, -INFINITY);
      run_step(plan, problem, all, what + ", skipped by a non-finite gradient");
      victim.set(1, 69, 0.25);
      emulation::set_reversed(false);
      if (i > 0) continue;  // sums take the emulation longest
      run_step(plan, problem, all, what + ", all clips again");
      run_step(plan, problem, {.max_grad_norm = INFINITY, .reduce = true},
               what + ", measured only");
    }
  }
}

// Several combinations of types in one plan, rows of each in turn, against one reference.
template <typename Rule>
void test_mixture() {
  std::vector<TensorSpec> specs;
  for (int i = 0; i < 40; ++i) {
    specs.push_back({i % 7 == 0 ? 0 : 17 * i, all_types()[i % all_types().size()], i % 3});
  }
  Problem<Rule> problem(0, {make_group<Rule>(0), make_group<Rule>(1), make_group<Rule>(1)}, specs,
                        128);
  problem.fill(7);
  problem.groups[2].max_grad_norm_per_param = 3.0;
  cuda::DevicePlan plan(rule_index("adam"), 0, problem.table(), device_memory, 0);
  const int before = emulation::counts().launches;
  run_step(plan, problem, {.max_grad_norm = 0.5, .reduce = true}, "mixture");
  expect(emulation::counts().launches - before == 1 + cuda::kKernelCount, "mixture: launches");

  problem.set_grads([](size_t i) { return i % all_types().size() == 2; });
  const int after = emulation::counts().launches;
  run_step(plan, problem, {}, "mixture with one combination");
  expect(emulation::counts().launches - after == 1, "mixture with one combination: launches");
}

// Norm and coefficients have the bits of the one order, however long the pieces, whatever order
// threads and blocks run in: heads, tails, strides, nothing, and more tensors than one block adds
// up at once.
void test_sum_order() {
  using Adam = rules::adam;
  // The last table also has rows whose gradients are not stored as they are computed with.
  std::vector<std::vector<TensorSpec>> tables(3);
  for (const Types& types : all_types()) {
    const bool converts = (types[0] == DType::kFloat64) != (types[1] == DType::kFloat64);
    std::vector<TensorSpec>& specs = tables[converts ? 2 : 0];
    for (int size : {0, 1, 17, 128, 129, 1024, 2048 + 77, 5000}) {
      specs.push_back({size, types, size % 2, {0}});
      specs.push_back({size, types, size % 2, {0, 1 + size % 5}});
    }
    std::vector<int64_t> layout = {2, 15, 20, 1, 15, 41, 2};
    for (int k = 0; k < kMaxStates; ++k) layout.insert(layout.end(), {20, 1});
    specs.push_back({300, types, 0, {0}, layout});
  }
  tables[2].insert(tables[2].end(), tables[0].begin(), tables[0].begin() + 34);
  for (int i = 0; i < 2500; ++i) tables[1].push_back({i % 3, cuda::kUsualTypes[0], i % 2});

  for (const std::vector<TensorSpec>& specs : tables) {
    for (int piece : {128, 1024, cuda::kLongestPiece}) {
      if (&specs == &tables[1] && piece != 128) break;
      Problem<Adam> problem(0, {make_group<Adam>(0), make_group<Adam>(1)}, specs, piece);
      problem.fill(11);
      Random random(5);
      for (Tensor& tensor : problem.tensors) {
        for (int64_t i = 0; i < tensor.spec.numel; ++i) {
          tensor.set(1, i, std::ldexp(random.bits() / 0x1p31 - 0.5, -random.below(12)));
        }
      }
      problem.set_grads([](size_t i) { return i % 7 != 5; });
      cuda::DevicePlan plan(rule_index("adam"), 0, problem.table(), device_memory, 0);
      const std::string what = "order of sums, pieces of " + std::to_string(piece);
      const StepRequest request{.grad_scale = 3.0f, .max_grad_norm = 0.1, .reduce = true};
      run_step(plan, problem, request, what);
      if (&specs == &tables[1]) continue;
      emulation::set_reversed(true);
      problem.groups[0].max_grad_value = 0.05;
      problem.groups[1].max_grad_norm_per_param = 0.02;
      run_step(plan, problem, request, what + ", all clips");
      emulation::set_reversed(false);
    }
  }
}

// Gradients that are inf or nan and not skipped reach parameters and norm; finite ones of any size
// are no overflow.
void test_nonfinite() {
  for (const double bad : {double(INFINITY), double(NAN)}) {
    Problem<rules::sgd> problem(0, {make_group<rules::sgd>(0)}, {{20, cuda::kUsualTypes[0]}}, 128);
    problem.fill(3);
    problem.tensors[0].set(1, 13, bad);
    cuda::DevicePlan plan(rule_index("sgd"), 0, problem.table(), device_memory, 0);
    StepControl control{};
    plan.update(problem.rows.data(), problem.groups.data(), 0);
    plan.reduce({{}, 1.0, false, &control, nullptr}, 0);
    plan.apply({{}, &control, true}, 0);
    expect(!std::isfinite(control.norm) && control.nonfinite == 1.0 && control.skip == 0.0,
           "nonfinite: control");
    expect(std::isnan(problem.tensors[0].mine[0].get(13)), "nonfinite: reaches the parameter");
  }
  Problem<rules::sgd> problem(0, {make_group<rules::sgd>(0)}, {{3000, cuda::kUsualTypes[0]}}, 512);
  problem.fill(4);
  for (int i = 0; i < 3000; ++i) problem.tensors[0].set(1, i, 1e30);
  cuda::DevicePlan plan(rule_index("sgd"), 0, problem.table(), device_memory, 0);
  StepControl control{};
  double totals[2] = {-1.0, -1.0};
  const double unscale = 0.5;
  plan.update(problem.rows.data(), problem.groups.data(), 0);
  plan.reduce({{nullptr, &unscale, nullptr}, INFINITY, true, &control, totals}, 0);
  const double exact = 3000.0 * 0.25 * double(1e30f) * double(1e30f);
  expect(std::fabs(totals[0] / exact - 1.0) < 1e-12 && totals[1] == 0.0, "large gradients: totals");
  expect(control.skip == 0.0 && control.clip == 1.0 && control.unscale == 0.5,
         "large gradients: control");
}

}  // namespace
}  // namespace fusedopt::test

int main() {
  using namespace fusedopt;
#define FUSEDOPT_RULE(name) test::test_rule<rules::name>(#name);
#include "rules_list.inc"
#undef FUSEDOPT_RULE
  test::test_mixture<rules::adam>();
  test::test_sum_order();
  test::test_nonfinite();
  if (test::failures > 0) fprintf(stderr, "%d failures\n", test::failures);
  return test::failures > 0;
}
