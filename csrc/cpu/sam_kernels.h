// The kernels of one chunk. No include guard: sam_cpu.cpp includes this file once for each instruction set, with
//   FASTSAM_ISA           the namespace
//   FASTSAM_VECTOR_BYTES  the width of its vectors
// and the compiler's target set. What is included from here must have been included before.

namespace fastsam::cpu {
namespace {
namespace FASTSAM_ISA {

constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kStrip = 256;  // bytes that are walked at a time
// Elements whose squares are summed in fp32, in lanes of their own: at most 32 additions a lane keep the sum within
// 32 * 2^-24 of the fp64 one, for any input. And bytes of these lanes, whatever the vectors' width, so that every
// instruction set gives the same bits.
constexpr int64_t kRun = 1024, kLanes = 128, kTile = 16 * kRun;

// Calls f(first, count) on strips that cover [0, n): the `head`, which ends where memory is aligned; then strips of
// LENGTH, a constant, from `parts` equal parts side by side, each a multiple of UNIT; then from whole units; then what
// is left.
template <int64_t LENGTH, int64_t UNIT = LENGTH, typename F>
inline __attribute__((always_inline)) void walk(int64_t parts, int64_t head, int64_t n, const F& f) {
  if (head > 0) f(0, head);
  int64_t begin = head;
  if (parts > 1 && n - begin >= parts * UNIT) {  // most tensors are small: a division costs as much as a pass over one
    const int64_t part = (n - begin) / (parts * UNIT) * UNIT, end = begin + parts * part;
    for (int64_t row = begin; row < begin + part; row += LENGTH)
      for (int64_t i = row; i < end; i += part) f(i, std::integral_constant<int64_t, LENGTH>());
    begin = end;
  }
  for (const int64_t end = n - (n - begin) % UNIT; begin < end; begin += LENGTH)
    f(begin, std::integral_constant<int64_t, LENGTH>());
  if (begin < n) f(begin, n - begin);
}

// Bytes from p to the next cache line, at most n.
inline int64_t misaligned(const void* p, int64_t n) {
  const int64_t bytes = -reinterpret_cast<uintptr_t>(p) & (kLine - 1);
  return bytes < n ? bytes : n;
}

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
  int64_t whole = 0;
#if FASTSAM_VECTOR_BYTES == 64
  whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16)
    _mm512_storeu_ps(y + i, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
#elif FASTSAM_VECTOR_BYTES == 32
  whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (int64_t i = whole; i < n; ++i) y[i] = c10::detail::fp16_ieee_to_fp32_value(x[i].bits);
}

inline void narrow(const float* __restrict x, Half* __restrict y, int64_t n) {
  int64_t whole = 0;
#if FASTSAM_VECTOR_BYTES == 64
  whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i),
                        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#elif FASTSAM_VECTOR_BYTES == 32
  whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (int64_t i = whole; i < n; ++i) y[i].bits = c10::detail::fp16_ieee_from_fp32_value(x[i]);
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

// What the norm is taken of: g itself or, where it has to be computed, x; y: room besides.
template <bool ADAPTIVE, typename T, typename A>
inline __attribute__((always_inline)) const A* norm_terms(const T* w, const T* g, A* __restrict x, A* __restrict y,
                                                          int64_t n) {
  const A* gradient = widened(g, x, n);
  if constexpr (ADAPTIVE) {
    const A* weight = widened(w, y, n);
    for (int64_t k = 0; k < n; ++k) x[k] = norm_term<true>(weight[k], gradient[k]);
    return x;
  }
  return gradient;
}

// Adds the squares of x, n of a run, to its lanes; sets them with `first`.
template <typename A>
inline __attribute__((always_inline)) void add_squares(A* sums, const A* x, int64_t n, bool first) {
  constexpr int64_t lanes = kLanes / sizeof(A), width = FASTSAM_VECTOR_BYTES / sizeof(A), vectors = lanes / width;
  typedef A Vector __attribute__((vector_size(FASTSAM_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
  Vector sum[vectors] = {};
  if (!first) std::memcpy(sum, sums, kLanes);
  const int64_t whole = n / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    for (int k = 0; k < vectors; ++k) {
      const Vector v = *reinterpret_cast<const Vector*>(x + i + k * width);
      sum[k] += v * v;
    }
  }
  std::memcpy(sums, sum, kLanes);
  for (int64_t k = whole; k < n; ++k) sums[k - whole] += x[k] * x[k];
}

// The sum of the lanes of `runs` runs: in fp64, over the runs first and then by halves.
template <typename A>
inline double total(const A (*sums)[kLanes / sizeof(A)], int64_t runs) {
  constexpr int lanes = kLanes / sizeof(A);
  double sum[lanes];
  for (int k = 0; k < lanes; ++k) sum[k] = sums[0][k];
  for (int64_t run = 1; run < runs; ++run)
    for (int k = 0; k < lanes; ++k) sum[k] += sums[run][k];
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
  return sum[0];
}

// The sum of squares of at most kTile elements, each run's in type S, in an order that no number of parts changes.
template <typename S, bool ADAPTIVE, typename T>
double sum_of_runs(const T* w, const T* g, int64_t n, int64_t parts) {
  using A = typename Arithmetic<T>::type;
  const int64_t runs = (n + kRun - 1) / kRun;
  alignas(kLine) S sums[kTile / kRun][kLanes / sizeof(S)];
  walk<kStrip / sizeof(T), kRun>(parts, 0, n, [&](int64_t first, auto count) __attribute__((always_inline)) {
    alignas(kLine) A x[kRun], y[kRun];
    const A* terms = norm_terms<ADAPTIVE>(w + first, g + first, x, y, count);
    S* lanes = sums[first / kRun];
    const bool fresh = first % kRun == 0;
    if constexpr (std::is_same_v<S, A>) {
      add_squares(lanes, terms, count, fresh);
    } else {
      S wide[kRun];
      for (int64_t k = 0; k < count; ++k) wide[k] = terms[k];
      add_squares(lanes, wide, count, fresh);
    }
  });
  return total(sums, runs);
}

template <typename T, bool ADAPTIVE>
double tile_square_sum(const T* w, const T* g, int64_t n, int64_t parts) {
  const double sum = sum_of_runs<typename Arithmetic<T>::type, ADAPTIVE>(w, g, n, parts);
  if (sum >= 0x1p-100 && sum <= 0x1p127) return sum;
  // Squares out of fp32's range (an element above 1e19, or none above 1e-15) are summed once more, in fp64.
  return sum_of_runs<double, ADAPTIVE>(w, g, n, parts);
}

template <typename T, bool ADAPTIVE>
double chunk_square_sum(const T* w, const T* g, int64_t n, int64_t parts) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kTile)
    sum += tile_square_sum<T, ADAPTIVE>(w + i, g + i, n - i < kTile ? n - i : kTile, parts);
  return sum;
}

// Copies; with `stream` whole strips, which are aligned, go past the caches, where the destination will not be read
// soon: a plain store would first read the line that it overwrites.
inline __attribute__((always_inline)) void copy_strip(void* to, const void* from, int64_t bytes, bool stream) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
#ifdef FASTSAM_X86
  if (stream && bytes == kStrip) {
    for (int64_t k = 0; k < kStrip; k += FASTSAM_VECTOR_BYTES) {
#if FASTSAM_VECTOR_BYTES == 64
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + k), _mm512_loadu_si512(src + k));
#elif FASTSAM_VECTOR_BYTES == 32
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + k),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + k)));
#else
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + k)));
#endif
    }
    return;
  }
#endif
  std::memcpy(dst, src, bytes);
}

inline void copy(void* to, const void* from, int64_t bytes, int64_t parts, bool stream) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  if (!stream) {
    std::memcpy(dst, src, bytes);
    return;
  }
  walk<kStrip>(parts, misaligned(dst, bytes), bytes, [=](int64_t first, auto count) __attribute__((always_inline)) {
    copy_strip(dst + first, src + first, count, true);
  });
}

template <bool ADAPTIVE, typename T, typename A>
inline __attribute__((always_inline)) void climb_strip(T* __restrict w, const T* __restrict g, A scale, int64_t n) {
  if constexpr (std::is_same_v<T, A>) {
    for (int64_t k = 0; k < n; ++k) w[k] = climb<ADAPTIVE>(w[k], g[k], scale);
  } else {
    alignas(kLine) A x[kStrip / sizeof(T)], y[kStrip / sizeof(T)];
    widen(w, x, n);
    widen(g, y, n);
    for (int64_t k = 0; k < n; ++k) x[k] = climb<ADAPTIVE>(x[k], y[k], scale);
    narrow(x, w, n);
  }
}

template <typename T, bool ADAPTIVE>
void chunk_perturb(T* w, const T* g, T* backup, double scale, int64_t n, int64_t parts, bool stream) {
  constexpr int64_t item = sizeof(T);
  const auto s = static_cast<typename Arithmetic<T>::type>(scale);
  const int64_t head = misaligned(backup, n * item) / item;
  walk<kStrip / item>(parts, head, n, [=](int64_t first, auto count) __attribute__((always_inline)) {
    copy_strip(backup + first, w + first, count * item, stream);
    climb_strip<ADAPTIVE>(w + first, g + first, s, count);
  });
}

template <typename T>
double any_square_sum(const void* w, const void* g, int64_t n, bool adaptive, int64_t parts) {
  const T *weights = static_cast<const T*>(w), *grads = static_cast<const T*>(g);
  const auto f = adaptive ? chunk_square_sum<T, true> : chunk_square_sum<T, false>;
  return f(weights, grads, n, parts);
}

template <typename T>
void any_perturb(void* w, const void* g, void* backup, double scale, int64_t n, bool adaptive, int64_t parts,
                 bool stream) {
  T *weights = static_cast<T*>(w), *saved = static_cast<T*>(backup);
  const auto f = adaptive ? chunk_perturb<T, true> : chunk_perturb<T, false>;
  f(weights, static_cast<const T*>(g), saved, scale, n, parts, stream);
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
