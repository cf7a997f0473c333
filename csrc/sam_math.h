// The per-element arithmetic of the sharpness-aware step (arXiv 2010.01412, Eq. 2; adaptive: arXiv 2102.11600), said
// once for CPU and CUDA. Every operation is rounded by itself: a fused multiply-add would give other bits than PyTorch.
// On the host, -ffp-contract=off sees to that.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTSAM_HD __host__ __device__ __forceinline__
#else
#define FASTSAM_HD inline
#endif

namespace fastsam {

// One piece of a bucket, within one parameter; a row of ParameterBucket.chunks.
struct Chunk {
  int64_t slot;
  int64_t length_and_group;
  int64_t offset;  // in the parameter, in elements
  int64_t backup;  // in the backup, in elements

  FASTSAM_HD int32_t length() const { return static_cast<int32_t>(length_and_group & 0xffffffff); }
  FASTSAM_HD int32_t group() const { return static_cast<int32_t>(length_and_group >> 32); }
};

// What a parameter's elements are computed in: 16-bit ones in fp32.
template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

FASTSAM_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTSAM_HD double mul(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTSAM_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FASTSAM_HD double add(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

FASTSAM_HD float reciprocal(float a) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(a);
#else
  return 1.0f / a;
#endif
}

FASTSAM_HD double reciprocal(double a) {
#ifdef __CUDA_ARCH__
  return __drcp_rn(a);
#else
  return 1.0 / a;
#endif
}

template <typename A>
FASTSAM_HD bool is_finite(A a) {
  return a - a == A(0);
}

// What the norm is taken of.
template <bool ADAPTIVE, typename A>
FASTSAM_HD A norm_term(A w, A g) {
  if constexpr (ADAPTIVE) return mul(w < A(0) ? -w : w, g);
  return g;
}

// w + e_w. The order of the products is PyTorch's in davda54/sam.
template <bool ADAPTIVE, typename A>
FASTSAM_HD A climb(A w, A g, A scale) {
  if constexpr (ADAPTIVE) return add(w, mul(mul(mul(w, w), g), scale));
  return add(w, mul(g, scale));
}

// (1 / (norm + epsilon)) * rho, which is what `rho / tensor` computes in PyTorch; 0 where there is no direction to climb.
template <typename A>
FASTSAM_HD A scale_of(A norm, A rho, A epsilon) {
  const A scale = mul(reciprocal(add(norm, epsilon)), rho);
  return is_finite(norm) && is_finite(scale) ? scale : A(0);
}

}  // namespace fastsam
