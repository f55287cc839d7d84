// The inner loops of the CPU operators, one table of them for each dtype and instruction set.
//
// Tensors have no gaps and one layout. "Planes" kernels take some channels of NCHW that follow each other, at most kChannelsTogether,
// and of each the same range of its N·S values, which are planes of S values, C·S apart. "Rows" kernels take a range of channels_last rows, pixels of C values. Sums are double, added in an order that
// depends on the shape alone, so that neither the number of threads nor the instruction set's width changes a bit.
#pragma once

#include <cstdint>

#include "cpu/numbers.h"

// A tensor as rows or planes.
struct Shape {
  int64_t batch;      // N
  int64_t channels;   // C
  int64_t positions;  // S = H·W
  bool rows;          // channels innermost

  int64_t count() const { return batch * positions; }
  int64_t numel() const { return batch * positions * channels; }
  // The mask packs each row (C values) or plane (S values) into whole bytes.
  int64_t inner() const { return rows ? channels : positions; }
  int64_t outer() const { return rows ? batch * positions : batch * channels; }
  int64_t mask_bytes() const { return (inner() + 7) / 8; }
};

// What is done to a channel, C values each and readable for a pack beyond them: (x - mean) scale + bias.
template <typename C>
struct Affine {
  const C* mean;
  const C* scale;
  const C* bias;
};

// output = relu(affine(input) + residual). Where `affine2.mean` is set, residual is the input of a second branch, whose bias is part
// of the first one's: relu(affine(input) + (residual - mean2) scale2).
template <typename T>
struct ForwardArguments {
  Shape shape;
  const T* input;
  const T* residual;
  T* output;
  uint8_t* mask;
  Affine<Compute<T>> affine;
  Affine<Compute<T>> affine2;
  bool relu;
  bool stream;  // the output is too large for the caches and on line boundaries
};

// Where the sum of grad (input - mean) is taken from the mean at once. For float values double has room for the sum of grad input,
// and mean times the sum of grad comes off it at the end; double itself has none to spare.
template <typename T>
constexpr bool kOriginIsMean = std::is_same_v<T, double>;

enum class KeepFrom { kAll, kMask, kInput };

// The gradient behind the ReLU is grad_output where `keep` says so. Where there is a grad_output2, grad_output is the sum of both, each
// element rounded as a tensor of its own would round it. Per channel
//   grad_input = (grad - mean_grad - (input - mean) slope) scale, or grad scale where the statistics are constants,
// and the same for input2 where there is one.
template <typename T>
struct BackwardArguments {
  using C = Compute<T>;
  Shape shape;
  const T* grad_output;
  const T* grad_output2;
  const T* input;
  const T* input2;
  const uint8_t* mask;
  KeepFrom keep;
  Affine<C> affine;
  const C* mean2;
  const C* scale2;
  bool constant_statistics;
  const C* mean_grad;
  const C* slope;
  const C* slope2;
  T* grad_input;
  T* grad_input2;
  T* grad_residual;
  bool stream;
};

// The most channels of planes that a kernel takes at once.
constexpr int64_t kChannelsTogether = 32;

template <typename T>
struct Kernels {
  using C = Compute<T>;

  // Adds the sums of (x - shift) and of its square to sums[0] and sums[1], two for each channel. `planes` and `shift` are the first
  // channel's.
  void (*planes_statistics)(const T* planes, const Shape& shape, int64_t channels, int64_t begin, int64_t end,
                            const C* shift, double* sums);
  void (*rows_statistics)(const T* rows, const Shape& shape, int64_t count, const C* shift, double* sum,
                          double* square);

  void (*planes_forward)(const ForwardArguments<T>&, int64_t channel, int64_t channels, int64_t begin, int64_t end);
  void (*rows_forward)(const ForwardArguments<T>&, int64_t begin, int64_t end);

  // Adds the sums of grad, grad (input - origin) and grad (input2 - origin2), three for each channel of planes; see kOriginIsMean.
  void (*planes_reduce)(const BackwardArguments<T>&, int64_t channel, int64_t channels, int64_t begin, int64_t end,
                        double* sums);
  void (*rows_reduce)(const BackwardArguments<T>&, int64_t begin, int64_t end, double* grad, double* xmu, double* xmu2);

  void (*planes_backward)(const BackwardArguments<T>&, int64_t channel, int64_t channels, int64_t begin, int64_t end);
  void (*rows_backward)(const BackwardArguments<T>&, int64_t begin, int64_t end);

  // relu(x + residual) over elements without channels; begin is a multiple of 8.
  void (*add_relu)(const T* input, const T* residual, T* output, uint8_t* mask, int64_t begin, int64_t end);
  void (*add_relu_backward)(const T* grad_output, const uint8_t* mask, T* grad_input, int64_t begin, int64_t end);
};

// The kernels for this machine.
template <typename T>
const Kernels<T>& kernels();

// "avx512", "avx2" or "default"; RESNET_FUSED_CPU_CAPABILITY asks for a lower one.
const char* cpu_capability();
