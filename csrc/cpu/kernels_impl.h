// The inner loops, included once for each instruction set (see isa.h). Nothing here is visible outside its namespace but the tables.
//
// A run is a stretch of consecutive values: a piece of a plane, whose per-channel constants are the same all along, or a row, whose
// constants come from arrays. Its end is treated by a pack that reaches back over values already treated: outputs are written again
// with the same values, sums leave those lanes out. Only runs shorter than a pack go through a padded copy.
#pragma once

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace RESNET_FUSED_ISA {

// Constants of a run: the same value all along (a plane) ...
template <typename C>
struct Uniform {
  Pack<C> value;
  INLINE Uniform at(const C* vector, int64_t channel) {
    return {vector ? broadcast(vector[channel]) : broadcast(C(0))};
  }
  [[gnu::always_inline]] Pack<C> operator[](int64_t) const { return value; }
};

// ... or one value a channel (a row).
template <typename C>
struct PerChannel {
  const C* vector;
  INLINE PerChannel at(const C* vector, int64_t) { return {vector}; }
  [[gnu::always_inline]] Pack<C> operator[](int64_t i) const { return load(vector + i); }
};

// Calls f(offset, first, n) for the packs of a run: lanes from `first` on are new; n < kLanes marks a run shorter than a pack.
template <int kLanes, typename F>
INLINE void for_packs(int64_t length, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) f(i, 0, kLanes);
  if (i == length) return;
  if (length >= kLanes) {
    f(length - kLanes, static_cast<int>(kLanes - (length - i)), kLanes);
  } else {
    f(int64_t{0}, 0, static_cast<int>(length));
  }
}

template <typename T>
INLINE Pack<Compute<T>> load_n(const T* from, int n) {
  return n == kPackLanes<T> ? load(from) : load_part(from, n);
}

template <typename T>
INLINE void store_n(T* to, Pack<Compute<T>> v, int n) {
  if (n == kPackLanes<T>) {
    store(to, v);
  } else {
    store_part(to, v, n);
  }
}

// Writes bits of the lanes from `first` on, which begin at a byte's boundary of the run.
template <int kLanes>
INLINE void store_bits(uint8_t* mask, int64_t offset, int first, int n, uint32_t bits) {
  bits = (bits & ((n < kLanes) ? (1u << n) - 1 : ~0u)) >> first;
  uint8_t* to = mask + (offset + first) / 8;
  const int bytes = (n - first + 7) / 8;
  to[0] = static_cast<uint8_t>(bits);
  if (bytes > 1) to[1] = static_cast<uint8_t>(bits >> 8);
}

// Bits of the lanes from `first` on, in their places.
template <int kLanes>
INLINE uint32_t load_bits(const uint8_t* mask, int64_t offset, int first, int n) {
  const uint8_t* from = mask + (offset + first) / 8;
  uint32_t bits = from[0];
  if (n - first > 8) bits |= static_cast<uint32_t>(from[1]) << 8;
  return bits << first;
}

// Bits of all lanes of a pack that begins anywhere.
template <int kLanes>
INLINE uint32_t load_bits_at(const uint8_t* mask, int64_t offset) {
  const uint8_t* from = mask + offset / 8;
  const int shift = static_cast<int>(offset % 8);
  uint32_t bits = from[0] | static_cast<uint32_t>(from[1]) << 8;
  if (shift + kLanes > 16) bits |= static_cast<uint32_t>(from[2]) << 16;
  return bits >> shift;
}

// The stretches of planes that make up values [begin, end) of a channel, the last plane first where Reverse.
template <bool Reverse, typename F>
INLINE void for_planes(const Shape& shape, int64_t begin, int64_t end, const F& f) {
  if (begin >= end) return;
  const int64_t size = shape.positions;
  const bool whole = begin == 0 && end == shape.count();  // most often: spare the divisions
  const int64_t first = whole ? 0 : begin / size;
  const int64_t last = whole ? shape.batch - 1 : (end - 1) / size;
  for (int64_t i = first; i <= last; ++i) {
    const int64_t n = Reverse ? first + last - i : i;
    const int64_t from = n == first ? begin - n * size : 0;
    const int64_t to = n == last ? end - n * size : size;
    f(n, from, to - from);
  }
}

// Rows [begin, end), the last block first, for those are what the cache still has of the pass before; forwards within a block, for
// that is how memory is fetched ahead.
template <typename T, typename F>
INLINE void for_rows_from_end(const Shape& shape, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kBlockBytes = 65536;
  const int64_t block = 1 + kBlockBytes / (shape.channels * static_cast<int64_t>(sizeof(T)) + 1);
  for (int64_t stop = end; stop > begin; stop -= block) {
    for (int64_t r = stop - block < begin ? begin : stop - block; r < stop; ++r) f(r);
  }
}

// Sums -------------------------------------------------------------------------------------------------------------------
//
// Values become double before anything is added or multiplied: a gradient's sum is often a small rest of large terms, and then
// the roundings of float arithmetic are what one would see of it.

// Rows whose accumulators stay in registers while a pack of channels goes through them.
constexpr int kGroup = 4;

template <typename C>
INLINE Keep<C> lanes_between(int first, int n) {
  Keep<C> keep = lanes_from<C>(first);
  const Keep<C> beyond = lanes_from<C>(n);
  for (int p = 0; p < Pack<C>::kRegisters; ++p) keep.part[p] &= ~beyond.part[p];
  return keep;
}

// Sums of x - shift and of its square.
template <typename C>
struct Moments {
  Sums<C> sum, square;
  template <typename Wide>
  [[gnu::always_inline]] void add(Pack<C> x, const Wide& shift) {
    const auto difference = widen(x) - shift;
    add_to(sum, difference);
    add_product_to(square, difference, difference);
  }
};

template <typename T>
void planes_statistics(const T* planes, const Shape& shape, int64_t channels, int64_t begin, int64_t end,
                       const Compute<T>* shift, double* sums) {
  using C = Compute<T>;
  constexpr int kLanes = Pack<C>::kLanes;
  Moments<C> of_channel[kChannelsTogether];
  for (int64_t c = 0; c < channels; ++c) of_channel[c] = {zero_sums<C>(), zero_sums<C>()};
  for_planes<false>(shape, begin, end, [&](int64_t n, int64_t from, int64_t length) __attribute__((always_inline)) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* x = planes + (n * shape.channels + c) * shape.positions + from;
      const Pack<C> narrow = broadcast(shift[c]);
      const auto wide = widen(narrow);
      Moments<C> moments = of_channel[c];
      for_packs<kLanes>(length, [&](int64_t i, int first, int count) __attribute__((always_inline)) {
        Pack<C> v = load_n(x + i, count);
        // Lanes that do not count take the shift's place, whose difference is zero.
        if (first != 0 || count != kLanes) v = choose(lanes_between<C>(first, count), v, narrow);
        moments.add(v, wide);
      });
      of_channel[c] = moments;
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    sums[2 * c] += total(of_channel[c].sum);
    sums[2 * c + 1] += total(of_channel[c].square);
  }
}

// A group of rows is walked a pack of channels at a time, which no machine recognizes as a stream: fetch what lies this many values
// ahead, a group or several of them.
template <typename T>
INLINE int64_t fetch_ahead(int64_t channels) {
  constexpr int64_t kBytes = 4096;
  const int64_t group = kGroup * channels;
  return group * (1 + kBytes / (group * static_cast<int64_t>(sizeof(T)) + 1));
}

template <typename T, int kRows>
INLINE void rows_statistics_group(const T* x, int64_t channels, const Compute<T>* shift, double* sum, double* square) {
  using C = Compute<T>;
  constexpr int kLanes = Pack<C>::kLanes;
  const T* ahead = x + fetch_ahead<T>(channels);
  for_packs<kLanes>(channels, [&](int64_t i, int first, int count) __attribute__((always_inline)) {
    const bool partial = first != 0 || count != kLanes;
    const Keep<C> keep = lanes_between<C>(first, count);
    const Pack<C> narrow = load(shift + i);
    const auto wide = widen(narrow);
    Moments<C> moments = {load_sums<C>(sum + i), load_sums<C>(square + i)};
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(ahead + r * channels + i);
      Pack<C> v = load_n(x + r * channels + i, count);
      if (partial) v = choose(keep, v, narrow);
      moments.add(v, wide);
    }
    store_sums<C>(sum + i, moments.sum);
    store_sums<C>(square + i, moments.square);
  });
}

template <typename T>
void rows_statistics(const T* rows, const Shape& shape, int64_t count, const Compute<T>* shift, double* sum,
                     double* square) {
  const int64_t channels = shape.channels;
  int64_t r = 0;
  for (; r + kGroup <= count; r += kGroup) {
    rows_statistics_group<T, kGroup>(rows + r * channels, channels, shift, sum, square);
  }
  for (; r < count; ++r) rows_statistics_group<T, 1>(rows + r * channels, channels, shift, sum, square);
}

// Forward ----------------------------------------------------------------------------------------------------------------

template <typename C>
INLINE Pack<C> apply(Pack<C> x, Pack<C> mean, Pack<C> scale, Pack<C> bias) {
  return multiply_add(x - mean, scale, bias);
}

// Rounds, applies the ReLU and stores; the bits are those of the rounded value.
template <typename T, bool Mask>
INLINE void finish(Pack<Compute<T>> v, bool relu, bool stream_output, T* output, uint8_t* mask, int64_t i, int first,
                   int n) {
  using C = Compute<T>;
  constexpr int kLanes = Pack<C>::kLanes;
  if (relu) {
    Keep<C> keep = positive_or_nan(v);
    v = select(keep, v);
    if constexpr (Mask) {
      // A small positive value may round to zero, and then the gradient stops there.
      if constexpr (sizeof(T) != sizeof(C)) keep = positive_or_nan(round_to<T>(v));
      store_bits<kLanes>(mask, i, first, n, to_bits(keep));
    }
  }
  if (stream_output) {
    stream(output + i, v);
  } else {
    store_n(output + i, v, n);
  }
}

enum class Second { kNone, kTensor, kNormalized };

// The constants of both branches, for a channel of planes or for rows.
template <typename C, template <typename> class Constant>
struct ForwardConstants {
  Constant<C> mean, scale, bias, mean2, scale2;
  INLINE ForwardConstants of(const Affine<C>& a, const Affine<C>& b, int64_t channel) {
    return {Constant<C>::at(a.mean, channel), Constant<C>::at(a.scale, channel), Constant<C>::at(a.bias, channel),
            Constant<C>::at(b.mean, channel), Constant<C>::at(b.scale, channel)};
  }
};

template <typename T, template <typename> class Constant, Second S, bool Mask>
INLINE void forward_run(const ForwardArguments<T>& a, const ForwardConstants<Compute<T>, Constant>& k, int64_t at,
                        uint8_t* mask, int64_t length) {
  using C = Compute<T>;
  constexpr int kLanes = Pack<C>::kLanes;
  const T* input = a.input + at;
  const T* residual = S == Second::kNone ? nullptr : a.residual + at;
  T* output = a.output + at;
  const bool relu = a.relu, stream_output = a.stream;
  for_packs<kLanes>(length, [&](int64_t i, int first, int n) __attribute__((always_inline)) {
    Pack<C> bias = k.bias[i];
    if constexpr (S == Second::kNormalized) bias = apply<C>(load_n(residual + i, n), k.mean2[i], k.scale2[i], bias);
    Pack<C> v = apply<C>(load_n(input + i, n), k.mean[i], k.scale[i], bias);
    if constexpr (S == Second::kTensor) v = v + load_n(residual + i, n);
    finish<T, Mask>(v, relu, stream_output, output, mask, i, first, n);
  });
}

// The arguments come by value: stores to the output could change what a reference refers to, as far as the compiler knows.
template <typename T, Second S, bool Mask>
void planes_forward_as(const ForwardArguments<T> a, int64_t channel, int64_t channels, int64_t begin, int64_t end) {
  // Backwards: the last planes of the statistics pass are the first that the cache still has.
  for_planes<true>(a.shape, begin, end, [&](int64_t n, int64_t from, int64_t length) __attribute__((always_inline)) {
    for (int64_t c = channel; c < channel + channels; ++c) {
      const auto constants = ForwardConstants<Compute<T>, Uniform>::of(a.affine, a.affine2, c);
      const int64_t plane = n * a.shape.channels + c;
      uint8_t* mask = Mask ? a.mask + plane * a.shape.mask_bytes() + from / 8 : nullptr;
      forward_run<T, Uniform, S, Mask>(a, constants, plane * a.shape.positions + from, mask, length);
    }
  });
  if (a.stream) stream_fence();
}

template <typename T, Second S, bool Mask>
void rows_forward_as(const ForwardArguments<T> a, int64_t begin, int64_t end) {
  const auto constants = ForwardConstants<Compute<T>, PerChannel>::of(a.affine, a.affine2, 0);
  for_rows_from_end<T>(a.shape, begin, end, [&](int64_t r) __attribute__((always_inline)) {
    uint8_t* mask = Mask ? a.mask + r * a.shape.mask_bytes() : nullptr;
    forward_run<T, PerChannel, S, Mask>(a, constants, r * a.shape.channels, mask, a.shape.channels);
  });
  if (a.stream) stream_fence();
}

template <typename T>
void planes_forward(const ForwardArguments<T>& a, int64_t channel, int64_t channels, int64_t begin, int64_t end) {
  if (a.residual == nullptr) return planes_forward_as<T, Second::kNone, false>(a, channel, channels, begin, end);
  const bool normalized = a.affine2.mean != nullptr;
  if (normalized && a.mask) return planes_forward_as<T, Second::kNormalized, true>(a, channel, channels, begin, end);
  if (normalized) return planes_forward_as<T, Second::kNormalized, false>(a, channel, channels, begin, end);
  if (a.mask) return planes_forward_as<T, Second::kTensor, true>(a, channel, channels, begin, end);
  return planes_forward_as<T, Second::kTensor, false>(a, channel, channels, begin, end);
}

template <typename T>
void rows_forward(const ForwardArguments<T>& a, int64_t begin, int64_t end) {
  if (a.residual == nullptr) return rows_forward_as<T, Second::kNone, false>(a, begin, end);
  const bool normalized = a.affine2.mean != nullptr;
  if (normalized && a.mask) return rows_forward_as<T, Second::kNormalized, true>(a, begin, end);
  if (normalized) return rows_forward_as<T, Second::kNormalized, false>(a, begin, end);
  if (a.mask) return rows_forward_as<T, Second::kTensor, true>(a, begin, end);
  return rows_forward_as<T, Second::kTensor, false>(a, begin, end);
}

// Backward ---------------------------------------------------------------------------------------------------------------

// What comes from above: one gradient, or two whose sum is rounded as one that was written to memory.
template <typename T, bool Added>
INLINE Pack<Compute<T>> load_gradient(const T* g, const T* g2, int n) {
  if constexpr (Added) return round_to<T>(load_n(g, n) + load_n(g2, n));
  return load_n(g, n);
}

// The gradient behind the ReLU.
template <typename T, KeepFrom K>
INLINE Pack<Compute<T>> behind_relu(Pack<Compute<T>> grad, const uint8_t* mask, int64_t i, int first, int n,
                                    Pack<Compute<T>> normalized) {
  using C = Compute<T>;
  if constexpr (K == KeepFrom::kMask) {
    return select(from_bits<C>(load_bits<Pack<C>::kLanes>(mask, i, first, n)), grad);
  } else if constexpr (K == KeepFrom::kInput) {
    // As the forward rounded it, to the bit.
    return select(positive_or_nan(round_to<T>(normalized)), grad);
  } else {
    return grad;
  }
}

// Sums of grad, grad (input - origin) and grad (input2 - origin2).
template <typename C, bool Two>
struct GradientSums {
  Sums<C> grad, product, product2;
};

// What a channel's gradient is reduced with.
template <typename C>
struct ReduceConstants {
  Pack<C> mean, scale, bias, mean2;
};

template <typename T, KeepFrom K, bool Two, bool Added>
INLINE void reduce_pack(const T* g, const T* g2, const T* x, const T* x2, const uint8_t* mask, int64_t i, int first,
                        int n, const ReduceConstants<Compute<T>>& k, GradientSums<Compute<T>, Two>& sums) {
  using C = Compute<T>;
  Pack<C> value = load_n(x, n);
  Pack<C> value2 = Two ? load_n(x2, n) : value;
  Pack<C> normalized = value;
  if constexpr (K == KeepFrom::kInput) normalized = apply(value, k.mean, k.scale, k.bias);
  Pack<C> grad = behind_relu<T, K>(load_gradient<T, Added>(g, g2, n), mask, i, first, n, normalized);
  if (first != 0 || n != Pack<C>::kLanes) {
    // Both factors, for 0 times Inf is not 0.
    const Keep<C> keep = lanes_between<C>(first, n);
    grad = select(keep, grad);
    value = select(keep, value);
    if constexpr (Two) value2 = select(keep, value2);
  }
  if constexpr (kOriginIsMean<T>) {
    value = value - k.mean;
    if constexpr (Two) value2 = value2 - k.mean2;
  }
  const auto wide = widen(grad);
  add_to(sums.grad, wide);
  add_product_to(sums.product, wide, widen(value));
  if constexpr (Two) add_product_to(sums.product2, wide, widen(value2));
}

template <typename T, KeepFrom K, bool Two, bool Added>
void planes_reduce_as(const BackwardArguments<T> a, int64_t channel, int64_t channels, int64_t begin, int64_t end,
                      double* sums) {
  using C = Compute<T>;
  constexpr int kLanes = Pack<C>::kLanes;
  GradientSums<C, Two> of_channel[kChannelsTogether];
  for (int64_t c = 0; c < channels; ++c) of_channel[c] = {zero_sums<C>(), zero_sums<C>(), zero_sums<C>()};
  for_planes<false>(a.shape, begin, end, [&](int64_t n, int64_t from, int64_t length) __attribute__((always_inline)) {
    for (int64_t c = 0; c < channels; ++c) {
      const ReduceConstants<C> constants = {
          Uniform<C>::at(a.affine.mean, channel + c).value, Uniform<C>::at(a.affine.scale, channel + c).value,
          Uniform<C>::at(a.affine.bias, channel + c).value, Uniform<C>::at(a.mean2, channel + c).value};
      const int64_t plane = n * a.shape.channels + channel + c;
      const int64_t at = plane * a.shape.positions + from;
      const uint8_t* mask = K == KeepFrom::kMask ? a.mask + plane * a.shape.mask_bytes() + from / 8 : nullptr;
      const T* g = a.grad_output + at;
      const T* g2 = Added ? a.grad_output2 + at : g;
      const T* x = a.input + at;
      const T* x2 = Two ? a.input2 + at : nullptr;
      GradientSums<C, Two> group = of_channel[c];
      for_packs<kLanes>(length, [&](int64_t i, int first, int count) __attribute__((always_inline)) {
        reduce_pack<T, K, Two, Added>(g + i, g2 + i, x + i, x2 + i, mask, i, first, count, constants, group);
      });
      of_channel[c] = group;
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    sums[3 * c] += total(of_channel[c].grad);
    sums[3 * c + 1] += total(of_channel[c].product);
    if (Two) sums[3 * c + 2] += total(of_channel[c].product2);
  }
}

template <typename T, KeepFrom K, bool Two, bool Added, int kRows>
INLINE void rows_reduce_group(const BackwardArguments<T>& a, int64_t row, double* sum, double* xmu, double* xmu2) {
  using C = Compute<T>;
  constexpr int kLanes = Pack<C>::kLanes;
  const int64_t channels = a.shape.channels, mask_bytes = a.shape.mask_bytes();
  const T* g = a.grad_output + row * channels;
  const T* g2 = Added ? a.grad_output2 + row * channels : g;
  const T* x = a.input + row * channels;
  const T* x2 = Two ? a.input2 + row * channels : nullptr;
  const uint8_t* mask = K == KeepFrom::kMask ? a.mask + row * mask_bytes : nullptr;
  const int64_t ahead = fetch_ahead<T>(channels);
  for_packs<kLanes>(channels, [&](int64_t i, int first, int n) __attribute__((always_inline)) {
    const Pack<C> mean = load(a.affine.mean + i);
    const ReduceConstants<C> constants = {mean, K == KeepFrom::kInput ? load(a.affine.scale + i) : mean,
                                          K == KeepFrom::kInput ? load(a.affine.bias + i) : mean,
                                          Two ? load(a.mean2 + i) : mean};
    GradientSums<C, Two> group = {load_sums<C>(sum + i), load_sums<C>(xmu + i),
                                  Two ? load_sums<C>(xmu2 + i) : zero_sums<C>()};
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = r * channels + i;
      __builtin_prefetch(g + ahead + at);
      if constexpr (Added) __builtin_prefetch(g2 + ahead + at);
      __builtin_prefetch(x + ahead + at);
      if constexpr (Two) __builtin_prefetch(x2 + ahead + at);
      reduce_pack<T, K, Two, Added>(g + at, g2 + at, x + at, x2 + at, mask + r * mask_bytes, i, first, n, constants,
                                    group);
    }
    store_sums<C>(sum + i, group.grad);
    store_sums<C>(xmu + i, group.product);
    if constexpr (Two) store_sums<C>(xmu2 + i, group.product2);
  });
}

template <typename T, KeepFrom K, bool Two, bool Added>
void rows_reduce_as(const BackwardArguments<T>& a, int64_t begin, int64_t end, double* sum, double* xmu, double* xmu2) {
  int64_t r = begin;
  for (; r + kGroup <= end; r += kGroup) rows_reduce_group<T, K, Two, Added, kGroup>(a, r, sum, xmu, xmu2);
  for (; r < end; ++r) rows_reduce_group<T, K, Two, Added, 1>(a, r, sum, xmu, xmu2);
}

template <typename C, template <typename> class Constant>
struct BackwardConstants {
  Constant<C> mean, scale, bias, mean2, scale2, mean_grad, slope, slope2;
  template <typename T>
  INLINE BackwardConstants of(const BackwardArguments<T>& a, int64_t channel) {
    return {Constant<C>::at(a.affine.mean, channel), Constant<C>::at(a.affine.scale, channel),
            Constant<C>::at(a.affine.bias, channel), Constant<C>::at(a.mean2, channel),
            Constant<C>::at(a.scale2, channel),      Constant<C>::at(a.mean_grad, channel),
            Constant<C>::at(a.slope, channel),       Constant<C>::at(a.slope2, channel)};
  }
};

template <typename T, template <typename> class Constant, KeepFrom K, bool Two, bool Added>
INLINE void backward_run(const BackwardArguments<T>& a, const BackwardConstants<Compute<T>, Constant>& k, int64_t at,
                         const uint8_t* mask, int64_t length) {
  using C = Compute<T>;
  constexpr int kLanes = Pack<C>::kLanes;
  const T* g = a.grad_output + at;
  const T* g2 = Added ? a.grad_output2 + at : g;
  const T* x = a.input + at;
  const T* x2 = Two ? a.input2 + at : nullptr;
  const bool constant = a.constant_statistics, stream_output = a.stream;
  T* grad_input = a.grad_input ? a.grad_input + at : nullptr;
  T* grad_input2 = a.grad_input2 ? a.grad_input2 + at : nullptr;
  T* grad_residual = a.grad_residual ? a.grad_residual + at : nullptr;
  const auto put = [&](T* to, int64_t i, Pack<C> v, int n) __attribute__((always_inline)) {
    if (stream_output) {
      stream(to + i, v);
    } else {
      store_n(to + i, v, n);
    }
  };
  for_packs<kLanes>(length, [&](int64_t i, int first, int n) __attribute__((always_inline)) {
    Pack<C> difference = broadcast(C(0));
    if (K == KeepFrom::kInput || !constant) difference = load_n(x + i, n) - k.mean[i];
    Pack<C> grad = load_gradient<T, Added>(g + i, g2 + i, n);
    if constexpr (K == KeepFrom::kMask) {
      // The pack that reaches back writes all its lanes again, so it needs their bits too.
      const uint32_t bits = first == 0 ? load_bits<kLanes>(mask, i, first, n) : load_bits_at<kLanes>(mask, i);
      grad = select(from_bits<C>(bits), grad);
    } else {
      Pack<C> normalized = difference;
      if constexpr (K == KeepFrom::kInput) normalized = multiply_add(difference, k.scale[i], k.bias[i]);
      grad = behind_relu<T, K>(grad, mask, i, first, n, normalized);
    }
    if (grad_residual) put(grad_residual, i, grad, n);
    if (constant) {
      if (grad_input) put(grad_input, i, grad * k.scale[i], n);
      if constexpr (Two) {
        if (grad_input2) put(grad_input2, i, grad * k.scale2[i], n);
      }
      return;
    }
    const Pack<C> centred = grad - k.mean_grad[i];
    if (grad_input) put(grad_input, i, negative_multiply_add(difference, k.slope[i], centred) * k.scale[i], n);
    if constexpr (Two) {
      const Pack<C> difference2 = load_n(x2 + i, n) - k.mean2[i];
      if (grad_input2) put(grad_input2, i, negative_multiply_add(difference2, k.slope2[i], centred) * k.scale2[i], n);
    }
  });
}

template <typename T, KeepFrom K, bool Two, bool Added>
void planes_backward_as(const BackwardArguments<T> a, int64_t channel, int64_t channels, int64_t begin, int64_t end) {
  for_planes<true>(a.shape, begin, end, [&](int64_t n, int64_t from, int64_t length) __attribute__((always_inline)) {
    for (int64_t c = channel; c < channel + channels; ++c) {
      const auto constants = BackwardConstants<Compute<T>, Uniform>::of(a, c);
      const int64_t plane = n * a.shape.channels + c;
      const uint8_t* mask = K == KeepFrom::kMask ? a.mask + plane * a.shape.mask_bytes() + from / 8 : nullptr;
      backward_run<T, Uniform, K, Two, Added>(a, constants, plane * a.shape.positions + from, mask, length);
    }
  });
  if (a.stream) stream_fence();
}

template <typename T, KeepFrom K, bool Two, bool Added>
void rows_backward_as(const BackwardArguments<T> a, int64_t begin, int64_t end) {
  const auto constants = BackwardConstants<Compute<T>, PerChannel>::of(a, 0);
  for_rows_from_end<T>(a.shape, begin, end, [&](int64_t r) __attribute__((always_inline)) {
    const uint8_t* mask = K == KeepFrom::kMask ? a.mask + r * a.shape.mask_bytes() : nullptr;
    backward_run<T, PerChannel, K, Two, Added>(a, constants, r * a.shape.channels, mask, a.shape.channels);
  });
  if (a.stream) stream_fence();
}

// Two branches always have a mask where they have a ReLU.
#define RESNET_FUSED_BY_KEEP_AND_BRANCHES(function, added, a, ...)                                                     \
  if ((a).input2 != nullptr) {                                                                                         \
    if ((a).keep == KeepFrom::kMask) return function<T, KeepFrom::kMask, true, added>(a, __VA_ARGS__);                 \
    return function<T, KeepFrom::kAll, true, added>(a, __VA_ARGS__);                                                   \
  }                                                                                                                    \
  switch ((a).keep) {                                                                                                  \
    case KeepFrom::kMask:                                                                                              \
      return function<T, KeepFrom::kMask, false, added>(a, __VA_ARGS__);                                               \
    case KeepFrom::kInput:                                                                                             \
      return function<T, KeepFrom::kInput, false, added>(a, __VA_ARGS__);                                              \
    case KeepFrom::kAll:                                                                                               \
      return function<T, KeepFrom::kAll, false, added>(a, __VA_ARGS__);                                                \
  }
#define RESNET_FUSED_BY_GRADIENT(function, a, ...)                                                                     \
  if ((a).grad_output2 != nullptr) {                                                                                   \
    RESNET_FUSED_BY_KEEP_AND_BRANCHES(function, true, a, __VA_ARGS__)                                                  \
  } else {                                                                                                             \
    RESNET_FUSED_BY_KEEP_AND_BRANCHES(function, false, a, __VA_ARGS__)                                                 \
  }

template <typename T>
void planes_reduce(const BackwardArguments<T>& a, int64_t channel, int64_t channels, int64_t begin, int64_t end,
                   double* sums) {
  RESNET_FUSED_BY_GRADIENT(planes_reduce_as, a, channel, channels, begin, end, sums)
}

template <typename T>
void rows_reduce(const BackwardArguments<T>& a, int64_t begin, int64_t end, double* grad, double* xmu, double* xmu2) {
  RESNET_FUSED_BY_GRADIENT(rows_reduce_as, a, begin, end, grad, xmu, xmu2)
}

template <typename T>
void planes_backward(const BackwardArguments<T>& a, int64_t channel, int64_t channels, int64_t begin, int64_t end) {
  RESNET_FUSED_BY_GRADIENT(planes_backward_as, a, channel, channels, begin, end)
}

template <typename T>
void rows_backward(const BackwardArguments<T>& a, int64_t begin, int64_t end) {
  RESNET_FUSED_BY_GRADIENT(rows_backward_as, a, begin, end)
}

#undef RESNET_FUSED_BY_GRADIENT
#undef RESNET_FUSED_BY_KEEP_AND_BRANCHES

// Add and ReLU alone -------------------------------------------------------------------------------------------------------

template <typename T>
void add_relu(const T* input, const T* residual, T* output, uint8_t* mask, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int kLanes = Pack<C>::kLanes;
  input += begin, residual += begin, output += begin;
  if (mask) mask += begin / 8;
  for_packs<kLanes>(end - begin, [&](int64_t i, int first, int n) __attribute__((always_inline)) {
    const Pack<C> v = load_n(input + i, n) + load_n(residual + i, n);
    if (mask) {
      finish<T, true>(v, true, false, output, mask, i, first, n);
    } else {
      finish<T, false>(v, true, false, output, mask, i, first, n);
    }
  });
}

template <typename T>
void add_relu_backward(const T* grad_output, const uint8_t* mask, T* grad_input, int64_t begin, int64_t end) {
  BackwardArguments<T> a{};
  a.grad_output = grad_output;
  a.constant_statistics = true;
  a.grad_residual = grad_input;
  const auto constants = BackwardConstants<Compute<T>, Uniform>::of(a, 0);
  backward_run<T, Uniform, KeepFrom::kMask, false, false>(a, constants, begin, mask + begin / 8, end - begin);
}

template <typename T>
constexpr Kernels<T> kTable = {planes_statistics<T>, rows_statistics<T>,  planes_forward<T>,  rows_forward<T>,
                               planes_reduce<T>,     rows_reduce<T>,      planes_backward<T>, rows_backward<T>,
                               add_relu<T>,          add_relu_backward<T>};

}  // namespace RESNET_FUSED_ISA
