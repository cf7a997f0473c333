// Python functions that look at lists of tensors, by the table of C functions that DLPack defines and torch >= 2.11 has:
// it tells of a Python tensor without an allocation, where an operator over Tensor[] makes three for each.
#include "survey.h"

#include "dlpack/dlpack.h"  // DLPack 1.3, unchanged: torch has it too, but not for code that uses the stable ABI

#include <algorithm>
#include <vector>

namespace fastsam {
namespace {

DLPackDLTensorFromPyObjectNoSync look = nullptr;
PyObject* tensor_type = nullptr;

// What is recorded of a tensor, as int64: this, its sizes, its strides.
struct Place {
  int64_t address, numel, dtype, device, ndim;
};
constexpr int64_t kPlace = sizeof(Place) / sizeof(int64_t);

int64_t address_of(const DLTensor& t) { return reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset); }

Place place_of(const DLTensor& t) {
  int64_t numel = 1;
  for (int32_t i = 0; i < t.ndim; ++i) numel *= t.shape[i];
  return {address_of(t), numel, t.dtype.code << 16 | t.dtype.bits << 8 | t.dtype.lanes,
          int64_t(t.device.device_type) << 32 | t.device.device_id, t.ndim};
}

// Whether a tensor lies as the one that was recorded, wherever that is, but for the strides of dimensions of size 1, which
// mean nothing.
bool lies_as(const DLTensor& t, const int64_t* recorded) {
  const Place now = place_of(t), &then = *reinterpret_cast<const Place*>(recorded);
  if (now.dtype != then.dtype || now.device != then.device || now.ndim != then.ndim) return false;
  const int64_t *sizes = recorded + kPlace, *strides = sizes + then.ndim;
  for (int32_t i = 0; i < t.ndim; ++i)
    if (t.shape[i] != sizes[i] || (sizes[i] != 1 && t.strides[i] != strides[i])) return false;
  return true;
}

// False where it can't be told, as of a sparse tensor or one without memory.
bool describe(PyObject* tensor, DLTensor* out) {
  if (look(tensor, out) == 0) return true;
  PyErr_Clear();
  return false;
}

struct Table {
  int64_t* begin = nullptr;
  int64_t* end = nullptr;
};

// An int64 tensor on the CPU; false, and an error is set, where it is another, or `list` is none.
bool read(PyObject* table, PyObject* list, Table* out) {
  DLTensor t;
  if (!PyList_Check(list) || !describe(table, &t) || t.device.device_type != kDLCPU || t.dtype.code != kDLInt ||
      t.dtype.bits != 64 || t.ndim != 1 || (t.shape[0] > 1 && t.strides[0] != 1)) {
    PyErr_SetString(PyExc_TypeError, "fastsam: a list of tensors and a flat int64 table on the CPU are needed");
    return false;
  }
  out->begin = reinterpret_cast<int64_t*>(address_of(t));
  out->end = out->begin + t.shape[0];
  return true;
}

bool counts(Py_ssize_t found, Py_ssize_t wanted) {
  if (found == wanted) return true;
  PyErr_Format(PyExc_TypeError, "fastsam: %zd are needed, but got %zd", wanted, found);
  return false;
}

PyObject* survey(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  Table places, table;
  if (!counts(n_args, 3) || !read(args[1], args[0], &places) || !read(args[2], args[0], &table)) return nullptr;
  const Py_ssize_t n = table.end - table.begin;
  if (!counts(PyList_Size(args[0]), n)) return nullptr;
  std::vector<int64_t> found(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const int64_t* recorded = places.begin;
    if (places.end - recorded < kPlace) return PyLong_FromLong(0);
    places.begin += kPlace + 2 * reinterpret_cast<const Place*>(recorded)->ndim;
    PyObject* grad = PyList_GetItem(args[0], i);
    if (grad == Py_None) continue;
    DLTensor g;
    if (reinterpret_cast<PyObject*>(Py_TYPE(grad)) != tensor_type || !describe(grad, &g) || !lies_as(g, recorded))
      return PyLong_FromLong(0);
    found[i] = address_of(g);
  }
  if (places.begin != places.end) return PyLong_FromLong(0);
  bool changed = false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    changed |= table.begin[i] != found[i];
    table.begin[i] = found[i];
  }
  return PyLong_FromLong(changed ? 2 : 1);
}

PyObject* record(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  Table places;
  if (!counts(n_args, 2) || !read(args[1], args[0], &places)) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_Size(args[0]); ++i) {
    DLTensor t;
    if (!describe(PyList_GetItem(args[0], i), &t) || places.end - places.begin < kPlace + 2 * t.ndim)
      return PyBool_FromLong(0);
    *reinterpret_cast<Place*>(places.begin) = place_of(t);
    places.begin = std::copy_n(t.shape, t.ndim, places.begin + kPlace);
    places.begin = std::copy_n(t.strides, t.ndim, places.begin);
  }
  return PyBool_FromLong(places.begin == places.end);
}

PyObject* unmoved(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  Table places;
  if (!counts(n_args, 3) || !read(args[1], args[0], &places)) return nullptr;
  const bool layouts = args[2] == Py_True;
  for (Py_ssize_t i = 0; i < PyList_Size(args[0]); ++i) {
    DLTensor t;
    if (!describe(PyList_GetItem(args[0], i), &t) || places.end - places.begin < kPlace) return PyBool_FromLong(0);
    const Place now = place_of(t), &then = *reinterpret_cast<const Place*>(places.begin);
    places.begin += kPlace + 2 * then.ndim;
    if (now.address != then.address || now.numel != then.numel || now.dtype != then.dtype || now.device != then.device)
      return PyBool_FromLong(0);
    if (layouts && (now.ndim != then.ndim || !std::equal(t.shape, t.shape + t.ndim, places.begin - 2 * t.ndim) ||
                    !std::equal(t.strides, t.strides + t.ndim, places.begin - t.ndim)))
      return PyBool_FromLong(0);
  }
  return PyBool_FromLong(places.begin == places.end);
}

template <typename F>
PyCFunction fast(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"survey", fast(survey), METH_FASTCALL,
     "survey(grads, places, table): whether each gradient lies as the weight that `record` found, or is None. If so, "
     "writes their addresses, or 0. Returns 0: they do not, and nothing is written; 1: they do, at the addresses that were "
     "there; 2: at others."},
    {"record", fast(record), METH_FASTCALL,
     "record(tensors, places): writes address, number of elements, dtype, device and layout of each. Returns whether all have "
     "them, and fill the table."},
    {"unmoved", fast(unmoved), METH_FASTCALL,
     "unmoved(tensors, places, layouts): whether they are as `record` found them; with `layouts`, also in shape and "
     "strides."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_survey(PyObject* module) {
  PyObject* torch = PyImport_ImportModule("torch");
  if (torch == nullptr) return -1;
  tensor_type = PyObject_GetAttrString(torch, "Tensor");
  Py_DECREF(torch);
  if (tensor_type == nullptr) return -1;
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  auto* api = capsule == nullptr ? nullptr
                                 : static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_XDECREF(capsule);
  PyErr_Clear();
  if (api == nullptr || api->header.version.major != DLPACK_MAJOR_VERSION ||
      api->dltensor_from_py_object_no_sync == nullptr)
    return 0;
  look = api->dltensor_from_py_object_no_sync;
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastsam
