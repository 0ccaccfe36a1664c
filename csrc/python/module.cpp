// The extension module: what Python sees of the native backends.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/passes.h"
#include "python/cpu_plan.h"
#include "python/native_plan.h"
#include "python/table_plan.h"
#ifdef FUSEDOPT_WITH_CUDA
#include "python/cuda_plan.h"
#endif

namespace fusedopt {
namespace {

// None, or (rebuild, missing, foreign).
py::object as_object(const std::optional<Attention>& attention) {
  if (!attention) return py::none();
  return py::make_tuple(attention->rebuild, attention->missing, attention->foreign);
}

py::object begin(Plan& plan, const py::object& param_groups, const py::object& state) {
  auto attention = plan.begin(param_groups, state);
  if (!attention || !(attention->rebuild || !attention->missing.empty())) plan.hold();
  return as_object(attention);
}

py::object step(NativePlan& plan, const py::object& param_groups, const py::object& state,
                const py::object& grad_scale, const py::object& found_inf,
                std::optional<double> max_grad_norm, bool skip_nonfinite) {
  return as_object(
      plan.step(param_groups, state, grad_scale, found_inf, max_grad_norm, skip_nonfinite));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::class_<Plan>(module, "Plan")
      .def("begin", &begin, py::arg("param_groups"), py::arg("state"))
      .def("end", &Plan::release);

  py::class_<TablePlan, Plan>(module, "TablePlan")
      .def(py::init<const std::string&, c10::Device, const py::list&, const py::object&,
                    const py::dict&>(),
           py::arg("rule"), py::arg("device"), py::arg("slots"), py::arg("param_groups"),
           py::arg("state"))
      .def("layouts", &TablePlan::layouts)
      .def("rows", &TablePlan::rows, py::arg("layouts"))
      .def_property_readonly("rows_version", &TablePlan::rows_version)
      .def("write", &TablePlan::write, py::arg("words"))
      .def("bump_versions", &TablePlan::bump_versions)
      .def("needs_reduce", &TablePlan::needs_reduce, py::arg("max_grad_norm"),
           py::arg("skip_nonfinite"));

  py::class_<NativePlan, Plan>(module, "NativePlan")
      .def("step", &step, py::arg("param_groups"), py::arg("state"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("max_grad_norm"), py::arg("skip_nonfinite"))
      .def("reduce", &NativePlan::reduce, py::arg("unscale"))
      .def("apply", &NativePlan::apply, py::arg("control"))
      .def_property_readonly("control", &NativePlan::control);

  py::class_<CpuPlan, NativePlan>(module, "CpuPlan")
      .def(py::init<const std::string&, const py::list&, const py::object&, const py::dict&>(),
           py::arg("rule"), py::arg("slots"), py::arg("param_groups"), py::arg("state"));

#ifdef FUSEDOPT_WITH_CUDA
  py::class_<CudaPlan, NativePlan>(module, "CudaPlan")
      .def(py::init<const std::string&, int, const py::list&, const py::object&, const py::dict&>(),
           py::arg("rule"), py::arg("device"), py::arg("slots"), py::arg("param_groups"),
           py::arg("state"));
  module.def("cuda_unavailable", [] { return cuda::unavailable(); });
  module.def("cuda_unavailable", &cuda_unavailable, py::arg("device"));
#endif

  module.def("instruction_sets", &cpu::instruction_sets);
  module.def("instruction_set", &cpu::instruction_set);
  module.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
}

}  // namespace fusedopt
