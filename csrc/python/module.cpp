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

py::object begin(Plan& plan, const py::list& param_groups, const py::dict& state) {
  const std::optional<Attention> attention = plan.begin(param_groups, state);
  if (!attention) return py::none();
  return py::make_tuple(attention->rebuild, attention->missing, attention->foreign);
}

// {rule: (hyperparameter keys, variant keys, ((state, variant bit), ...))}, as the rule headers
// have them.
py::dict describe_rules() {
  py::dict all;
  for (const RuleInfo& rule : all_rules()) {
    py::list hyper, variants, states;
    for (const char* name : rule.hyper) hyper.append(name);
    for (const char* name : rule.variants) variants.append(name);
    for (const auto& state : rule.states) {
      states.append(py::make_tuple(state.name, state.variant_bit));
    }
    all[rule.name] = py::make_tuple(py::tuple(hyper), py::tuple(variants), py::tuple(states));
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::class_<Plan>(module, "Plan").def("begin", &begin, py::arg("param_groups"), py::arg("state"));

  py::class_<TablePlan, Plan>(module, "TablePlan")
      .def(py::init<const std::string&, c10::Device, const py::list&, const py::list&,
                    const py::dict&>(),
           py::arg("rule"), py::arg("device"), py::arg("slots"), py::arg("param_groups"),
           py::arg("state"))
      .def("rows", &TablePlan::rows)
      .def_property_readonly("rows_version", &TablePlan::rows_version)
      .def("write", &TablePlan::write, py::arg("words"))
      .def("needs_reduce", &TablePlan::needs_reduce, py::arg("max_grad_norm"),
           py::arg("skip_nonfinite"));

  py::class_<NativePlan, Plan>(module, "NativePlan")
      .def("step", &NativePlan::step, py::arg("grad_scale"), py::arg("found_inf"),
           py::arg("max_grad_norm"), py::arg("skip_nonfinite"))
      .def("reduce", &NativePlan::reduce, py::arg("unscale"))
      .def("apply", &NativePlan::apply, py::arg("control"))
      .def_property_readonly("control", &NativePlan::control);

  py::class_<CpuPlan, NativePlan>(module, "CpuPlan")
      .def(py::init<const std::string&, const py::list&, const py::list&, const py::dict&>(),
           py::arg("rule"), py::arg("slots"), py::arg("param_groups"), py::arg("state"));

#ifdef FUSEDOPT_WITH_CUDA
  py::class_<CudaPlan, NativePlan>(module, "CudaPlan")
      .def(py::init<const std::string&, int, const py::list&, const py::list&, const py::dict&>(),
           py::arg("rule"), py::arg("device"), py::arg("slots"), py::arg("param_groups"),
           py::arg("state"));
  module.def("cuda_unavailable", [] { return cuda::unavailable(); });
  module.def("cuda_unavailable", &cuda_unavailable, py::arg("device"));
#endif

  module.def("describe_rules", &describe_rules);
  module.def("instruction_sets", &cpu::instruction_sets);
  module.def("instruction_set", &cpu::instruction_set);
  module.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
}

}  // namespace fusedopt
