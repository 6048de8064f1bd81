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

// The paths of this machine's architecture, best first; CMakeLists.txt writes the list.
namespace w4a4 {
#define W4A4_PATH(name) extern const Path name;
#include "instruction_sets.inc"
#undef W4A4_PATH
}  // namespace w4a4

namespace {

using w4a4::Path;

const Path* const kPaths[] = {
#define W4A4_PATH(name) &w4a4::name,
#include "instruction_sets.inc"
#undef W4A4_PATH
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

PyObject* sizes_do_not_fit() {
  PyErr_SetString(PyExc_ValueError, "sizes do not fit together");
  return nullptr;
}

int64_t number(PyObject* o) { return PyLong_AsLongLong(o); }

// The path that a call names first, or null with an exception set.
const Path* path_of_call(PyObject* const* a, Py_ssize_t count, Py_ssize_t wanted, const char* complaint) {
  if (count == wanted) return path_of(a[0]);
  PyErr_SetString(PyExc_TypeError, complaint);
  return nullptr;
}

// Run a problem without Python's lock; None, or null with an exception set.
template <class Problem>
PyObject* run_released(const Path& path, const Problem& problem, int threads) {
  std::exception_ptr error;
  Py_BEGIN_ALLOW_THREADS
  try {
    w4a4::run(path, problem, threads);
  } catch (...) {
    error = std::current_exception();
  }
  Py_END_ALLOW_THREADS
  if (!error) Py_RETURN_NONE;
  try {
    std::rethrow_exception(error);
  } catch (...) {
    return translate_exception();
  }
}

// linear(path, threads, x, ldx, transform, offset, static_scale, weight, weight_scale, bias, out, ldo,
//        M, N, K, padded, group, groups, bits, clip)
PyObject* linear(PyObject*, PyObject* const* a, Py_ssize_t count) {
  const Path* path = path_of_call(a, count, 20, "linear takes 20 arguments");
  if (!path) return nullptr;
  w4a4::Problem p{};
  const int threads = static_cast<int>(number(a[1]));
  p.x = address<const float>(a[2]);
  p.ldx = number(a[3]);
  p.transform = address<const uint16_t>(a[4]);
  p.offset = address<const float>(a[5]);
  p.static_scale = address<const float>(a[6]);
  p.weight = address<const uint8_t>(a[7]);
  p.weight_scale = address<const float>(a[8]);
  p.bias = address<const float>(a[9]);
  p.out = address<float>(a[10]);
  p.ldo = number(a[11]);
  p.M = number(a[12]);
  p.N = number(a[13]);
  p.K = number(a[14]);
  p.padded = number(a[15]);
  p.group = number(a[16]);
  p.groups = number(a[17]);
  const int64_t bits = number(a[18]);
  p.clip = static_cast<float>(PyFloat_AsDouble(a[19]));
  if (PyErr_Occurred()) return nullptr;
  if (threads < 1 || p.M < 0 || p.N < 0 || p.K < 1 || p.padded < p.K || p.padded % w4a4::kRowAlign ||
      p.group < 4 || p.group % 4 || p.groups < 1 || p.groups * p.group > p.padded || (bits != 4 && bits != 8) ||
      !(p.clip > 0.0f && p.clip <= 1.0f)) {
    return sizes_do_not_fit();
  }
  p.high = (1 << (bits - 1)) - 1;
  p.low = -p.high - 1;
  return run_released(*path, p, threads);
}

// gate(path, threads, gate, ldg, up, ldu, out, M, N, silu)
PyObject* gate(PyObject*, PyObject* const* a, Py_ssize_t count) {
  const Path* path = path_of_call(a, count, 10, "gate takes 10 arguments");
  if (!path) return nullptr;
  w4a4::Gated p{};
  const int threads = static_cast<int>(number(a[1]));
  p.gate = address<const float>(a[2]);
  p.ldg = number(a[3]);
  p.up = address<const float>(a[4]);
  p.ldu = number(a[5]);
  p.out = address<float>(a[6]);
  p.M = number(a[7]);
  p.N = number(a[8]);
  p.silu = number(a[9]) != 0;
  if (PyErr_Occurred()) return nullptr;
  if (threads < 1 || p.M < 0 || p.N < 0) return sizes_do_not_fit();
  return run_released(*path, p, threads);
}

// normalize(path, threads, x, ldx, scale, shift, base, lds, share, out, M, N, eps, centred)
PyObject* normalize(PyObject*, PyObject* const* a, Py_ssize_t count) {
  const Path* path = path_of_call(a, count, 14, "normalize takes 14 arguments");
  if (!path) return nullptr;
  w4a4::Normalized p{};
  const int threads = static_cast<int>(number(a[1]));
  p.x = address<const float>(a[2]);
  p.ldx = number(a[3]);
  p.scale = address<const float>(a[4]);
  p.shift = address<const float>(a[5]);
  p.base = static_cast<float>(PyFloat_AsDouble(a[6]));
  p.lds = number(a[7]);
  p.share = number(a[8]);
  p.out = address<float>(a[9]);
  p.M = number(a[10]);
  p.N = number(a[11]);
  p.eps = static_cast<float>(PyFloat_AsDouble(a[12]));
  p.centred = number(a[13]) != 0;
  if (PyErr_Occurred()) return nullptr;
  if (threads < 1 || p.M < 0 || p.N < 0 || p.share < 1) return sizes_do_not_fit();
  return run_released(*path, p, threads);
}

// rotate(path, threads, x, xb, xt, xh, cosine, sine, table, out, B, T, H, half)
PyObject* rotate(PyObject*, PyObject* const* a, Py_ssize_t count) {
  const Path* path = path_of_call(a, count, 14, "rotate takes 14 arguments");
  if (!path) return nullptr;
  w4a4::Rotated p{};
  const int threads = static_cast<int>(number(a[1]));
  p.x = address<const float>(a[2]);
  p.xb = number(a[3]);
  p.xt = number(a[4]);
  p.xh = number(a[5]);
  p.cosine = address<const float>(a[6]);
  p.sine = address<const float>(a[7]);
  p.table = number(a[8]);
  p.out = address<float>(a[9]);
  p.B = number(a[10]);
  p.T = number(a[11]);
  p.H = number(a[12]);
  p.half = number(a[13]);
  if (PyErr_Occurred()) return nullptr;
  if (threads < 1 || p.B < 0 || p.T < 0 || p.H < 0 || p.half < 0) return sizes_do_not_fit();
  return run_released(*path, p, threads);
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
    return sizes_do_not_fit();
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
    {"gate", method(gate), METH_FASTCALL, "An activation, times another tensor if there is one."},
    {"normalize", method(normalize), METH_FASTCALL, "A norm with its modulation."},
    {"rotate", method(rotate), METH_FASTCALL, "Rotary positions."},
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
