#include "python/dict_guard.h"

#ifdef FUSEDOPT_DICT_WATCHERS

#include <unordered_map>

namespace fusedopt {
namespace {

using Watches = std::unordered_map<PyObject*, std::shared_ptr<DictWatch>>;

// The dicts that have not changed since they were armed. An entry whose guards are gone stays until
// its dict changes or dies, so that no guard has to touch a dict that may be dead.
Watches& watches() {
  // Never destroyed: dicts die after static objects do.
  static auto& all = *new Watches;
  return all;
}

// CPython calls this before a change, and before a dict's memory goes. Must not fail nor touch a
// pending exception.
int on_event(PyDict_WatchEvent, PyObject* dict, PyObject*, PyObject*) {
  if (const auto found = watches().find(dict); found != watches().end()) {
    found->second->dict = nullptr;
    watches().erase(found);
  }
  return 0;
}

// Our watcher, one for the whole extension: a process has eight. Negative when none was left.
int watcher() {
  static const int id = PyDict_AddWatcher(&on_event);
  return id;
}

}  // namespace

std::shared_ptr<const DictWatch> watch_dict(PyObject* dict) {
  // The dict of an object's attributes is written behind its back while it shares the object's
  // memory.
  if (reinterpret_cast<PyDictObject*>(dict)->ma_values != nullptr) return nullptr;
  if (const auto found = watches().find(dict); found != watches().end()) return found->second;
  if (watcher() < 0 || PyDict_Watch(watcher(), dict) < 0) {
    PyErr_Clear();
    return nullptr;
  }
  auto watch = std::make_shared<DictWatch>(DictWatch{dict});
  watches().emplace(dict, watch);
  return watch;
}

}  // namespace fusedopt

#endif
