// torch.ops.fastsam for CUDA tensors: the checks of their arguments and the launches, on the current stream of the
// tensors' device. LibTorch stable ABI; the schemas are in ../ops.cpp.
#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>

#include "../arguments.h"
#include "sam_kernels.cuh"

// Declared by shim.h only where all of torch's CUDA headers are wanted. The stable headers give the handle of a stream
// from torch 2.13 on (Stream::nativeHandle), and this library runs on torch 2.10.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastsam::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Blocks of norm: the last of them sums up a partial of each, while the device idles.
constexpr int64_t kMostBlocks = 2048;

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "fastsam: the launch of a CUDA kernel failed: ", cudaGetErrorString(error));
}

// As fastsam::data, and on the device that the kernel runs on: anything else would be read as an address there.
template <typename T>
T* data_on(const Tensor& device_of, const Tensor& tensor, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_of.get_device_index(), "fastsam: ", name,
                  " is on another device than chunks");
  return data<T>(tensor, type, numel, name);
}

Bucket bucket_of(const Tensor& chunks, const Tensor& weights, const Tensor& grads) {
  STD_TORCH_CHECK(chunks.dim() == 2 && chunks.size(1) == 4, "fastsam: chunks must be of shape [n, 4]");
  STD_TORCH_CHECK(chunks.size(0) <= INT32_MAX, "fastsam: too many chunks: ", chunks.size(0));
  STD_TORCH_CHECK(weights.numel() == grads.numel(), "fastsam: weights and grads must be of one length");
  return {data_on<const Chunk>(chunks, chunks, ScalarType::Long, 0, "chunks"), static_cast<int32_t>(chunks.size(0)),
          data_on<const int64_t>(chunks, weights, ScalarType::Long, 0, "weights"),
          data_on<const int64_t>(chunks, grads, ScalarType::Long, 0, "grads")};
}

template <typename A>
constexpr ScalarType scalar_type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

template <typename A>
Scales<A> scales_of(const Tensor& rho, const Tensor& epsilon, const Tensor& norm, const Tensor& scale) {
  const ScalarType type = scalar_type<A>;
  const int64_t groups = scale.numel();
  return {data_on<const A>(norm, rho, type, groups, "rho"), data_on<const A>(norm, epsilon, type, groups, "epsilon"),
          static_cast<int32_t>(groups), data<A>(norm, type, 1, "norm"),
          data_on<A>(norm, scale, type, groups, "scale")};
}

// f<T>(), with T for the dtype of a bucket.
template <typename F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<__nv_bfloat16>();
    case ScalarType::Half:
      return f.template operator()<__half>();
    default:
      STD_TORCH_CHECK(false, "fastsam: parameters must be float32, float64, bfloat16 or float16");
  }
}

// f<A>(), with A for the dtype of an ascent.
template <typename F>
void dispatch_ascent(ScalarType type, const F& f) {
  if (type == ScalarType::Double)
    f.template operator()<double>();
  else
    f.template operator()<float>();
}

void norm(Tensor chunks, Tensor weights, Tensor grads, ScalarType dtype, int64_t index, bool finish, Tensor partials,
          Tensor adaptive, Tensor rho, Tensor epsilon, Tensor square_sums, Tensor norm, Tensor scale, Tensor saved,
          Tensor counter) {
  const torch::stable::accelerator::DeviceGuard guard(chunks.get_device_index());
  const Bucket bucket = bucket_of(chunks, weights, grads);
  // How many chunks a block takes depends on their number alone: the same sums in the same order on every GPU.
  const int64_t blocks = std::clamp<int64_t>(bucket.n_chunks, 1, kMostBlocks);
  const int32_t per_block = static_cast<int32_t>(bucket.n_chunks / blocks);
  const int32_t longer = static_cast<int32_t>(bucket.n_chunks % blocks);
  STD_TORCH_CHECK(index >= 0, "fastsam: index must be >= 0");
  double* square_sum = data_on<double>(chunks, square_sums, ScalarType::Double, index + 1, "square_sums") + index;
  double* sums = data_on<double>(chunks, partials, ScalarType::Double, blocks, "partials");
  uint32_t* count = data_on<uint32_t>(chunks, counter, ScalarType::Int, 1, "counter");
  int32_t* flag = data_on<int32_t>(chunks, saved, ScalarType::Int, 1, "saved");
  const int32_t* a = data_on<const int32_t>(chunks, adaptive, ScalarType::Int, scale.numel(), "adaptive");
  dispatch(dtype, [&]<typename T>() {
    dispatch_ascent(norm.scalar_type(), [&]<typename A>() {
      norm_kernel<T, A><<<static_cast<uint32_t>(blocks), kThreads, 0, stream_of(chunks)>>>(
          bucket, per_block, longer, a, sums, count, flag, square_sum, finish,
          scales_of<A>(rho, epsilon, norm, scale));
    });
  });
  check_launch();
}

void combine(Tensor rho, Tensor epsilon, Tensor square_sums, Tensor norm, Tensor scale) {
  const torch::stable::accelerator::DeviceGuard guard(norm.get_device_index());
  const double* sums = data_on<const double>(norm, square_sums, ScalarType::Double, 0, "square_sums");
  dispatch_ascent(norm.scalar_type(), [&]<typename A>() {
    combine_kernel<A><<<1, 1, 0, stream_of(norm)>>>(sums, static_cast<int32_t>(square_sums.numel()),
                                                          scales_of<A>(rho, epsilon, norm, scale));
  });
  check_launch();
}

void perturb(Tensor chunks, Tensor weights, Tensor grads, Tensor adaptive, Tensor norm, Tensor scale, Tensor backup,
             Tensor saved, int64_t generation) {
  const torch::stable::accelerator::DeviceGuard guard(chunks.get_device_index());
  const Bucket bucket = bucket_of(chunks, weights, grads);
  if (bucket.n_chunks == 0) return;
  const ScalarType type = norm.scalar_type();
  const int64_t groups = scale.numel();
  const int32_t* a = data_on<const int32_t>(chunks, adaptive, ScalarType::Int, groups, "adaptive");
  int32_t* flag = data_on<int32_t>(chunks, saved, ScalarType::Int, 1, "saved");
  dispatch(backup.scalar_type(), [&]<typename T>() {
    dispatch_ascent(type, [&]<typename A>() {
      perturb_kernel<T, A><<<static_cast<uint32_t>(bucket.n_chunks), kThreads, 0, stream_of(chunks)>>>(
          bucket, a, data_on<const A>(chunks, norm, type, 1, "norm"),
          data_on<const A>(chunks, scale, type, groups, "scale"),
          data_on<T>(chunks, backup, backup.scalar_type(), 0, "backup"), flag,
          static_cast<int32_t>(generation));
    });
  });
  check_launch();
}

void restore(Tensor chunks, Tensor weights, Tensor grads, Tensor backup, Tensor saved, int64_t generation) {
  const torch::stable::accelerator::DeviceGuard guard(chunks.get_device_index());
  const Bucket bucket = bucket_of(chunks, weights, grads);
  if (bucket.n_chunks == 0) return;
  const int32_t* flag = data_on<const int32_t>(chunks, saved, ScalarType::Int, 1, "saved");
  dispatch(backup.scalar_type(), [&]<typename T>() {
    restore_kernel<T><<<static_cast<uint32_t>(bucket.n_chunks), kThreads, 0, stream_of(chunks)>>>(
        bucket, data_on<const T>(chunks, backup, backup.scalar_type(), 0, "backup"), flag,
        static_cast<int32_t>(generation));
  });
  check_launch();
}

PyObject* oldest_architecture(PyObject*, PyObject*) {
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};  // ascending, 900 for sm_90
  return PyLong_FromLong(architectures[0] / 10);
}

PyMethodDef methods[] = {
    {"oldest_architecture", oldest_architecture, METH_NOARGS, "The oldest capability that this was built for, 90 for 9.0."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastsam._C_cuda", "torch.ops.fastsam for CUDA tensors.", -1, methods};

STABLE_TORCH_LIBRARY_IMPL(fastsam, CUDA, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("perturb", TORCH_BOX(&perturb));
  m.impl("restore", TORCH_BOX(&restore));
}

}  // namespace
}  // namespace fastsam::cuda

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&fastsam::cuda::module); }
