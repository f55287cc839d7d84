// The maths of batch normalization that host and device share. C is the type of the arithmetic: double for float64
// tensors, float for every other.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define RESNET_FUSED_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RESNET_FUSED_HOST_DEVICE inline
#endif

namespace resnet_fused {

template <typename C>
RESNET_FUSED_HOST_DEVICE C smaller(C a, C b) {
  return b < a ? b : a;
}

template <typename C>
RESNET_FUSED_HOST_DEVICE C larger(C a, C b) {
  return a < b ? b : a;
}

// A value amid five of a channel: their median, which no single outlier is. Sums are taken about it. An infinite shift
// would make a NaN of an infinite mean, so that zero takes its place.
template <typename C>
RESNET_FUSED_HOST_DEVICE C shift_amid(const C (&v)[5]) {
  const C low = larger(smaller(v[0], v[1]), smaller(v[2], v[3]));
  const C high = smaller(larger(v[0], v[1]), larger(v[2], v[3]));
  const C median = larger(smaller(low, high), smaller(larger(low, high), v[4]));
  return median - median == C(0) ? median : C(0);
}

template <typename C>
struct Statistics {
  C mean, var, invstd;
};

// From the sums of x - shift and of its square. What the subtraction loses grows with the square of (mean - shift) over
// the deviation; that is (1 - p) / p where a share p of the values lies about the shift. The statistics of no values
// are zeros, so that the gradients of weight and bias over an empty batch are zero and not NaN.
template <typename C>
RESNET_FUSED_HOST_DEVICE Statistics<C> statistics_of(C shift, double sum, double square, int64_t count, double eps) {
  if (count == 0) return {C(0), C(0), static_cast<C>(1 / sqrt(eps))};
  const double offset = sum / static_cast<double>(count);
  const double variance = square / static_cast<double>(count) - offset * offset;
  const double positive = variance < 0 ? 0 : variance;  // NaN stays
  return {static_cast<C>(static_cast<double>(shift) + offset), static_cast<C>(positive),
          static_cast<C>(1 / sqrt(positive + eps))};
}

// What is done to a channel: (x - mean) scale + bias.
template <typename C>
struct Affine {
  C mean, scale, bias;
};

// weight / sqrt(var + eps) with one rounding: double has room for the root and the quotient.
template <typename C>
RESNET_FUSED_HOST_DEVICE C scale_of_var(C weight, C var, double eps) {
  return static_cast<C>(static_cast<double>(weight) / sqrt(static_cast<double>(var) + eps));
}

#if defined(__CUDA_ARCH__)
// The same without double arithmetic, of which many GPUs have little while planes ask with every access: an
// approximate root and, by a step of Newton's, what it is off. Together they are exact to about 2^-44.
__device__ __forceinline__ float scale_of_var(float weight, float var, double eps) {
  const float high_eps = static_cast<float>(eps), low_eps = static_cast<float>(eps - static_cast<double>(high_eps));
  // Knuth's two-sum: what the addition rounds off.
  const float sum = var + high_eps, part = sum - var;
  const float rest = (var - (sum - part)) + (high_eps - part) + low_eps;
  const float root = rsqrtf(sum);
  const float product = sum * root, rest_of_product = fmaf(sum, root, -product);
  const float error = fmaf(-product, root, 1.0f) - rest_of_product * root - rest * root * root;
  const float scale = fmaf(weight, root, weight * (0.5f * root * error));
  return scale - scale == 0.0f ? scale : weight * root;
}
#endif

// One operation after the other, as forward and backward must round them alike.
template <typename C>
RESNET_FUSED_HOST_DEVICE C normalized(C x, C mean, C scale, C bias) {
  return fma(x - mean, scale, bias);
}

// Whether the gradient passes the ReLU: torch's rule is "result <= 0 ? 0 : grad", which NaN passes too.
template <typename C>
RESNET_FUSED_HOST_DEVICE bool positive_or_nan(C v) {
  return !(v <= C(0));
}

// From the means over a channel of the gradient and of it times (x - mean):
//   grad_input = (grad - mean_grad - (x - mean) slope) scale
template <typename C>
RESNET_FUSED_HOST_DEVICE C slope_of(double mean_grad_xmu, C invstd) {
  return static_cast<C>(mean_grad_xmu * static_cast<double>(invstd) * static_cast<double>(invstd));
}

// running = (1 - momentum) running + momentum batch, rounded once by who stores it.
RESNET_FUSED_HOST_DEVICE double updated_running(double running, double batch, double momentum) {
  return (1 - momentum) * running + momentum * batch;
}

// The biased variance of count values made unbiased.
RESNET_FUSED_HOST_DEVICE double unbiased(int64_t count) {
  return static_cast<double>(count) / static_cast<double>(count - 1);
}

}  // namespace resnet_fused
