// The launchers of the CUDA backend on the emulated runtime: what travels to the device and when,
// captured graphs, memory, devices, errors, and the length of pieces.
#include <cstdlib>
#include <stdexcept>

#include "emulation.h"
#include "emulation/problem.h"
#include "rules/sgd.h"

namespace fusedopt::test {
namespace {

const size_t kSgd = rule_index("sgd");
using Sgd = Problem<rules::sgd>;

GroupRow make_group(double lr) {
  GroupRow group{};
  group.hyper[0] = lr;
  group.hyper[4] = 0.5;  // momentum
  group.max_grad_value = INFINITY;
  group.max_grad_norm_per_param = INFINITY;
  return group;
}

Sgd make_problem(int tensors) {
  std::vector<TensorSpec> specs;
  for (int i = 0; i < tensors; ++i) specs.push_back({10 + i, cuda::kUsualTypes[0], i % 2});
  Sgd problem(1, {make_group(0.1), make_group(0.2)}, specs, 128);
  problem.fill(1);
  return problem;
}

void step(cuda::DevicePlan& plan, Sgd& problem, StepControl& control,
          cudaStream_t stream = nullptr) {
  const auto handle = reinterpret_cast<cuda::StreamHandle>(stream);
  plan.update(problem.rows.data(), problem.groups.data(), handle);
  plan.apply({{}, &control, false}, handle);
}

void step_reference(Sgd& problem) { problem.reference_update(problem.reference_control({})); }

void test_uploads() {
  Sgd problem = make_problem(20);
  cuda::DevicePlan plan(kSgd, 0, problem.table(), device_memory, 0);
  StepControl control{};
  const auto copies_of = [&](const auto& change) {
    change();
    const int before = emulation::counts().copies;
    step(plan, problem, control);
    step_reference(problem);
    return emulation::counts().copies - before;
  };
  expect(copies_of([] {}) == 0, "uploads: none for the table that was just made");
  expect(copies_of([&] { problem.groups[1].hyper[0] = 0.3; }) == 1, "uploads: one for a new lr");
  expect(copies_of([] {}) == 0, "uploads: none when nothing changed");
  expect(copies_of([&] {
           problem.groups[0].hyper[0] = 0.4;
           problem.set_grads([](size_t i) { return i % 2 == 0; });
         }) == 1,
         "uploads: one for a new lr and new gradients");
  problem.expect_same("uploads");
}

// A host many steps ahead of the device: every step still finds its own values.
void test_steps_in_flight() {
  Sgd problem = make_problem(5);
  cuda::DevicePlan plan(kSgd, 0, problem.table(), device_memory, 0);
  StepControl control{};
  emulation::set_deferred(true);
  const int before = emulation::counts().waits;
  for (int i = 0; i < 30; ++i) {
    problem.groups[0].hyper[0] = 0.01 * (i + 1);
    problem.set_grads([i](size_t tensor) { return (tensor + i) % 3 != 0; });
    step(plan, problem, control);
    step_reference(problem);
    if (i == 7) {
      expect(emulation::counts().waits == before, "in flight: no wait for the first eight steps");
    }
  }
  expect(emulation::counts().waits > before, "in flight: a full ring waits");
  emulation::set_deferred(false);
  emulation::synchronize();
  problem.expect_same("in flight");
}

void test_graph() {
  StepControl control{};
  float found_inf = 0.0f;
  float lr = 0.125f;
  emulation::Graph graph;
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  Sgd problem = make_problem(20);
  problem.groups[1].lr = &lr;
  problem.groups[1].lr_type = DType::kFloat32;
  {
    cuda::DevicePlan plan(kSgd, 0, problem.table(), device_memory, 0);
    step(plan, problem, control);
    step_reference(problem);

    emulation::begin_capture(stream);
    const auto handle = reinterpret_cast<cuda::StreamHandle>(stream);
    const cuda::StepInputs inputs{nullptr, nullptr, &found_inf};
    plan.update(problem.rows.data(), problem.groups.data(), handle);
    plan.reduce({inputs, 0.5, false, &control, nullptr}, handle);
    plan.apply({{}, &control, true}, handle);
    graph = emulation::end_capture(stream);
    expect(graph.size() == 2, "graph: two launches and nothing else");
    problem.expect_same("graph: capture runs nothing");

    const auto replay = [&] {
      for (const auto& node : graph) node();
      const StepRequest request{.found_inf = found_inf, .max_grad_norm = 0.5, .reduce = true};
      expect(control.skip == problem.reference_control(request).skip, "graph: skip");
      problem.reference_update(control);
    };
    replay();
    lr = 0.25f;  // on the device, so that the graph sees it
    replay();
    found_inf = 1.0f;
    replay();
    found_inf = 0.0f;
    problem.expect_same("graph: replays");

    // A step outside has other gradients and another lr; the graph keeps those that it was captured
    // with.
    const double captured_lr = problem.groups[0].hyper[0];
    problem.groups[0].hyper[0] = 0.7;
    problem.set_grads([](size_t i) { return i < 3; });
    step(plan, problem, control);
    step_reference(problem);
    problem.groups[0].hyper[0] = captured_lr;
    problem.set_grads([](size_t) { return true; });
    replay();
    problem.expect_same("graph: replay after a step outside");
    // And the step outside after a replay is not confused by what the graph holds.
    step(plan, problem, control);
    step_reference(problem);
    problem.expect_same("graph: step outside after a replay");
  }
  for (const auto& node : graph) node();
  problem.reference_control({.found_inf = found_inf, .max_grad_norm = 0.5, .reduce = true});
  problem.reference_update(control);
  problem.expect_same("graph: replay after the plan is gone");
  cudaStreamDestroy(stream);
}

// While another stream is under capture in torch's (global) mode, a step and a new plan go on as
// usual.
void test_capture_elsewhere() {
  cudaStream_t other = nullptr;
  cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
  emulation::begin_capture(other);
  Sgd problem = make_problem(3);
  {
    cuda::DevicePlan plan(kSgd, 0, problem.table(), device_memory, 0);
    StepControl control{};
    for (int i = 0; i < 10; ++i) {
      problem.groups[0].hyper[0] += 0.1;
      step(plan, problem, control);
      step_reference(problem);
    }
  }
  problem.expect_same("capture elsewhere");
  expect(emulation::end_capture(other).empty(), "capture elsewhere: nothing of ours in it");
  cudaStreamDestroy(other);
}

std::string error_of(const auto& action) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void expect_text(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    expect(text.find(part) != std::string::npos,
           "message \"" + text + "\" should hold \"" + part + "\"");
  }
}

void test_errors() {
  Sgd problem = make_problem(3);
  StepControl control{};
  const int before = emulation::counts().allocations;
  emulation::fail_next_allocation();
  expect_text(error_of([&] { cuda::DevicePlan plan(kSgd, 0, problem.table(), device_memory, 0); }),
              {"allocating", "bytes", "out of memory"});
  expect(emulation::counts().allocations == before, "errors: no memory is lost");

  cuda::DevicePlan plan(kSgd, 0, problem.table(), device_memory, 0);
  plan.update(problem.rows.data(), problem.groups.data(), 0);
  emulation::fail_next_launch();
  expect_text(error_of([&] { plan.apply({{}, &control, false}, 0); }),
              {"launching the sgd kernel", "variant 1", "parameters float32", "3 blocks",
               "no kernel image"});
  emulation::fail_next_launch();
  expect_text(error_of([&] { plan.reduce({{}, 1.0, false, &control, nullptr}, 0); }),
              {"launching the reduce kernel", "3 blocks of 256 threads"});
  problem.expect_same("errors: nothing has changed");
  step(plan, problem, control);
  step_reference(problem);
  problem.expect_same("errors: the plan still works");

  Sgd mixed(1, {make_group(0.1)}, {{20, {DType::kBFloat16, DType::kFloat64}}}, 128);
  cuda::DevicePlan plan_of_mixed(kSgd, 0, mixed.table(), device_memory, 0);
  plan_of_mixed.update(mixed.rows.data(), mixed.groups.data(), 0);
  emulation::fail_next_launch();
  expect_text(error_of([&] { plan_of_mixed.apply({{}, &control, false}, 0); }),
              {"launching the sgd kernel", "variant 1", "float32 arithmetic, mixed types"});

  emulation::set_driver(false);
  expect_text(cuda::unavailable(), {"no NVIDIA driver", "install"});
  expect_text(error_of([&] { cuda::DevicePlan plan(kSgd, 0, problem.table(), device_memory, 0); }),
              {"CUDA device 0", "no NVIDIA driver"});
  emulation::set_driver(true);
  expect(cuda::unavailable().empty() && cuda::unavailable(1).empty(), "errors: available again");
}

// A launch cannot be called back: when a later one fails, the error says what that leaves.
void test_half_a_step() {
  Sgd problem(1, {make_group(0.1)}, {{10, cuda::kUsualTypes[0]}, {10, cuda::kUsualTypes[1]}}, 128);
  problem.fill(1);
  cuda::DevicePlan plan(kSgd, 0, problem.table(), device_memory, 0);
  StepControl control{};
  plan.update(problem.rows.data(), problem.groups.data(), 0);
  const auto error_of_launch = [&](int nth) {
    emulation::fail_call(nth);
    const std::string error = error_of([&] { plan.apply({{}, &control, false}, 0); });
    emulation::fail_call(0);
    return error;
  };
  const std::string nothing_done = error_of_launch(1);
  expect_text(nothing_done, {"launching the sgd kernel", "parameters float32"});
  expect(nothing_done.find("half done") == std::string::npos, "half a step: nothing was done");
  problem.expect_same("half a step: nothing was done");

  expect_text(error_of_launch(2),
              {"launching the sgd kernel", "parameters float64", "half done", "checkpoint"});
  problem.set_grads([](size_t i) { return i == 0; });
  step_reference(problem);
  problem.expect_same("half a step: one launch was made");
}

// Nothing to launch: the control block is written all the same. Everything allocated is freed, on
// the right device.
void test_nothing_to_do() {
  const int before = emulation::counts().allocations;
  {
    Sgd problem = make_problem(3);
    problem.set_grads([](size_t) { return false; });
    cudaSetDevice(1);
    cuda::DevicePlan plan(kSgd, 1, problem.table(), device_memory, 0);
    float found_inf = 3.0f;
    StepControl control{};
    plan.update(problem.rows.data(), problem.groups.data(), 0);
    plan.apply({{nullptr, nullptr, &found_inf}, &control, false}, 0);
    expect(control.skip == 1.0 && control.unscale == 1.0, "nothing to do: control");
    plan.reduce({{}, 1.0, true, &control, nullptr}, 0);
    expect(control.skip == 0.0 && control.norm == 0.0 && control.clip == 1.0,
           "nothing to do: norm");

    Sgd empty(1, {make_group(0.1)}, {{0, cuda::kUsualTypes[0]}}, 128);
    cuda::DevicePlan empty_plan(kSgd, 1, empty.table(), device_memory, 0);
    step(empty_plan, empty, control);
    step(empty_plan, empty, control);
    expect(empty.tensors[0].step == 2.0f, "nothing to do: an empty tensor's counter advances");
    Sgd none(1, {}, {}, 128);
    cuda::DevicePlan none_plan(kSgd, 1, none.table(), device_memory, 0);
    step(none_plan, none, control);
  }
  expect(emulation::counts().allocations == before, "nothing to do: all memory is freed");
  cudaSetDevice(0);
}

void test_piece_length() {
  constexpr int kH200 = 132;
  const auto length = [](int64_t elements, int64_t tensors, int multiprocessors) {
    return cuda::choose_piece_length(elements, tensors, multiprocessors);
  };
  expect(length(0, 0, kH200) == 1024, "piece length: nothing");
  expect(length(64 << 10, 1, kH200) == 1024, "piece length: little work is cut small");
  expect(length(1 << 20, 1, kH200) == 1024, "piece length: 1 Mi does not fill the GPU");
  expect(length(4 << 20, 1, kH200) == 4096, "piece length: 4 Mi does");
  expect(length(64 << 20, 1, kH200) == 8192, "piece length: 64 Mi in one tensor");
  expect(length(124 << 20, 148, kH200) == 16384, "piece length: GPT-2");
  expect(length(int64_t{8} << 30, 300, kH200) == 65536, "piece length: much work");
  expect(length(64 << 20, 100000, kH200) == 32768,
         "piece length: cuts are left among many tensors");
  for (int64_t elements = 1; elements < int64_t{1} << 40; elements *= 3) {
    for (int multiprocessors : {1, 40, 132, 200}) {
      const int32_t chosen = length(elements, 1, multiprocessors);
      expect(chosen >= 1024 && chosen <= 65536 && (chosen & (chosen - 1)) == 0,
             "piece length: limits");
      expect(chosen == 65536 || elements / chosen <= 64 * multiprocessors,
             "piece length: too many pieces");
      const int fewest = chosen > 4096 ? 31 : chosen > 1024 ? 4 : 0;
      expect(elements / chosen >= fewest * multiprocessors, "piece length: too few pieces");
    }
  }
  setenv("FUSEDOPT_PIECE_LENGTH", "2048", 1);
  expect(length(124 << 20, 148, kH200) == 2048, "piece length: a sweep's");
  unsetenv("FUSEDOPT_PIECE_LENGTH");
}

}  // namespace
}  // namespace fusedopt::test

int main() {
  using namespace fusedopt::test;
  test_uploads();
  test_steps_in_flight();
  test_graph();
  test_capture_elsewhere();
  test_errors();
  test_half_a_step();
  test_nothing_to_do();
  test_piece_length();
  if (failures > 0) fprintf(stderr, "%d failures\n", failures);
  return failures > 0;
}
