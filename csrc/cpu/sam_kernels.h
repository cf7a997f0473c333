// The kernels of one chunk. No include guard: sam_cpu.cpp includes this file once for each instruction set, with
//   FASTSAM_ISA           the namespace
//   FASTSAM_VECTOR_BYTES  the width of its vectors
//   FASTSAM_F16C          defined where the processor converts fp16
// and the compiler's target set. What is included from here must have been included before.

namespace fastsam::cpu {
namespace {
namespace FASTSAM_ISA {

// Elements that are widened, summed or saved at a time: their fp32 fits the L1 cache three times, and 32 additions a
// lane keep the fp32 sums within 32 * 2^-24 of the fp64 ones, for any input.
constexpr int64_t kTile = 1024;

inline void widen(const BFloat16* __restrict x, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = std::bit_cast<float>(uint32_t(x[i].bits) << 16);
}

inline void narrow(const float* __restrict x, BFloat16* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = std::bit_cast<uint32_t>(x[i]);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    y[i].bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

inline void widen(const Half* __restrict x, float* __restrict y, int64_t n) {
  int64_t i = 0;
#ifdef FASTSAM_F16C
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < n; ++i) y[i] = c10::detail::fp16_ieee_to_fp32_value(x[i].bits);
}

inline void narrow(const float* __restrict x, Half* __restrict y, int64_t n) {
  int64_t i = 0;
#ifdef FASTSAM_F16C
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) y[i].bits = c10::detail::fp16_ieee_from_fp32_value(x[i]);
}

// x itself where it needs no widening, else its copy in the buffer.
template <typename T, typename A>
inline const A* widened(const T* x, A* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, A>) {
    return x;
  } else {
    widen(x, buffer, n);
    return buffer;
  }
}

// The sum of squares in fp64 throughout, in lanes as below.
template <typename A>
inline double wide_square_sum(const A* x, int64_t n) {
  constexpr int lanes = 16;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int k = 0; k < lanes; ++k) sums[k] += double(x[i + k]) * double(x[i + k]);
  for (int k = 0; i < n; ++i, ++k) sums[k] += double(x[i]) * double(x[i]);
  double total = 0;
  for (int k = 0; k < lanes; ++k) total += sums[k];
  return total;
}

// The sum of squares of at most kTile elements: 128 bytes of lanes whatever the vectors' width, so that every
// instruction set gives the same bits.
template <typename A>
inline double square_sum(const A* x, int64_t n) {
  constexpr int lanes = 128 / sizeof(A), width = FASTSAM_VECTOR_BYTES / sizeof(A), vectors = lanes / width;
  typedef A Vector __attribute__((vector_size(FASTSAM_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
  Vector sums[vectors] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int k = 0; k < vectors; ++k) {
      const Vector v = *reinterpret_cast<const Vector*>(x + i + k * width);
      sums[k] += v * v;
    }
  }
  A rest[lanes];
  std::memcpy(rest, sums, sizeof(rest));
  for (int k = 0; i < n; ++i, ++k) rest[k] += x[i] * x[i];
  double total[lanes];
  for (int k = 0; k < lanes; ++k) total[k] = rest[k];
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) total[k] += total[k + half];
  // Squares out of fp32's range (an element above 1e19, or none above 1e-15) are summed once more, in fp64.
  if (!(total[0] >= 0x1p-100 && total[0] <= 0x1p127)) return wide_square_sum(x, n);
  return total[0];
}

template <typename T, bool ADAPTIVE>
double chunk_square_sum(const T* w, const T* g, int64_t n) {
  using A = typename Arithmetic<T>::type;
  alignas(64) A g_buffer[kTile], w_buffer[kTile];
  double sum = 0;
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t m = n - i < kTile ? n - i : kTile;
    const A* x = widened(g + i, g_buffer, m);
    if constexpr (ADAPTIVE) {
      const A* y = widened(w + i, w_buffer, m);
      for (int64_t k = 0; k < m; ++k) g_buffer[k] = norm_term<true>(y[k], x[k]);
      x = g_buffer;
    }
    sum += square_sum(x, m);
  }
  return sum;
}

// Copies; with `stream` past the caches, where the destination will not be read soon: a plain store would first read
// the line that it overwrites.
inline void copy(void* to, const void* from, int64_t bytes, bool stream) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
#ifdef FASTSAM_X86
  if (stream) {
    const int64_t misaligned = -reinterpret_cast<uintptr_t>(dst) & 63, head = misaligned < bytes ? misaligned : bytes;
    std::memcpy(dst, src, head);
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
      for (int k = 0; k < 64; k += FASTSAM_VECTOR_BYTES) {
#if FASTSAM_VECTOR_BYTES == 64
        _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i + k), _mm512_loadu_si512(src + i + k));
#elif FASTSAM_VECTOR_BYTES == 32
        _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + k),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + k)));
#else
        _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + k),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + k)));
#endif
      }
    }
    std::memcpy(dst + i, src + i, bytes - i);
    return;
  }
#endif
  std::memcpy(dst, src, bytes);
}

template <typename T, bool ADAPTIVE>
void chunk_perturb(T* __restrict w, const T* __restrict g, T* __restrict backup, double scale, int64_t n, bool stream) {
  using A = typename Arithmetic<T>::type;
  alignas(64) A g_buffer[kTile], w_buffer[kTile];
  const A s = static_cast<A>(scale);
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t m = n - i < kTile ? n - i : kTile;
    copy(backup + i, w + i, m * sizeof(T), stream);
    if constexpr (std::is_same_v<T, A>) {
      for (int64_t k = i; k < i + m; ++k) w[k] = climb<ADAPTIVE>(w[k], g[k], s);
    } else {
      widen(w + i, w_buffer, m);
      widen(g + i, g_buffer, m);
      for (int64_t k = 0; k < m; ++k) w_buffer[k] = climb<ADAPTIVE>(w_buffer[k], g_buffer[k], s);
      narrow(w_buffer, w + i, m);
    }
  }
}

template <typename T>
double any_square_sum(const void* w, const void* g, int64_t n, bool adaptive) {
  const T *weights = static_cast<const T*>(w), *grads = static_cast<const T*>(g);
  return adaptive ? chunk_square_sum<T, true>(weights, grads, n) : chunk_square_sum<T, false>(weights, grads, n);
}

template <typename T>
void any_perturb(void* w, const void* g, void* backup, double scale, int64_t n, bool adaptive, bool stream) {
  T *weights = static_cast<T*>(w), *saved = static_cast<T*>(backup);
  const T* grads = static_cast<const T*>(g);
  if (adaptive)
    chunk_perturb<T, true>(weights, grads, saved, scale, n, stream);
  else
    chunk_perturb<T, false>(weights, grads, saved, scale, n, stream);
}

template <typename T>
Kernels kernels() {
  return {sizeof(T), any_square_sum<T>, any_perturb<T>, copy};
}

inline Kernels kernels_of(DType dtype) {
  switch (dtype) {
    case DType::Double:
      return kernels<double>();
    case DType::BFloat16:
      return kernels<BFloat16>();
    case DType::Half:
      return kernels<Half>();
    default:
      return kernels<float>();
  }
}

}  // namespace FASTSAM_ISA
}  // namespace
}  // namespace fastsam::cpu
