// The CUDA kernels: norm, perturb and restore of a bucket, one launch each, and combine. They know no torch.
//
// A block takes a chunk (norm: a few). Addresses come from tables; each chunk is peeled: the elements before the first
// and after the last 16-byte boundary are its *edge*, all between moves by 128-bit vectors. Offsets within a chunk are
// 32 bits, all others 64.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../sam_math.h"

namespace fastsam::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // vectors of each operand that a thread has in flight
constexpr int kNormSpan = 8192;  // elements of a parameter from which on norm takes no further chunk along

// ---- Elements and vectors -------------------------------------------------------------------------------------------

template <typename T>
using Real = typename Arithmetic<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T narrow(Real<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow(float x) {
  return __float2half_rn(x);
}

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T at[kWidth<T>];
};

template <typename T>
__device__ __forceinline__ Vector<T> load(const T* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  return reinterpret_cast<const Vector<T>&>(bits);
}

// What is read or written once: first to leave the L2 cache.
template <typename T>
__device__ __forceinline__ Vector<T> load_once(const T* p) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  return reinterpret_cast<const Vector<T>&>(bits);
}

template <typename T>
__device__ __forceinline__ void store(T* p, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(p) = reinterpret_cast<const uint4&>(v);
}

template <typename T>
__device__ __forceinline__ void store_once(T* p, const Vector<T>& v) {
  __stcs(reinterpret_cast<uint4*>(p), reinterpret_cast<const uint4&>(v));
}

// A vector from anywhere: one access an element, where gradient and weight do not share their boundaries.
template <bool ALIGNED, typename T>
__device__ __forceinline__ Vector<T> load_grad(const T* p) {
  if constexpr (ALIGNED) {
    return load_once(p);
  } else {
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) v.at[i] = p[i];
    return v;
  }
}

// ---- Chunks ---------------------------------------------------------------------------------------------------------

struct Bucket {
  const Chunk* chunks;
  int32_t n_chunks;
  const int64_t* weights;
  const int64_t* grads;
};

// A pointer from a table might point anywhere, and would be accessed more slowly, if it were not said to be global.
template <typename T>
__device__ __forceinline__ T* at(int64_t address, int64_t offset) {
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address))) + offset;
}

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

struct Peeled {
  int head;     // elements before the first 16-byte boundary
  int vectors;  // after it
  int edge;     // elements in no vector: fewer than two vectors of them
};

template <typename T>
__device__ __forceinline__ Peeled peel(const T* p, int n) {
  const int misaligned = static_cast<int>((16 - (reinterpret_cast<uintptr_t>(p) & 15) & 15) / sizeof(T));
  const int head = misaligned < n ? misaligned : n;
  const int vectors = (n - head) / kWidth<T>;
  return {head, vectors, n - vectors * kWidth<T>};
}

// The index of this thread's element of the edge.
template <typename T>
__device__ __forceinline__ int edge_index(const Peeled& peeled) {
  const int i = static_cast<int>(threadIdx.x);
  return i < peeled.head ? i : i + peeled.vectors * kWidth<T>;
}

__device__ __forceinline__ bool in_edge(const Peeled& peeled) { return static_cast<int>(threadIdx.x) < peeled.edge; }

// ---- Norm -----------------------------------------------------------------------------------------------------------

// Where the results of the norm go. A: dtype of the ascent.
template <typename A>
struct Scales {
  const A* rho;
  const A* epsilon;
  int32_t n_groups;
  A* norm;
  A* scale;
};

// The sum over the block, in an order that is always the same; in thread 0.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double sums[kThreads / 32];
  for (int d = 16; d > 0; d /= 2) x += __shfl_down_sync(~0u, x, d);
  __syncthreads();  // an earlier call may still read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kThreads / 32; ++i) x += sums[i];
  return x;
}

template <typename A>
__device__ __forceinline__ void write_scales(double square_sum, const Scales<A>& out) {
  const A norm = static_cast<A>(__dsqrt_rn(square_sum));
  *out.norm = norm;
  for (int i = 0; i < out.n_groups; ++i) out.scale[i] = scale_of(norm, out.rho[i], out.epsilon[i]);
}

template <bool ADAPTIVE, bool ALIGNED, typename T>
__device__ __forceinline__ Real<T> square_vectors(const T* g, const T* w, int n) {
  Real<T> sums[kUnroll] = {};
  for (int i = threadIdx.x; i < n; i += kUnroll * kThreads) {
    Vector<T> x[kUnroll] = {}, y[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = i + u * kThreads;
      if (k < n) {
        x[u] = load(g + k * kWidth<T>);
        if constexpr (ADAPTIVE) y[u] = load_grad<ALIGNED>(w + k * kWidth<T>);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kWidth<T>; ++e) {
        const Real<T> t = norm_term<ADAPTIVE>(widen(y[u].at[e]), widen(x[u].at[e]));
        sums[u] += t * t;
      }
    }
  }
  return sums[0] + sums[1];
}

template <bool ADAPTIVE, typename T>
__device__ __forceinline__ double square_chunk(const T* g, const T* w, int n) {
  const Peeled peeled = peel(g, n);
  double sum = 0;
  if (in_edge(peeled)) {
    const int i = edge_index<T>(peeled);
    const Real<T> t = norm_term<ADAPTIVE>(ADAPTIVE ? widen(w[i]) : Real<T>(0), widen(g[i]));
    sum = t * t;
  }
  if (!ADAPTIVE || is_aligned(w + peeled.head)) {
    sum += square_vectors<ADAPTIVE, true>(g + peeled.head, w + peeled.head, peeled.vectors);
  } else {
    sum += square_vectors<ADAPTIVE, false>(g + peeled.head, w + peeled.head, peeled.vectors);
  }
  return sum;
}

// Counts the blocks that got here, and starts anew after the last. What a block wrote before is seen by those that
// count after it: the release and the acquire of one instruction.
__device__ __forceinline__ bool is_last_block(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(gridDim.x - 1)
               : "memory");
  return before == gridDim.x - 1;
}

// The sum of squares of a bucket, sum g^2 (adaptive: sum (|w| * g)^2); where `finish`, also norm and scales. A thread sums
// a chunk in the dtype's arithmetic, and chunks in fp64: equal gradients would otherwise all round in one direction. A
// block takes `per_block` chunks in a row, the first `longer` blocks one more.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 5 : 6)  // as many blocks as fit without a spill
    norm_kernel(const Bucket bucket, const int32_t per_block, const int32_t longer, const int32_t* adaptive,
                double* partials, uint32_t* counter, int32_t* saved, double* square_sum, const bool finish,
                const Scales<A> out) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int32_t first = block * per_block + min(block, longer);
  const int32_t end = first + per_block + (block < longer ? 1 : 0);
  double sum = 0;
  for (int32_t i = first; i < end; ++i) {
    const Chunk c = bucket.chunks[i];
    const int64_t grad = bucket.grads[c.slot];
    if (grad == 0) continue;
    // The next chunks of this parameter go along: no further wait for a record and for what its slot tells.
    int32_t n = c.length();
    while (n < kNormSpan && i + 1 < end && bucket.chunks[i + 1].slot == c.slot) n += bucket.chunks[++i].length();
    const T* g = at<const T>(grad, c.offset);
    if (adaptive[c.group()] != 0)
      sum += square_chunk<true>(g, at<const T>(bucket.weights[c.slot], c.offset), n);
    else
      sum += square_chunk<false>(g, g, n);
  }
  sum = block_sum(sum);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
    is_last = is_last_block(counter);
  }
  __syncthreads();
  if (!is_last) return;
  sum = 0;
  for (uint32_t i = threadIdx.x; i < gridDim.x; i += kThreads) sum += __ldcg(partials + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *saved = 0;
    *square_sum = sum;
    if (finish) write_scales(sum, out);
  }
}

template <typename A>
__global__ void combine_kernel(const double* square_sums, const int32_t n_buckets, const Scales<A> out) {
  double sum = 0;
  for (int32_t i = 0; i < n_buckets; ++i) sum += square_sums[i];
  write_scales(sum, out);
}

// ---- Perturb and restore --------------------------------------------------------------------------------------------

template <bool ADAPTIVE, bool ALIGNED, typename T>
__device__ __forceinline__ void perturb_vectors(T* w, const T* g, T* backup, int n, bool finite, Real<T> scale) {
  for (int i = threadIdx.x; i < n; i += kUnroll * kThreads) {
    Vector<T> x[kUnroll], y[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = i + u * kThreads;
      if (k < n) {
        y[u] = load_grad<ALIGNED>(g + k * kWidth<T>);
        x[u] = load(w + k * kWidth<T>);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = i + u * kThreads;
      if (k < n) {
        store_once(backup + k * kWidth<T>, x[u]);
#pragma unroll
        for (int e = 0; e < kWidth<T>; ++e)
          x[u].at[e] = narrow<T>(climb<ADAPTIVE>(widen(x[u].at[e]), widen(y[u].at[e]), scale));
        if (finite) store(w + k * kWidth<T>, x[u]);
      }
    }
  }
}

template <bool ADAPTIVE, typename T>
__device__ __forceinline__ void perturb_chunk(T* w, const T* g, T* backup, int n, bool finite, Real<T> scale) {
  const Peeled peeled = peel(w, n);  // by the boundaries of w: those of the backup are the same
  if (in_edge(peeled)) {
    const int i = edge_index<T>(peeled);
    const T x = w[i];
    backup[i] = x;
    if (finite) w[i] = narrow<T>(climb<ADAPTIVE>(widen(x), widen(g[i]), scale));
  }
  w += peeled.head;
  g += peeled.head;
  backup += peeled.head;
  if (is_aligned(g))
    perturb_vectors<ADAPTIVE, true>(w, g, backup, peeled.vectors, finite, scale);
  else
    perturb_vectors<ADAPTIVE, false>(w, g, backup, peeled.vectors, finite, scale);
}

// backup <- w; w <- w + e_w with e_w = g * scale (adaptive: w^2 * g * scale), rounded as climb() in ../sam_math.h.
// Backwards over the chunks: what norm read last is still in the L2 cache.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const Bucket bucket, const int32_t* adaptive, const A* norm,
                                                           const A* scale, T* backup, int32_t* saved,
                                                           const int32_t generation) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *saved = generation;
  const Chunk c = bucket.chunks[gridDim.x - 1 - blockIdx.x];
  const int64_t grad = bucket.grads[c.slot];
  T* w = at<T>(bucket.weights[c.slot], c.offset);
  const Real<T> s = static_cast<Real<T>>(scale[c.group()]);
  const bool is_adaptive = adaptive[c.group()] != 0;
  const bool finite = is_finite(*norm);
  if (grad == 0) return;
  const T* g = at<const T>(grad, c.offset);
  if (is_adaptive)
    perturb_chunk<true>(w, g, backup + c.backup, c.length(), finite, s);
  else
    perturb_chunk<false>(w, g, backup + c.backup, c.length(), finite, s);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    restore_kernel(const Bucket bucket, const T* backup, const int32_t* saved, const int32_t generation) {
  // Before the tables are read: where perturb never ran, as in the capture of a graph that failed, they may hold anything.
  if (*saved != generation) return;
  const Chunk c = bucket.chunks[blockIdx.x];
  const int64_t grad = bucket.grads[c.slot];
  T* w = at<T>(bucket.weights[c.slot], c.offset);
  if (grad == 0) return;
  const T* b = backup + c.backup;
  const Peeled peeled = peel(w, c.length());
  if (in_edge(peeled)) w[edge_index<T>(peeled)] = b[edge_index<T>(peeled)];
  w += peeled.head;
  b += peeled.head;
  for (int i = threadIdx.x; i < peeled.vectors; i += kUnroll * kThreads) {
    Vector<T> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * kThreads < peeled.vectors) x[u] = load_once(b + (i + u * kThreads) * kWidth<T>);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * kThreads < peeled.vectors) store(w + (i + u * kThreads) * kWidth<T>, x[u]);
  }
}

}  // namespace fastsam::cuda
