// Notices that a Python dict was changed since it was read, or that it died. Used by the plan for
// group dicts and state dicts; always under the GIL.
//
// Up to Python 3.13 CPython numbers every change of every dict, and the numbers are compared. Later
// ones do not: there a dict watcher is told (FUSEDOPT_DICT_WATCHERS chooses it from 3.12 on, where
// both exist). Builds of Python without a GIL promise neither: a guard knows nothing there.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>

#if PY_VERSION_HEX >= 0x030E0000 && !defined(Py_GIL_DISABLED)
#define FUSEDOPT_DICT_WATCHERS
#endif

namespace fusedopt {

#ifdef FUSEDOPT_DICT_WATCHERS

// What is known of one dict: `dict` until it changes or dies, null from then on.
struct DictWatch {
  PyObject* dict;
};

// The watch of a dict from now on; null where nothing can be known of it.
std::shared_ptr<const DictWatch> watch_dict(PyObject* dict);

class DictGuard {
 public:
  // Call after everything of interest has been read from the dict.
  void arm(PyObject* dict) { watch_ = watch_dict(dict); }

  // False: somebody wrote to the dict since, it died (another one may live at its address), or it
  // cannot be watched, and must be read again. Does not touch the dict.
  bool unchanged(PyObject* dict) const { return watch_ != nullptr && watch_->dict == dict; }

 private:
  std::shared_ptr<const DictWatch> watch_;
};

#else

class DictGuard {
 public:
  // Call after everything of interest has been read from the dict.
  void arm(PyObject* dict) { version_ = version_of(dict); }

  // False: somebody wrote to the dict since, it is another one at the same address, or this Python
  // does not number changes, and it must be read again. The dict must be alive.
  bool unchanged(PyObject* dict) const {
    return version_ != kUnknown && version_of(dict) == version_;
  }

 private:
  static constexpr uint64_t kUnknown = 0;

  static uint64_t version_of(PyObject* dict) {
#ifdef Py_GIL_DISABLED
    (void)dict;
    return kUnknown;
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#endif
  }

  uint64_t version_ = kUnknown;
};

#endif

}  // namespace fusedopt
