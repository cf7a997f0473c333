// As much of CUDA as csrc/cuda/sam_kernels.cuh asks for, on the CPU: one block at a time, whose threads are coroutines
// that take turns at each barrier. For the tests: it checks what a kernel computes, and nothing of how fast or how
// concurrent.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  uint32_t x;
};
inline Index threadIdx, blockIdx, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }

// Every 128-bit access goes to a multiple of 16, as the GPU demands.
inline const uint4* aligned(const uint4* p) {
  if ((reinterpret_cast<uintptr_t>(p) & 15) != 0) __builtin_trap();
  return p;
}
inline uint4 __ldcs(const uint4* p) { return *aligned(p); }
inline void __stcs(uint4* p, uint4 value) { *const_cast<uint4*>(aligned(p)) = value; }
inline double __ldcg(const double* p) { return *p; }

namespace emulator {

struct Block {
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<bool> done;
  std::vector<double> exchanged;
  std::function<void()> kernel;
};
inline Block block;
constexpr size_t kStack = 64 << 10;

inline void yield() {
  const uint32_t thread = threadIdx.x;
  swapcontext(&block.threads[thread], &block.scheduler);
  threadIdx.x = thread;
}

inline void run_thread() {
  const uint32_t thread = threadIdx.x;
  block.kernel();
  block.done[thread] = true;
}

inline void launch(uint32_t blocks, uint32_t threads, const std::function<void()>& kernel) {
  gridDim.x = blocks;
  block.kernel = kernel;
  block.threads.resize(threads);
  block.exchanged.resize(threads);
  while (block.stacks.size() < threads) block.stacks.push_back(std::make_unique<char[]>(kStack));
  // In any order: here the last block is not the one with the last index.
  for (uint32_t i = 0; i < blocks; ++i) {
    blockIdx.x = (i * 7 + 3) % blocks;
    if (blocks % 7 == 0) blockIdx.x = i;
    block.done.assign(threads, false);
    for (uint32_t t = 0; t < threads; ++t) {
      ucontext_t& context = block.threads[t];
      getcontext(&context);
      context.uc_stack = {block.stacks[t].get(), 0, kStack};
      context.uc_link = &block.scheduler;
      makecontext(&context, run_thread, 0);
    }
    for (bool running = true; running;) {
      running = false;
      for (uint32_t t = 0; t < threads; ++t) {
        if (block.done[t]) continue;
        threadIdx.x = t;
        swapcontext(&block.scheduler, &block.threads[t]);
        running = running || !block.done[t];
      }
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::yield(); }

inline double __shfl_down_sync(uint32_t, double x, int delta) {
  const uint32_t thread = threadIdx.x;
  emulator::block.exchanged[thread] = x;
  emulator::yield();
  const double other = thread % 32 + delta < 32 ? emulator::block.exchanged[thread + delta] : x;
  emulator::yield();
  return other;
}

// Counts, and wraps to 0 after `last`.
inline uint32_t atomic_inc(uint32_t* counter, uint32_t last) {
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
