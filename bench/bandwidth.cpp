// Walks over two arrays of 64-bit words, without arithmetic to speak of: what a core moves when it reads, copies,
// changes in place, or reads two arrays and writes two as perturb does, from so many places side by side. Each walk
// moves as much as a copy: the bytes of both arrays.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kStrip = 32, kBlock = 2048;  // words: walked at a time; of a block, which is cut into the streams
constexpr int64_t kGrain = 8;  // blocks, below which a thread is woken for less work than waking it costs

void read(const uint64_t* from, uint64_t& sum) {
  for (int64_t k = 0; k < kStrip; ++k) sum ^= from[k];
}

void write(uint64_t* to, const uint64_t* from, bool past_caches) {
#ifdef __SSE2__
  if (past_caches) {
    for (int64_t k = 0; k < kStrip; k += 2)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
    return;
  }
#endif
  std::memcpy(to, from, kStrip * sizeof(uint64_t));
}

void change(uint64_t* x) {
  for (int64_t k = 0; k < kStrip; ++k) x[k] = ~x[k];
}

void mix(uint64_t* x, const uint64_t* y) {
  for (int64_t k = 0; k < kStrip; ++k) x[k] ^= y[k];
}

// Whole blocks only. Returns what the reading walk found.
int64_t walk(torch::stable::Tensor first, torch::stable::Tensor second, int64_t kind, int64_t streams,
             bool past_caches) {
  auto* x = static_cast<uint64_t*>(first.mutable_data_ptr());
  auto* y = static_cast<uint64_t*>(second.mutable_data_ptr());
  const int64_t halves = kind == 3 ? 2 : 1, length = first.numel() / halves / kBlock;
  std::atomic<uint64_t> found = 0;
  torch::stable::parallel_for(0, length, kGrain, [&](int64_t low, int64_t high) {
    uint64_t sum = 0;
    const int64_t part = kBlock / streams;
    for (int64_t begin = low * kBlock; begin < high * kBlock; begin += kBlock) {
      for (int64_t row = begin; row < begin + part; row += kStrip) {
        for (int64_t i = row; i < begin + kBlock; i += part) {
          switch (kind) {
            case 0:
              read(x + i, sum);
              read(y + i, sum);
              break;
            case 1:
              write(y + i, x + i, past_caches);
              break;
            case 2:
              change(y + i);
              break;
            default:
              write(y + length * kBlock + i, x + i, past_caches);
              mix(x + i, y + i);
          }
        }
      }
    }
    found ^= sum;
#ifdef __SSE2__
    _mm_sfence();
#endif
  });
  return static_cast<int64_t>(found.load());
}

}  // namespace

STABLE_TORCH_LIBRARY(fastsam_bench, m) {
  m.def("walk(Tensor(a!) first, Tensor(b!) second, int kind, int streams, bool past_caches) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastsam_bench, CPU, m) { m.impl("walk", TORCH_BOX(&walk)); }
