// Packs: 64 bytes of arithmetic values, the unit of all CPU kernels. Included once for each instruction set, inside a
// namespace of its own (RESNET_FUSED_ISA), after isa.h has set the compiler's target.
//
// A pack is 16 floats or 8 doubles whatever the machine, so all instruction sets share one order of operations; only how
// many registers it takes differs. Half and bfloat16 become floats as they are loaded.
#pragma once

namespace RESNET_FUSED_ISA {

template <typename C>
struct Pack {
  static constexpr int kLanes = 64 / sizeof(C);
  static constexpr int kPerRegister = kRegisterBytes / sizeof(C);
  static constexpr int kRegisters = kLanes / kPerRegister;
  using Register = typename Registers<C>::Value;
  Register part[kRegisters];
};

// Comparisons give all ones or all zeros a lane.
template <typename C>
struct Keep {
  using Register = typename Registers<C>::Integer;
  Register part[Pack<C>::kRegisters];
};

// Double accumulators, one a lane of a pack.
template <typename C>
struct Sums {
  static constexpr int kRegisters = Pack<C>::kLanes * 8 / kRegisterBytes;
  Registers<double>::Value part[kRegisters];
};

#define RESNET_FUSED_EACH(p) for (int p = 0; p < Pack<C>::kRegisters; ++p)

template <typename C>
INLINE Pack<C> broadcast(C value) {
  Pack<C> r;
  RESNET_FUSED_EACH(p) r.part[p] = typename Pack<C>::Register{} + value;
  return r;
}

template <typename C>
INLINE Pack<C> operator+(Pack<C> a, Pack<C> b) {
  RESNET_FUSED_EACH(p) a.part[p] += b.part[p];
  return a;
}

template <typename C>
INLINE Pack<C> operator-(Pack<C> a, Pack<C> b) {
  RESNET_FUSED_EACH(p) a.part[p] -= b.part[p];
  return a;
}

template <typename C>
INLINE Pack<C> operator*(Pack<C> a, Pack<C> b) {
  RESNET_FUSED_EACH(p) a.part[p] *= b.part[p];
  return a;
}

// a b + c, rounded once where the machine can.
template <typename C>
INLINE Pack<C> multiply_add(Pack<C> a, Pack<C> b, Pack<C> c) {
  RESNET_FUSED_EACH(p) c.part[p] = register_multiply_add(a.part[p], b.part[p], c.part[p]);
  return c;
}

// c - a b
template <typename C>
INLINE Pack<C> negative_multiply_add(Pack<C> a, Pack<C> b, Pack<C> c) {
  RESNET_FUSED_EACH(p) c.part[p] = register_multiply_add(-a.part[p], b.part[p], c.part[p]);
  return c;
}

// Where the gradient of a ReLU with this result passes. Not v > 0: torch lets it pass where the result is NaN.
template <typename C>
INLINE Keep<C> positive_or_nan(Pack<C> v) {
  Keep<C> r;
  RESNET_FUSED_EACH(p) r.part[p] = ~(v.part[p] <= typename Pack<C>::Register{});
  return r;
}

template <typename C>
INLINE Pack<C> select(Keep<C> keep, Pack<C> v) {
  using Integer = typename Keep<C>::Register;
  RESNET_FUSED_EACH(p) v.part[p] = (typename Pack<C>::Register)((Integer)v.part[p] & keep.part[p]);
  return v;
}

// a where `keep` says so, else b.
template <typename C>
INLINE Pack<C> choose(Keep<C> keep, Pack<C> a, Pack<C> b) {
  using Integer = typename Keep<C>::Register;
  RESNET_FUSED_EACH(p) {
    const Integer bits = ((Integer)a.part[p] & keep.part[p]) | ((Integer)b.part[p] & ~keep.part[p]);
    a.part[p] = (typename Pack<C>::Register)bits;
  }
  return a;
}

// Lanes from `first` on.
template <typename C>
INLINE Keep<C> lanes_from(int first) {
  using Integer = typename Keep<C>::Register;
  Keep<C> r;
  RESNET_FUSED_EACH(p)
  r.part[p] = Registers<C>::kCount >= Integer{} + (first - p * Pack<C>::kPerRegister);
  return r;
}

// Bit i stands for lane i.
template <typename C>
INLINE uint32_t to_bits(Keep<C> keep) {
  uint32_t bits = 0;
  RESNET_FUSED_EACH(p) bits |= register_bits<C>(keep.part[p]) << (p * Pack<C>::kPerRegister);
  return bits;
}

template <typename C>
INLINE Keep<C> from_bits(uint32_t bits) {
  using Integer = typename Keep<C>::Register;
  Keep<C> r;
  RESNET_FUSED_EACH(p) {
    const Integer all = Integer{} + static_cast<int>(bits >> (p * Pack<C>::kPerRegister));
    r.part[p] = (all & Registers<C>::kBit) != 0;
  }
  return r;
}

// Loads and stores of 64 bytes of arithmetic values from as many values of T, at any address.

template <typename C>
INLINE Pack<C> load(const C* from) {
  Pack<C> r;
  RESNET_FUSED_EACH(p) r.part[p] = reinterpret_cast<const typename Registers<C>::Unaligned*>(from)[p];
  return r;
}

template <typename C>
INLINE void store(C* to, Pack<C> v) {
  RESNET_FUSED_EACH(p) reinterpret_cast<typename Registers<C>::Unaligned*>(to)[p] = v.part[p];
}

INLINE Pack<float> load(const BFloat16* from) {
  Pack<float> r;
  for (int p = 0; p < Pack<float>::kRegisters; ++p) {
    r.part[p] = register_from_bfloat16(from + p * Pack<float>::kPerRegister);
  }
  return r;
}

INLINE void store(BFloat16* to, Pack<float> v) {
  for (int p = 0; p < Pack<float>::kRegisters; ++p) {
    register_to_bfloat16(to + p * Pack<float>::kPerRegister, v.part[p]);
  }
}

INLINE Pack<float> load(const Half* from) {
  Pack<float> r;
  for (int p = 0; p < Pack<float>::kRegisters; ++p) {
    r.part[p] = register_from_half(from + p * Pack<float>::kPerRegister);
  }
  return r;
}

INLINE void store(Half* to, Pack<float> v) {
  for (int p = 0; p < Pack<float>::kRegisters; ++p) {
    register_to_half(to + p * Pack<float>::kPerRegister, v.part[p]);
  }
}

// Past the caches, for results that nobody reads from them: `to` is on a line's boundary.
template <typename C>
INLINE void stream(C* to, Pack<C> v) {
  RESNET_FUSED_EACH(p) register_stream(to + p * Pack<C>::kPerRegister, v.part[p]);
}

template <typename T, typename C>
INLINE void stream(T* to, Pack<C> v) {
  store(to, v);
}

// The value that a store to T and a load give back.
template <typename T, typename C>
INLINE Pack<C> round_to(Pack<C> v) {
  if constexpr (sizeof(T) != sizeof(C)) {
    T stored[Pack<C>::kLanes];
    store(stored, v);
    return load(stored);
  }
  return v;
}

// n values with zeros behind them; n is less than a pack.
template <typename T>
INLINE auto load_part(const T* from, int n) {
  T padded[kPackLanes<T>] = {};
  for (int i = 0; i < n; ++i) padded[i] = from[i];
  return load(padded);
}

template <typename T, typename C>
INLINE void store_part(T* to, Pack<C> v, int n) {
  T padded[kPackLanes<T>];
  store(padded, v);
  for (int i = 0; i < n; ++i) to[i] = padded[i];
}

// A sum through the multipliers: they have nothing to do where the adders also convert.
INLINE Registers<double>::Value plus(Registers<double>::Value sum, Registers<double>::Value v) {
#if RESNET_FUSED_REGISTER_BITS >= 256
  return register_multiply_add(v, Registers<double>::Value{} + 1.0, sum);
#else
  return sum + v;
#endif
}

INLINE void add_to(Sums<double>& sums, Pack<double> v) {
  for (int p = 0; p < Sums<double>::kRegisters; ++p) sums.part[p] = plus(sums.part[p], v.part[p]);
}

INLINE void add_product_to(Sums<double>& sums, Pack<double> a, Pack<double> b) {
  for (int p = 0; p < Sums<double>::kRegisters; ++p) {
    sums.part[p] = register_multiply_add(a.part[p], b.part[p], sums.part[p]);
  }
}

// A pack of the wider type, where double is the wider type of float and of itself.
struct Widened {
  Registers<double>::Value part[Sums<float>::kRegisters];
};

INLINE Widened widen(Pack<float> v) {
  Widened r;
  for (int p = 0; p < Pack<float>::kRegisters; ++p) {
    r.part[2 * p] = register_widen_low(v.part[p]);
    r.part[2 * p + 1] = register_widen_high(v.part[p]);
  }
  return r;
}

INLINE Pack<double> widen(Pack<double> v) { return v; }

INLINE Widened operator-(Widened a, Widened b) {
  for (int p = 0; p < Sums<float>::kRegisters; ++p) a.part[p] -= b.part[p];
  return a;
}

INLINE void add_product_to(Sums<float>& sums, Widened a, Widened b) {
  for (int p = 0; p < Sums<float>::kRegisters; ++p) {
    sums.part[p] = register_multiply_add(a.part[p], b.part[p], sums.part[p]);
  }
}

INLINE void add_to(Sums<float>& sums, Widened v) {
  for (int p = 0; p < Sums<float>::kRegisters; ++p) sums.part[p] = plus(sums.part[p], v.part[p]);
}

template <typename C>
INLINE Sums<C> zero_sums() {
  Sums<C> r;
  for (int p = 0; p < Sums<C>::kRegisters; ++p) r.part[p] = Registers<double>::Value{};
  return r;
}

template <typename C>
INLINE Sums<C> load_sums(const double* from) {
  Sums<C> r;
  for (int p = 0; p < Sums<C>::kRegisters; ++p)
    r.part[p] = reinterpret_cast<const Registers<double>::Unaligned*>(from)[p];
  return r;
}

template <typename C>
INLINE void store_sums(double* to, const Sums<C>& sums) {
  for (int p = 0; p < Sums<C>::kRegisters; ++p) reinterpret_cast<Registers<double>::Unaligned*>(to)[p] = sums.part[p];
}

// Lanes added in halves, the upper to the lower: an order that the width of the registers has no part in.
template <typename C>
INLINE double total(Sums<C> sums) {
  for (int n = Sums<C>::kRegisters / 2; n >= 1; n /= 2) {
    for (int p = 0; p < n; ++p) sums.part[p] += sums.part[p + n];
  }
  constexpr int kLanes = kRegisterBytes / sizeof(double);
  double lanes[kLanes];
  __builtin_memcpy(lanes, &sums.part[0], sizeof(lanes));
  for (int n = kLanes / 2; n >= 1; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

#undef RESNET_FUSED_EACH

}  // namespace RESNET_FUSED_ISA
