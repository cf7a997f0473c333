// The kernels of csrc/cuda/sam_kernels.cuh as functions of addresses, run by the emulator.
#include "sam_kernels.cuh"

using namespace fastsam;
using namespace fastsam::cuda;

namespace {

enum class DType { Float, Double, BFloat16, Half };

template <typename F>
void dispatch(int dtype, const F& f) {
  switch (static_cast<DType>(dtype)) {
    case DType::Float:
      return f.template operator()<float>();
    case DType::Double:
      return f.template operator()<double>();
    case DType::BFloat16:
      return f.template operator()<__nv_bfloat16>();
    case DType::Half:
      return f.template operator()<__half>();
  }
}

template <typename F>
void dispatch_ascent(bool fp64, const F& f) {
  fp64 ? f.template operator()<double>() : f.template operator()<float>();
}

template <typename A>
Scales<A> scales_of(void* rho, void* epsilon, int groups, void* norm, void* scale) {
  return {static_cast<A*>(rho), static_cast<A*>(epsilon), groups, static_cast<A*>(norm), static_cast<A*>(scale)};
}

}  // namespace

extern "C" void norm(int dtype, bool fp64, Chunk* chunks, int n_chunks, int64_t* weights, int64_t* grads, int blocks,
                     int32_t* adaptive, double* partials, uint32_t* counter, int32_t* saved, double* square_sum,
                     bool finish, void* rho, void* epsilon, int groups, void* out, void* scale) {
  dispatch(dtype, [&]<typename T>() {
    dispatch_ascent(fp64, [&]<typename A>() {
      emulator::launch(blocks, kThreads, [&] {
        norm_kernel<T, A>({chunks, n_chunks, weights, grads}, n_chunks / blocks, n_chunks % blocks, adaptive, partials,
                          counter, saved, square_sum, finish, scales_of<A>(rho, epsilon, groups, out, scale));
      });
    });
  });
}

extern "C" void combine(bool fp64, double* sums, int n, void* rho, void* epsilon, int groups, void* out, void* scale) {
  dispatch_ascent(fp64, [&]<typename A>() {
    emulator::launch(1, 1, [&] { combine_kernel<A>(sums, n, scales_of<A>(rho, epsilon, groups, out, scale)); });
  });
}

extern "C" void perturb(int dtype, bool fp64, Chunk* chunks, int n_chunks, int64_t* weights, int64_t* grads,
                        int32_t* adaptive, void* norm, void* scale, void* backup, int32_t* saved, int generation) {
  dispatch(dtype, [&]<typename T>() {
    dispatch_ascent(fp64, [&]<typename A>() {
      emulator::launch(n_chunks, kThreads, [&] {
        perturb_kernel<T, A>({chunks, n_chunks, weights, grads}, adaptive, static_cast<A*>(norm),
                             static_cast<A*>(scale), static_cast<T*>(backup), saved, generation);
      });
    });
  });
}

extern "C" void restore(int dtype, Chunk* chunks, int n_chunks, int64_t* weights, int64_t* grads, void* backup,
                        int32_t* saved, int generation) {
  dispatch(dtype, [&]<typename T>() {
    emulator::launch(n_chunks, kThreads, [&] {
      restore_kernel<T>({chunks, n_chunks, weights, grads}, static_cast<T*>(backup), saved, generation);
    });
  });
}
