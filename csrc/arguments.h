// Reading the ops' tensor arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace fastsam {

// The data of a contiguous tensor of at least `numel` elements.
template <typename T>
T* data(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "fastsam: ", name, " is of another dtype than expected");
  STD_TORCH_CHECK(tensor.is_contiguous(), "fastsam: ", name, " is not contiguous");
  STD_TORCH_CHECK(tensor.numel() >= numel, "fastsam: ", name, " has ", tensor.numel(), " elements, but ", numel,
                  " are needed");
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace fastsam
