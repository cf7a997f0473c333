// The CPU passes over one bucket. All pointers are to host memory.
#pragma once

#include <cstdint>

#include "../sam_math.h"

namespace fastsam::cpu {

enum class DType : int64_t { Float, Double, BFloat16, Half };

struct Bucket {
  const Chunk* chunks;
  int64_t n_chunks;
  const int64_t* weights;    // address of each slot's parameter
  const int64_t* grads;      // address of each slot's gradient; 0: none, and the slot is left alone
  DType dtype;
};

// The size of the backup, in elements.
int64_t backup_size(const Bucket& bucket);

// Writes the sum of squares of each chunk, and returns their sum. Both in fp64, in an order that depends on nothing but
// the chunks.
double square_sum(const Bucket& bucket, const int32_t* adaptive, double* partials);

// Saves w, then w <- w + e_w; `scale`: of each group, float or double as the arithmetic of `dtype` has it.
void perturb(const Bucket& bucket, const int32_t* adaptive, const double* scale, void* backup);

// w <- saved w.
void restore(const Bucket& bucket, const void* backup);

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace fastsam::cpu
