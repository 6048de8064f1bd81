// The Python module: raw addresses in, nothing of torch linked.  Callers (runtime/kernels/cpu.py)
// have checked dtypes, shapes and lifetimes; here only what could be checked without tensors is.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <cstring>
#include <exception>
#include <new>
#include <system_error>

#include "w4a4.h"

namespace {

using w4a4::Path;

const Path* const kPaths[] = {
#if defined(W4A4_X86)
    &w4a4::kAvx512Vnni,
    &w4a4::kAvx2,
#endif
#if defined(W4A4_ARM64)
    &w4a4::kNeonDot,
#endif
    &w4a4::kGeneric,
};
constexpr int kPathCount = static_cast<int>(sizeof(kPaths) / sizeof(kPaths[0]));

template <class T>
T* address(PyObject* o) {
  return static_cast<T*>(PyLong_AsVoidPtr(o));
}

// A path by its number in instruction_sets(), or null with an exception set.
const Path* path_of(PyObject* o) {
  const long long index = PyLong_AsLongLong(o);
  if (PyErr_Occurred()) return nullptr;
  if (index < 0 || index >= kPathCount || !kPaths[index]->runs_here()) {
    PyErr_SetString(PyExc_ValueError, "this processor cannot run that instruction set");
    return nullptr;
  }
  return kPaths[index];
}

PyObject* translate_exception() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::system_error& error) {  // a thread could not be started
    PyErr_SetString(PyExc_OSError, error.what());
  }
  return nullptr;
}

// linear(path, threads, x, ldx, transform, offset, static_scale, weight, weight_scale, bias, out, ldo,
//        M, N, K, padded, group, groups, bits, clip)
PyObject* linear(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 20) {
    PyErr_SetString(PyExc_TypeError, "linear takes 20 arguments");
    return nullptr;
  }
  const Path* path = path_of(a[0]);
  if (!path) return nullptr;
  const auto number = [&](int i) { return static_cast<int64_t>(PyLong_AsLongLong(a[i])); };
  w4a4::Problem p{};
  const int threads = static_cast<int>(number(1));
  p.x = address<const float>(a[2]);
  p.ldx = number(3);
  p.transform = address<const uint16_t>(a[4]);
  p.offset = address<const float>(a[5]);
  p.static_scale = address<const float>(a[6]);
  p.weight = address<const uint8_t>(a[7]);
  p.weight_scale = address<const float>(a[8]);
  p.bias = address<const float>(a[9]);
  p.out = address<float>(a[10]);
  p.ldo = number(11);
  p.M = number(12);
  p.N = number(13);
  p.K = number(14);
  p.padded = number(15);
  p.group = number(16);
  p.groups = number(17);
  const int64_t bits = number(18);
  p.clip = static_cast<float>(PyFloat_AsDouble(a[19]));
  if (PyErr_Occurred()) return nullptr;
  if (threads < 1 || p.M < 0 || p.N < 0 || p.K < 1 || p.padded < p.K || p.padded % w4a4::kRowAlign ||
      p.group < 4 || p.group % 4 || p.groups < 1 || p.groups * p.group > p.padded || (bits != 4 && bits != 8) ||
      !(p.clip > 0.0f && p.clip <= 1.0f)) {
    PyErr_SetString(PyExc_ValueError, "sizes do not fit together");
    return nullptr;
  }
  p.high = (1 << (bits - 1)) - 1;
  p.low = -p.high - 1;
  bool failed = false;
  std::exception_ptr error;
  Py_BEGIN_ALLOW_THREADS
  try {
    w4a4::run(*path, p, threads);
  } catch (...) {
    failed = true;
    error = std::current_exception();
  }
  Py_END_ALLOW_THREADS
  if (failed) {
    try {
      std::rethrow_exception(error);
    } catch (...) {
      return translate_exception();
    }
  }
  Py_RETURN_NONE;
}

template <void (*convert)(const void*, int64_t, int64_t, int64_t, int, void*)>
PyObject* conversion(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError, "takes (source, N, K, padded, threads, target)");
    return nullptr;
  }
  const void* source = address<const void>(a[0]);
  const int64_t N = PyLong_AsLongLong(a[1]), K = PyLong_AsLongLong(a[2]), padded = PyLong_AsLongLong(a[3]);
  const int threads = static_cast<int>(PyLong_AsLong(a[4]));
  void* target = address<void>(a[5]);
  if (PyErr_Occurred()) return nullptr;
  if (threads < 1 || N < 0 || K < 0 || padded < K || padded % w4a4::kRowAlign) {
    PyErr_SetString(PyExc_ValueError, "sizes do not fit together");
    return nullptr;
  }
  Py_BEGIN_ALLOW_THREADS
  convert(source, N, K, padded, threads, target);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

void pack(const void* words, int64_t N, int64_t K, int64_t padded, int threads, void* panels) {
  w4a4::to_panels(static_cast<const uint32_t*>(words), N, K, padded, threads, static_cast<uint8_t*>(panels));
}

void unpack(const void* panels, int64_t N, int64_t K, int64_t padded, int threads, void* words) {
  w4a4::from_panels(static_cast<const uint8_t*>(panels), N, K, padded, threads, static_cast<uint32_t*>(words));
}

// All paths in order of preference, as (name, runs here).
PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const Path* path : kPaths) {
    PyObject* item = list ? Py_BuildValue("(sO)", path->name, path->runs_here() ? Py_True : Py_False) : nullptr;
    if (!item || PyList_Append(list, item) < 0) {
      Py_XDECREF(item);
      Py_XDECREF(list);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return list;
}

// Multiply-adds per second of a path's inner instructions on this thread: peak(path, seconds).
PyObject* peak(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "peak takes (path, seconds)");
    return nullptr;
  }
  const Path* path = path_of(a[0]);
  const double seconds = PyFloat_AsDouble(a[1]);
  if (!path || PyErr_Occurred()) return nullptr;
  double rate = 0.0;
  Py_BEGIN_ALLOW_THREADS
  rate = path->peak(seconds);
  Py_END_ALLOW_THREADS
  return PyFloat_FromDouble(rate);
}

template <class F>
PyCFunction method(F* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));
}

PyMethodDef methods[] = {
    {"linear", method(linear), METH_FASTCALL, "One W4A4 linear layer on raw addresses."},
    {"pack", method(conversion<pack>), METH_FASTCALL, "Row-major words to panels."},
    {"unpack", method(conversion<unpack>), METH_FASTCALL, "Panels to row-major words."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Paths as (name, runs here), best first."},
    {"peak", method(peak), METH_FASTCALL, "Peak multiply-adds per second of a path."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cpu", "W4A4 kernels for processors.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
