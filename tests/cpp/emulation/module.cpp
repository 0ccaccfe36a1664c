// The Python module `_emulation`, in the same library as the extension that it drives: what the
// tests ask of the emulated runtime, and what stands in for torch's missing CUDA functions.
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation.h"

PYBIND11_MAKE_OPAQUE(emulation::Graph)

namespace emulation {

namespace py = pybind11;

namespace {

cudaStream_t as_stream(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// The current stream of a device, 0 for the default one.
uintptr_t current_stream(int device) {
  const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
  return static_cast<uintptr_t>(guard.getStream(c10::Device(c10::kCUDA, device)).id());
}

}  // namespace

PYBIND11_MODULE(_emulation, module) {
  py::class_<Graph>(module, "Graph").def("__len__", &Graph::size);
  py::class_<Counts>(module, "Counts")
      .def_readonly("launches", &Counts::launches)
      .def_readonly("copies", &Counts::copies)
      .def_readonly("waits", &Counts::waits)
      .def_readonly("allocations", &Counts::allocations);
  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  module.attr("DEVICES") = kDevices;
  module.def("counts", [] { return counts(); });
  module.def("set_reversed", &set_reversed);
  module.def("set_deferred", &set_deferred);
  module.def("set_strict", &set_strict);
  module.def("set_patient", &set_patient);
  module.def("set_driver", &set_driver);
  module.def("synchronize", &synchronize, unlocked);
  module.def("fail_call", &fail_call);
  module.def("failed_call", &failed_call);
  module.def("fail_next_allocation", &fail_next_allocation);
  module.def("fail_next_launch", &fail_next_launch);
  module.def("listen", &listen);
  module.def("take_calls", &take_calls);
  module.def("take_violations", &take_violations);
  module.def("has_context", &has_context);
  module.def("forget_contexts", &forget_contexts);
  module.def("open_gate", &open_gate);
  module.def("enqueue_gate", [](uintptr_t stream) { enqueue_gate(as_stream(stream)); });
  module.def("current_stream", &current_stream);
  module.def("exchange_stream", [](int device, uintptr_t stream) {
    const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
    const c10::Stream next(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, device),
                           static_cast<c10::StreamId>(stream));
    return static_cast<uintptr_t>(guard.exchangeStream(next).id());
  });
  module.def("current_device",
             [] { return c10::impl::VirtualGuardImpl(c10::kCUDA).getDevice().index(); });
  module.def("exchange_device", [](int device) {
    const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
    return guard.exchangeDevice(c10::Device(c10::kCUDA, device)).index();
  });
  module.def("begin_capture", [](uintptr_t stream) { begin_capture(as_stream(stream)); });
  module.def("end_capture", [](uintptr_t stream) { return end_capture(as_stream(stream)); });
  module.def("is_capturing", [](uintptr_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(as_stream(stream), &status);
    return status != cudaStreamCaptureStatusNone;
  });
  module.def(
      "replay", [](const Graph& graph, uintptr_t stream) { replay(graph, as_stream(stream)); },
      unlocked);
}

}  // namespace emulation
