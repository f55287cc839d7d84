// A normalized input of an operator: its values, its statistics, and what the kernels need of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/running_stats.h"
#include "cpu/tensors.h"

namespace resnet_fused::cpu {

template <typename T>
Compute<T> number(T value) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<float>(value);
  } else {
    return value;
  }
}

template <typename T>
struct Branch {
  using C = Compute<T>;

  // Of input in that format.
  Branch(const Tensor& input, MemoryFormat format, const MaybeTensor& weight, const MaybeTensor& bias, double eps)
      : tensor(dense(input, format)),
        format(format),
        data(tensor.template const_data_ptr<T>()),
        shape(shape_of(input, format)),
        eps(eps),
        mean(vector_of<C>(shape.channels)),
        var(vector_of<C>(shape.channels)),
        invstd(vector_of<C>(shape.channels)),
        scale(values<C>(weight, shape.channels, C(1))),  // times invstd, once that is known
        bias(values<C>(bias, shape.channels, C(0))) {}

  // Statistics that are given: of mean and invstd, or of mean and var.
  void take_invstd(const Tensor& mean_tensor, const Tensor& invstd_tensor) {
    mean = values<C>(mean_tensor, shape.channels, C(0));
    invstd = values<C>(invstd_tensor, shape.channels, C(0));
    for (int64_t c = 0; c < shape.channels; ++c) scale[c] *= invstd[c];
  }
  void take_var(const Tensor& mean_tensor, const Tensor& var_tensor) {
    mean = values<C>(mean_tensor, shape.channels, C(0));
    var = values<C>(var_tensor, shape.channels, C(0));
    for (int64_t c = 0; c < shape.channels; ++c) {
      const double exact = 1 / std::sqrt(static_cast<double>(var[c]) + eps);
      invstd[c] = static_cast<C>(exact);
      scale[c] = static_cast<C>(static_cast<double>(scale[c]) * exact);
    }
  }

  // The bias of a sum of two branches, with one rounding.
  void add_bias_of(const Branch& other) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      bias[c] = static_cast<C>(static_cast<double>(bias[c]) + static_cast<double>(other.bias[c]));
    }
  }

  // From the sums of x - shift and of its square. What the subtraction loses grows with the square of (mean - shift) over the
  // deviation; that is (1 - p) / p where a share p of the values lies about the shift.
  void finish(int64_t c, C shift, double sum, double square) {
    const double count = static_cast<double>(shape.count());
    const double offset = sum / count;
    const double variance = square / count - offset * offset;
    mean[c] = static_cast<C>(static_cast<double>(shift) + offset);
    const double positive = variance < 0 ? 0 : variance;  // NaN stays
    var[c] = static_cast<C>(positive);
    invstd[c] = static_cast<C>(1 / std::sqrt(positive + eps));
    scale[c] *= invstd[c];
  }

  // A value amid those of the channel: the median of five, which no single outlier is.
  C shift_of(int64_t c) const {
    const int64_t step = shape.rows ? shape.channels : 1;
    const int64_t last = (shape.rows ? shape.count() : shape.positions) - 1;
    const T* from = data + (shape.rows ? c : c * shape.positions);
    C v[5];
    for (int i = 0; i < 5; ++i) v[i] = number(from[last * i / 4 * step]);
    const C low = std::max(std::min(v[0], v[1]), std::min(v[2], v[3]));
    const C high = std::min(std::max(v[0], v[1]), std::max(v[2], v[3]));
    const C median = std::max(std::min(low, high), std::min(std::max(low, high), v[4]));
    return std::isfinite(median) ? median : C(0);  // an infinite shift would make a NaN of an infinite mean
  }

  void update(const MaybeTensor& running_mean, const MaybeTensor& running_var, double momentum) const {
    update_running(running_mean, running_var, mean, var, shape.channels, momentum, shape.count());
  }

  Affine<C> affine() const { return {mean.data(), scale.data(), bias.data()}; }

  Tensor mean_tensor() const { return statistic(mean); }
  Tensor var_tensor() const { return statistic(var); }
  Tensor invstd_tensor() const { return statistic(invstd); }

  Tensor tensor;
  MemoryFormat format;
  const T* data;
  Shape shape;
  double eps;
  Vector<C> mean, var, invstd, scale, bias;

 private:
  Tensor statistic(const Vector<C>& from) const {
    Tensor r = empty({shape.channels}, statistics_dtype(tensor.scalar_type()));
    std::copy_n(from.data(), shape.channels, r.mutable_data_ptr<C>());
    return r;
  }
};

// Float sums are exact enough in double at one go. Double needs a second one, about the mean of the first.
template <typename T>
constexpr int kStatisticsPasses = std::is_same_v<T, double> ? 2 : 1;

// The statistics of some channels of planes, each in one piece.
template <typename T>
void planes_statistics(Branch<T>& branch, int64_t channel, int64_t channels) {
  using C = Compute<T>;
  const Shape& shape = branch.shape;
  C shift[kChannelsTogether];
  for (int64_t c = 0; c < channels; ++c) shift[c] = branch.shift_of(channel + c);
  for (int pass = 1; pass <= kStatisticsPasses<T>; ++pass) {
    double sums[2 * kChannelsTogether] = {};
    kernels<T>().planes_statistics(branch.data + channel * shape.positions, shape, channels, 0, shape.count(), shift,
                                   sums);
    for (int64_t c = 0; c < channels; ++c) {
      if (pass == kStatisticsPasses<T>) {
        branch.finish(channel + c, shift[c], sums[2 * c], sums[2 * c + 1]);
      } else {
        shift[c] += static_cast<C>(sums[2 * c] / static_cast<double>(shape.count()));
      }
    }
  }
}

// The statistics of all channels of rows, or of planes whose channels are shared among threads.
template <typename T>
void all_statistics(Branch<T>& branch) {
  using C = Compute<T>;
  const Shape& shape = branch.shape;
  const int64_t channels = shape.channels, padded = channels + 64 / static_cast<int64_t>(sizeof(C));
  if (shape.numel() == 0) {
    // Zeros, so that the gradients of weight and bias over an empty batch are zero and not NaN.
    for (int64_t c = 0; c < channels; ++c) {
      branch.invstd[c] = static_cast<C>(1 / std::sqrt(branch.eps));
      branch.scale[c] *= branch.invstd[c];
    }
    return;
  }
  const RowPieces rows(shape);
  const PlanePieces planes(shape);
  const int64_t pieces = shape.rows ? rows.count : planes.count;
  Vector<C> shift = vector_of<C>(channels);
  for (int64_t c = 0; c < channels; ++c) shift[c] = branch.shift_of(c);
  for (int pass = 1; pass <= kStatisticsPasses<T>; ++pass) {
    std::vector<double> sums(2 * pieces * padded);
    double* sum = sums.data();
    double* square = sum + pieces * padded;
    if (shape.rows) {
      parallel(pieces, shape.numel(), [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const int64_t from = rows.begin(p);
          kernels<T>().rows_statistics(branch.data + from * channels, shape, rows.begin(p + 1) - from, shift.data(),
                                       sum + p * padded, square + p * padded);
        }
      });
    } else {
      parallel(channels * pieces, shape.numel(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t c = i / pieces, p = i % pieces;
          double piece[2] = {};
          kernels<T>().planes_statistics(branch.data + c * shape.positions, shape, 1, planes.begin(p),
                                         planes.begin(p + 1), &shift[c], piece);
          sum[p * padded + c] = piece[0];
          square[p * padded + c] = piece[1];
        }
      });
    }
    for (int64_t p = 1; p < pieces; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += sum[p * padded + c];
        square[c] += square[p * padded + c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      if (pass == kStatisticsPasses<T>) {
        branch.finish(c, shift[c], sum[c], square[c]);
      } else {
        shift[c] += static_cast<C>(sum[c] / static_cast<double>(shape.count()));
      }
    }
  }
}

}  // namespace resnet_fused::cpu
