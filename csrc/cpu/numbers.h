// The dtypes of tensors and the types that the CPU computes with.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Arithmetic and statistics: double for double, float for every other dtype.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr int kPackLanes = 64 / sizeof(Compute<T>);
