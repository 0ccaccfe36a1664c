// DictGuard for Python: the module of test_dict_guard.py, which compiles it for every way of
// noticing.
#include <vector>

#include "python/dict_guard.h"

namespace {

using fusedopt::DictGuard;

std::vector<DictGuard> guards;

// Arms a new guard; returns its number. Guards move about in memory as their number grows.
PyObject* arm(PyObject*, PyObject* dict) {
  guards.emplace_back().arm(dict);
  return PyLong_FromSize_t(guards.size() - 1);
}

// unchanged(number, address of the dict)
PyObject* unchanged(PyObject*, PyObject* args) {
  Py_ssize_t number;
  void* address;
  if (!PyArg_ParseTuple(args, "nK", &number, &address)) return nullptr;
  return PyBool_FromLong(guards.at(number).unchanged(static_cast<PyObject*>(address)));
}

// Lets all guards go.
PyObject* clear(PyObject*, PyObject*) {
  guards.clear();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"arm", arm, METH_O, nullptr},
                         {"unchanged", unchanged, METH_VARARGS, nullptr},
                         {"clear", clear, METH_NOARGS, nullptr},
                         {}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "guards", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_guards() { return PyModule_Create(&definition); }
