// Notices that a Python dict was changed, by comparing the version number that CPython gives every
// dict on every change. Used by the plan for group dicts and state dicts.
#pragma once

#include <Python.h>

#include <cstdint>

namespace fusedopt {

#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
#define FUSEDOPT_DICT_VERSIONS 1
#endif

class DictGuard {
 public:
  // Call after everything of interest has been read from the dict.
  void arm(PyObject* dict) { version_ = version_of(dict); }

  // False: somebody wrote to the dict since, or this Python does not number changes (3.14 and
  // later) and the dict must be read again.
  bool unchanged(PyObject* dict) const {
    return version_ != kUnknown && version_of(dict) == version_;
  }

 private:
  static constexpr uint64_t kUnknown = 0;

  static uint64_t version_of(PyObject* dict) {
#ifdef FUSEDOPT_DICT_VERSIONS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
    (void)dict;
    return kUnknown;
#endif
  }

  uint64_t version_ = kUnknown;
};

}  // namespace fusedopt
