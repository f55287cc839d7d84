#include "cpu/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace resnet_fused::cpu {

namespace {

// A fresh large tensor costs a page fault every 4 KiB, which takes longer than to fill it. Ask for large pages where the
// system gives them on request, as numpy does.
constexpr size_t kLargePage = size_t{2} << 20;
constexpr size_t kLargeTensor = size_t{4} << 20;

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLargeTensor) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kLargePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t code = dtype == ScalarType::Double     ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Float    ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                       : aoti_torch_dtype_uint8();
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_like(const Tensor& input, MemoryFormat format) {
  int64_t strides[kMaxDims];
  dense_strides(input, format, strides);
  Tensor r = empty_strided(input.sizes().data(), strides, input.dim(), input.scalar_type());
  const size_t size = dispatch(input.scalar_type(), []<typename T>() { return sizeof(T); });
  prefer_large_pages(r.data_ptr(), static_cast<size_t>(r.numel()) * size);
  return r;
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1] > 1 ? sizes.begin()[1] : 1;
  return empty_strided(sizes.begin(), strides, static_cast<int64_t>(sizes.size()), dtype);
}

Tensor vector_tensor(const double* from, int64_t channels, ScalarType dtype) {
  Tensor r = empty({channels}, dtype);
  const auto fill = [&]<typename T>() {
    T* to = r.mutable_data_ptr<T>();
    for (int64_t c = 0; c < channels; ++c) {
      if constexpr (sizeof(T) == 2) {
        to[c] = T(static_cast<float>(from[c]));
      } else {
        to[c] = static_cast<T>(from[c]);
      }
    }
  };
  dispatch(dtype, fill);
  return r;
}

template <typename T>
bool should_stream(const Shape& shape, std::initializer_list<const void*> outputs) {
  constexpr int64_t kLine = 64;
  constexpr int64_t kBeyondCaches = int64_t{8} << 20;
  const int64_t run = shape.inner() * static_cast<int64_t>(sizeof(T));
  if (sizeof(T) != sizeof(Compute<T>) || run % kLine != 0 ||
      shape.numel() * static_cast<int64_t>(sizeof(T)) < kBeyondCaches) {
    return false;
  }
  for (const void* output : outputs) {
    if (reinterpret_cast<uintptr_t>(output) % kLine != 0) return false;
  }
  return true;
}

template bool should_stream<double>(const Shape&, std::initializer_list<const void*>);
template bool should_stream<float>(const Shape&, std::initializer_list<const void*>);
template bool should_stream<BFloat16>(const Shape&, std::initializer_list<const void*>);
template bool should_stream<Half>(const Shape&, std::initializer_list<const void*>);

}  // namespace resnet_fused::cpu
