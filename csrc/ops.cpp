// torch.ops.fastsam: the schemas and, for CPU tensors, the checks of their arguments and the calls; for CUDA tensors
// those are in cuda/sam_cuda.cu, another library. LibTorch stable ABI.
//
// The ops are private to the package. They reach the weights through tables of addresses, a mutation that the schemas
// cannot tell of, so they must not be traced.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <vector>

#include "arguments.h"
#include "cpu/sam_cpu.h"
#include "survey.h"

namespace {

using fastsam::Chunk;
using fastsam::data;
using fastsam::cpu::Bucket;
using fastsam::cpu::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::Float;
    case ScalarType::Double:
      return DType::Double;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Half;
    default:
      STD_TORCH_CHECK(false, "fastsam: parameters must be float32, float64, bfloat16 or float16");
  }
}

Bucket bucket_of(const Tensor& chunks, const Tensor& weights, const Tensor& grads, ScalarType type) {
  STD_TORCH_CHECK(chunks.dim() == 2 && chunks.size(1) == 4, "fastsam: chunks must be of shape [n, 4]");
  STD_TORCH_CHECK(weights.numel() == grads.numel(), "fastsam: weights and grads must be of one length");
  return {data<const Chunk>(chunks, ScalarType::Long, 0, "chunks"), chunks.size(0),
          data<const int64_t>(weights, ScalarType::Long, 0, "weights"),
          data<const int64_t>(grads, ScalarType::Long, 0, "grads"), dtype_of(type)};
}

template <typename A>
void combine_as(double square_sum, const Tensor& rho, const Tensor& epsilon, const Tensor& norm, const Tensor& scale) {
  const ScalarType type = norm.scalar_type();
  const int64_t groups = scale.numel();
  const A* r = data<const A>(rho, type, groups, "rho");
  const A* e = data<const A>(epsilon, type, groups, "epsilon");
  A* s = data<A>(scale, type, groups, "scale");
  const A n = static_cast<A>(std::sqrt(square_sum));
  *data<A>(norm, type, 1, "norm") = n;
  for (int64_t i = 0; i < groups; ++i) s[i] = fastsam::scale_of(n, r[i], e[i]);
}

void write_scales(double square_sum, const Tensor& rho, const Tensor& epsilon, const Tensor& norm, const Tensor& scale) {
  if (norm.scalar_type() == ScalarType::Double)
    combine_as<double>(square_sum, rho, epsilon, norm, scale);
  else
    combine_as<float>(square_sum, rho, epsilon, norm, scale);
}

void combine(Tensor rho, Tensor epsilon, Tensor square_sums, Tensor norm, Tensor scale) {
  const double* sums = data<const double>(square_sums, ScalarType::Double, 0, "square_sums");
  double total = 0;
  for (int64_t i = 0; i < square_sums.numel(); ++i) total += sums[i];
  write_scales(total, rho, epsilon, norm, scale);
}

void norm(Tensor chunks, Tensor weights, Tensor grads, ScalarType dtype, int64_t index, bool finish, Tensor partials,
          Tensor adaptive, Tensor rho, Tensor epsilon, Tensor square_sums, Tensor norm, Tensor scale, Tensor saved,
          Tensor /* counter: CUDA's */) {
  const Bucket bucket = bucket_of(chunks, weights, grads, dtype);
  *data<int32_t>(saved, ScalarType::Int, 1, "saved") = 0;
  STD_TORCH_CHECK(index >= 0, "fastsam: index must be >= 0");
  const double square_sum =
      fastsam::cpu::square_sum(bucket, data<const int32_t>(adaptive, ScalarType::Int, scale.numel(), "adaptive"),
                               data<double>(partials, ScalarType::Double, bucket.n_chunks, "partials"));
  data<double>(square_sums, ScalarType::Double, index + 1, "square_sums")[index] = square_sum;
  if (finish) write_scales(square_sum, rho, epsilon, norm, scale);
}

void perturb(Tensor chunks, Tensor weights, Tensor grads, Tensor adaptive, Tensor norm, Tensor scale, Tensor backup,
             Tensor saved, int64_t generation) {
  const Bucket bucket = bucket_of(chunks, weights, grads, backup.scalar_type());
  const int64_t groups = scale.numel();
  std::vector<double> scales(groups);
  bool finite;
  if (norm.scalar_type() == ScalarType::Double) {
    const double* s = data<const double>(scale, ScalarType::Double, groups, "scale");
    scales.assign(s, s + groups);
    finite = fastsam::is_finite(*data<const double>(norm, ScalarType::Double, 1, "norm"));
  } else {
    const float* s = data<const float>(scale, ScalarType::Float, groups, "scale");
    scales.assign(s, s + groups);
    finite = fastsam::is_finite(*data<const float>(norm, ScalarType::Float, 1, "norm"));
  }
  const int32_t* a = data<const int32_t>(adaptive, ScalarType::Int, groups, "adaptive");
  void* b = data<void>(backup, backup.scalar_type(), fastsam::cpu::backup_size(bucket), "backup");
  int32_t* flag = data<int32_t>(saved, ScalarType::Int, 1, "saved");
  if (!finite) return;  // the weights stay, and there is nothing to restore
  fastsam::cpu::perturb(bucket, a, scales.data(), b);
  *flag = static_cast<int32_t>(generation);
}

void restore(Tensor chunks, Tensor weights, Tensor grads, Tensor backup, Tensor saved, int64_t generation) {
  const Bucket bucket = bucket_of(chunks, weights, grads, backup.scalar_type());
  if (*data<const int32_t>(saved, ScalarType::Int, 1, "saved") == generation)
    fastsam::cpu::restore(
        bucket, data<void>(backup, backup.scalar_type(), fastsam::cpu::backup_size(bucket), "backup"));
}

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(fastsam::cpu::instruction_set()); }

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "The CPU instruction set in use: avx512, avx2 or baseline."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastsam._C", "Registers torch.ops.fastsam.", -1, methods};

}  // namespace

// chunks, weights, grads: the tables of a ParameterBucket. The other names are those of ParameterBucket and Scalars.
STABLE_TORCH_LIBRARY(fastsam, m) {
  m.def(
      "norm(Tensor chunks, Tensor weights, Tensor grads, ScalarType dtype, int index, bool finish, Tensor(a!) partials, "
      "Tensor adaptive, Tensor rho, Tensor epsilon, Tensor(b!) square_sums, Tensor(c!) norm, Tensor(d!) scale, "
      "Tensor(e!) saved, Tensor(f!) counter) -> ()");
  m.def(
      "combine(Tensor rho, Tensor epsilon, Tensor square_sums, Tensor(a!) norm, Tensor(b!) scale) -> ()");
  m.def(
      "perturb(Tensor chunks, Tensor weights, Tensor grads, Tensor adaptive, Tensor norm, Tensor scale, "
      "Tensor(a!) backup, Tensor(b!) saved, int generation) -> ()");
  m.def(
      "restore(Tensor chunks, Tensor weights, Tensor grads, Tensor backup, Tensor saved, int generation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsam, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("perturb", TORCH_BOX(&perturb));
  m.impl("restore", TORCH_BOX(&restore));
}

PyMODINIT_FUNC PyInit__C(void) {
  PyObject* made = PyModule_Create(&module);
  if (made != nullptr && fastsam::add_survey(made) != 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
