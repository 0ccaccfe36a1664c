// What the emulated runtime holds against its users although hardware might let it pass: one case
// for each check.
#include "emulation.h"
#include "emulation/problem.h"
#include "rules/sgd.h"

namespace fusedopt::test {
namespace {

// Expects this violation, and no other.
void expect_violation(const std::string& words, const auto& action) {
  emulation::take_violations();
  action();
  emulation::synchronize();
  const std::vector<std::string> found = emulation::take_violations();
  expect(found.size() == 1 && found[0].find(words) != std::string::npos,
         "expected the violation \"" + words + "\" alone, found " + std::to_string(found.size()) +
             (found.empty() ? "" : ": " + found[0]));
}

cudaStream_t make_stream() {
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return stream;
}

std::byte* device_bytes(size_t size) {
  void* data = nullptr;
  cudaMalloc(&data, size);
  return static_cast<std::byte*>(data);
}

std::byte* pinned_bytes(size_t size) {
  void* data = nullptr;
  cudaHostAlloc(&data, size, cudaHostAllocDefault);
  return static_cast<std::byte*>(data);
}

void send_bytes(std::byte* to, const std::byte* from, cudaStream_t stream = nullptr) {
  cudaMemcpyAsync(to, from, 64, cudaMemcpyHostToDevice, stream);
}

void test_copies() {
  std::byte host[64] = {};
  std::byte* const device = device_bytes(512);
  expect_violation("writes to host memory", [&] { send_bytes(host, host); });
  expect_violation("from the host is given device memory", [&] { send_bytes(device, device); });
  expect_violation("beyond the end", [&] { send_bytes(device + 480, host); });
  expect_violation("memory that is free", [&] {
    std::byte* const gone = device_bytes(64);
    cudaFree(gone);
    send_bytes(gone, host);
  });

  // Pinned memory is read when the stream gets there, pageable memory at once.
  std::byte* const pinned = pinned_bytes(64);
  pinned[0] = host[0] = std::byte{1};
  send_bytes(device, pinned);
  send_bytes(device + 64, host);
  pinned[0] = host[0] = std::byte{2};
  cudaStreamSynchronize(nullptr);
  expect(device[0] == std::byte{2} && device[64] == std::byte{1},
         "copies: when the host's memory is read");

  send_bytes(device, pinned);
  cudaFreeHost(pinned);
  const auto early = emulation::take_violations();
  expect(early.size() == 1 && early[0].find("while copies out of it wait") != std::string::npos,
         "copies: pinned memory that is still to be read");
  expect_violation("reads memory that is free", [] {});
  cudaFree(device);
  expect_violation("no device memory", [&] { cudaFree(device); });
  expect_violation("no pinned memory", [&] { cudaFreeHost(host); });
}

void test_streams() {
  cudaEvent_t event = nullptr;
  cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  expect_violation("never recorded", [&] { cudaEventSynchronize(event); });
  cudaSetDevice(1);
  const cudaStream_t other = make_stream();
  cudaSetDevice(0);
  expect_violation("not its device's", [&] { cudaEventRecord(event, other); });
  expect_violation("not the current device's", [&] {
    void (*const kernel)(int) = [](int) {};
    int nothing = 0;
    void* arguments[] = {&nothing};
    cudaLaunchKernel(kernel, 1, 1, arguments, 0, other);
  });
  std::byte* const device = device_bytes(64);
  std::byte host[64] = {};
  expect_violation("work that nobody waited for", [&] {
    send_bytes(device, host, other);
    cudaStreamDestroy(other);
  });
  expect_violation("a stream that is gone", [&] { send_bytes(device, host, other); });
  expect_violation("is given no stream", [&] { cudaStreamDestroy(other); });
  cudaEventDestroy(event);
  expect_violation("is given no event", [&] { cudaEventDestroy(event); });

  const cudaStream_t stream = make_stream();
  emulation::begin_capture(stream);
  expect(cudaMemcpyAsync(device, host, 64, cudaMemcpyHostToDevice, stream) ==
             cudaErrorStreamCaptureUnsupported,
         "streams: no pageable copy in a graph");
  void* refused = nullptr;
  expect(cudaMalloc(&refused, 64) == cudaErrorStreamCaptureUnsupported,
         "streams: no allocation under capture");
  emulation::end_capture(stream);
  cudaStreamDestroy(stream);
  cudaFree(device);
}

// A step of a problem whose tensors are where kernels must not look.
void test_kernels() {
  Problem<rules::sgd> problem(0, {GroupRow{}}, {{10, cuda::kUsualTypes[0]}}, 64);
  problem.fill(1);
  auto* const control = reinterpret_cast<StepControl*>(device_bytes(sizeof(StepControl)));
  auto* const tensors = device_bytes(1024);
  TensorRow& row = problem.rows[0];
  row.param.data = tensors;
  row.grad.data = tensors + 512;
  row.step = reinterpret_cast<float*>(tensors + 256);
  const auto step = [&] {
    cuda::DevicePlan plan(rule_index("sgd"), 0, problem.table(), device_memory, 0);
    plan.update(problem.rows.data(), problem.groups.data(), 0);
    plan.apply({{}, control, false}, 0);
    emulation::synchronize();
  };
  emulation::take_violations();
  step();
  expect(emulation::take_violations().empty(), "kernels: memory of the device is right");

  const auto expect_wrong = [&](const std::string& words, auto& pointer, auto value) {
    const auto right = pointer;
    pointer = value;
    expect_violation(words, step);
    pointer = right;
  };
  expect_wrong("host memory where device memory belongs as a parameter", row.param.data,
               static_cast<void*>(problem.tensors[0].mine[0].at(0)));
  expect_wrong("host memory where device memory belongs as a gradient", row.grad.data,
               static_cast<void*>(problem.tensors[0].mine[1].at(0)));
  expect_wrong("beyond the end of its block as a gradient", row.grad.data,
               static_cast<void*>(tensors + 1008));
  double lr = 0.1;
  expect_wrong("as a learning rate", problem.groups[0].lr, static_cast<const void*>(&lr));
  cudaSetDevice(1);
  std::byte* const elsewhere = device_bytes(512);
  cudaSetDevice(0);
  expect_wrong("memory of device 1 as a parameter", row.param.data, static_cast<void*>(elsewhere));

  // Memory of torch's that is released before a stream which nobody named gets there.
  void* const released = emulation::allocate(512, 0, nullptr);
  cudaStream_t side = make_stream();
  {
    cuda::DevicePlan plan(rule_index("sgd"), 0, problem.table(), device_memory, 0);
    row.grad.data = released;
    plan.update(problem.rows.data(), problem.groups.data(),
                reinterpret_cast<cuda::StreamHandle>(side));
    plan.apply({{}, control, false}, reinterpret_cast<cuda::StreamHandle>(side));
    emulation::release(released);
    cudaStreamSynchronize(nullptr);
    expect_violation("memory that is free as a gradient", [&] { cudaStreamSynchronize(side); });
  }
  cudaStreamDestroy(side);
}

void test_gates() {
  expect_violation("not opened", [] {
    emulation::set_gate_seconds(0.01);
    emulation::enqueue_gate(nullptr);
  });
}

}  // namespace
}  // namespace fusedopt::test

int main() {
  using namespace fusedopt::test;
  emulation::set_deferred(true);
  emulation::set_strict(true);
  test_copies();
  test_streams();
  test_kernels();
  test_gates();
  if (failures > 0) fprintf(stderr, "%d failures\n", failures);
  return failures > 0;
}
