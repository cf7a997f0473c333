// One parallel region for each pass over a bucket, and the choice of the instruction set.
#include "sam_cpu.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#define FASTSAM_X86
#endif

namespace fastsam::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The kernels of one dtype, for one instruction set.
struct Kernels {
  int64_t item_size;
  double (*square_sum)(const void* w, const void* g, int64_t n, bool adaptive, int64_t parts);
  void (*perturb)(void* w, const void* g, void* backup, double scale, int64_t n, bool adaptive, int64_t parts,
                  bool stream);
  void (*copy)(void* to, const void* from, int64_t bytes, int64_t parts, bool stream);
};

}  // namespace
}  // namespace fastsam::cpu

#define FASTSAM_ISA baseline
#define FASTSAM_VECTOR_BYTES 16
#include "sam_kernels.h"
#undef FASTSAM_ISA
#undef FASTSAM_VECTOR_BYTES

#ifdef FASTSAM_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define FASTSAM_ISA avx2
#define FASTSAM_VECTOR_BYTES 32
#include "sam_kernels.h"
#undef FASTSAM_ISA
#undef FASTSAM_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,f16c")
#endif
#define FASTSAM_ISA avx512
#define FASTSAM_VECTOR_BYTES 64
#include "sam_kernels.h"
#undef FASTSAM_ISA
#undef FASTSAM_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // FASTSAM_X86

namespace fastsam::cpu {
namespace {

enum class Isa { Baseline, Avx2, Avx512 };

Isa best_isa() {
#ifdef FASTSAM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const char* variable = std::getenv("FASTSAM_CPU_ISA");  // to choose a lesser one
  const std::string_view wanted = variable == nullptr ? "" : variable;
  if (wanted == "baseline") return Isa::Baseline;
  if (avx512 && wanted != "avx2") return Isa::Avx512;
  if (avx2) return Isa::Avx2;
#endif
  return Isa::Baseline;
}

Isa isa() {
  static const Isa chosen = best_isa();
  return chosen;
}

Kernels kernels_of(DType dtype) {
#ifdef FASTSAM_X86
  if (isa() == Isa::Avx512) return avx512::kernels_of(dtype);
  if (isa() == Isa::Avx2) return avx2::kernels_of(dtype);
#endif
  return baseline::kernels_of(dtype);
}

// What was measured to be fastest on a processor; it changes no bit.
struct Tuning {
  // Parts of a chunk that each pass walks side by side: a core that walks one stream of addresses may have too few cache
  // lines under way.
  int64_t norm, perturb, restore;
  // Bytes of a bucket above which backup and restored parameters are written past the caches. Below, who reads them next
  // finds them there: restore the backup, the base optimizer's step the parameters.
  int64_t stream_bytes;
};

Tuning best_tuning() {
#ifdef FASTSAM_X86
  __builtin_cpu_init();
  const bool intel = __builtin_cpu_is("intel");
#else
  const bool intel = false;
#endif
  // Intel Xeon, 2 threads, 33.5M elements, a program of its own, one stream against so many: norm 1.4, perturb 1.1 (16
  // parts were slower), restore 1.3 times as fast; these kernels have not been measured there. Streaming stores: restore
  // and the base's step took 1.4 ms with them and 0.6 without at 4 MB, and were even at 32 MB.
  // AMD EPYC (Zen 4), 1 and 2 threads, 1e6 to 1e8 elements: with 2, 4, 8 parts norm was 0.8 to 1.0 times as fast as with
  // one, perturb 0.8 to 1.0, restore 0.9 to 1.1. Streaming stores, the three passes and the base's step: 0.9 to 1.0
  // times as fast at 4 MB, 1.02 to 1.08 at 8 MB, 1.05 to 1.19 from 15 to 38 MB.
  Tuning tuning = intel ? Tuning{8, 4, 8, 24 << 20} : Tuning{1, 1, 1, 6 << 20};
  const char* variable = std::getenv("FASTSAM_CPU_PARTS");  // to try another number
  const int64_t wanted = variable == nullptr ? 0 : std::atoi(variable);
  if (wanted > 0) tuning.norm = tuning.perturb = tuning.restore = wanted;
  return tuning;
}

const Tuning& tuning() {
  static const Tuning chosen = best_tuning();
  return chosen;
}

// Below this a thread is woken for less work than waking it costs.
constexpr int64_t kGrain = 32768;

// Calls f on every chunk that has a gradient, in one parallel region; threads share elements, not chunks, evenly.
template <typename F>
void for_each_chunk(const Bucket& bucket, const F& f) {
  if (bucket.n_chunks == 0) return;
  const Chunk *begin = bucket.chunks, *end = begin + bucket.n_chunks;
  const auto from = [&](int64_t element) {
    return std::lower_bound(begin, end, element, [](const Chunk& c, int64_t e) { return c.backup < e; });
  };
  torch::stable::parallel_for(0, backup_size(bucket), kGrain, [&](int64_t low, int64_t high) {
    for (const Chunk *c = from(low), *stop = from(high); c != stop; ++c) f(*c, c - begin);
#ifdef FASTSAM_X86
    _mm_sfence();  // streaming stores are ordered by nothing else
#endif
  });
}

bool streams(const Bucket& bucket, int64_t item_size) { return backup_size(bucket) * item_size > tuning().stream_bytes; }

template <typename T = void>
T* at(int64_t address, int64_t offset, int64_t item_size) {
  return reinterpret_cast<T*>(address + offset * item_size);
}

}  // namespace

int64_t backup_size(const Bucket& bucket) {
  if (bucket.n_chunks == 0) return 0;
  const Chunk& last = bucket.chunks[bucket.n_chunks - 1];
  return last.backup + last.length();
}

double square_sum(const Bucket& bucket, const int32_t* adaptive, double* partials) {
  const Kernels k = kernels_of(bucket.dtype);
  for_each_chunk(bucket, [&](const Chunk& c, int64_t i) {
    const int64_t g = bucket.grads[c.slot];
    partials[i] = g == 0 ? 0
                         : k.square_sum(at(bucket.weights[c.slot], c.offset, k.item_size), at(g, c.offset, k.item_size),
                                        c.length(), adaptive[c.group()] != 0, tuning().norm);
  });
  double sum = 0;
  for (int64_t i = 0; i < bucket.n_chunks; ++i) sum += partials[i];
  return sum;
}

void perturb(const Bucket& bucket, const int32_t* adaptive, const double* scale, void* backup) {
  const Kernels k = kernels_of(bucket.dtype);
  const bool stream = streams(bucket, k.item_size);
  for_each_chunk(bucket, [&](const Chunk& c, int64_t) {
    const int64_t g = bucket.grads[c.slot];
    if (g == 0) return;
    k.perturb(at(bucket.weights[c.slot], c.offset, k.item_size), at(g, c.offset, k.item_size),
              static_cast<char*>(backup) + c.backup * k.item_size, scale[c.group()], c.length(),
              adaptive[c.group()] != 0, tuning().perturb, stream);
  });
}

void restore(const Bucket& bucket, const void* backup) {
  const Kernels k = kernels_of(bucket.dtype);
  const bool stream = streams(bucket, k.item_size);
  for_each_chunk(bucket, [&](const Chunk& c, int64_t) {
    if (bucket.grads[c.slot] == 0) return;
    k.copy(at(bucket.weights[c.slot], c.offset, k.item_size),
           static_cast<const char*>(backup) + c.backup * k.item_size, c.length() * k.item_size, tuning().restore,
           stream);
  });
}

const char* instruction_set() {
  switch (isa()) {
    case Isa::Avx512:
      return "avx512";
    case Isa::Avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fastsam::cpu
