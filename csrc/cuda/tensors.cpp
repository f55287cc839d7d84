#include "cuda/tensors.h"

#include "cuda/workspace.h"

#include <atomic>
#include <cstdlib>
#include <string_view>

// Whether torch.distributed is initialized: library.py of the package says so.
extern "C" {
__attribute__((visibility("default"))) std::atomic<int> resnet_fused_distributed = 0;
}

namespace resnet_fused::cuda {

namespace {

Tensor empty_strided(const Tensor& on, const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(on.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  const int32_t code = dtype == ScalarType::Double     ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Float    ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                       : aoti_torch_dtype_uint8();
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

}  // namespace

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kHalf;
  }
}

Shape shape_of(const Tensor& input, MemoryFormat format) {
  int64_t positions = 1;
  for (int64_t d = 2; d < input.dim(); ++d) positions *= input.size(d);
  const bool rows = positions == 1 || format != MemoryFormat::Contiguous;
  // A thread counts the channels of planes in 32 bits.
  STD_TORCH_CHECK(rows || input.size(1) <= (int64_t{1} << 30), "input must have at most 2^30 channels, got shape ",
                  shape_text(input));
  return {input.size(0), input.size(1), positions, rows};
}

Tensor empty(const Tensor& on, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1] > 1 ? sizes.begin()[1] : 1;
  return empty_strided(on, sizes.begin(), strides, static_cast<int64_t>(sizes.size()), dtype);
}

Tensor empty_like(const Tensor& input, MemoryFormat format) {
  int64_t strides[kMaxDims];
  dense_strides(input, format, strides);
  return empty_strided(input, input.sizes().data(), strides, input.dim(), input.scalar_type());
}

const void* data_of(const Tensor& tensor) {
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  return data;
}

void* mutable_data_of(const Tensor& tensor) { return const_cast<void*>(data_of(tensor)); }

ChannelVector values(const Tensor& vector) { return {data_of(vector), vector.stride(0), dtype_of(vector)}; }

ChannelOutput output_of(const Tensor& vector) { return {mutable_data_of(vector), vector.stride(0), dtype_of(vector)}; }

bool on_chip_wanted() {
  const char* asked = std::getenv("RESNET_FUSED_ON_CHIP");
  const std::string_view choice(asked == nullptr ? "auto" : asked);
  if (choice == "auto") return resnet_fused_distributed == 0;
  STD_TORCH_CHECK(choice == "0" || choice == "1", "RESNET_FUSED_ON_CHIP must be 0, 1 or auto, got ", asked);
  return choice == "1";
}

Branch branch_of(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias) {
  Branch branch;
  branch.input = data_of(input);
  branch.weight = values(weight);
  branch.bias = values(bias);
  return branch;
}

Call::Call(const char* name, const Tensor& input) : name_(name), input_(input), guard_(input.get_device_index()) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream));
  launch_.stream = static_cast<cudaStream_t>(stream);
  launch_.workspace = [this](int64_t partial_bytes, int64_t counters, Workspace& workspace) {
    return workspace_of(input_, launch_.stream, partial_bytes, counters, workspace_owner_, workspace);
  };
}

void* Call::new_table(const Tensor& input) {
  const bool wide = input.scalar_type() == ScalarType::Double;
  const size_t entry = wide ? sizeof(TableEntry<double>) : sizeof(TableEntry<float>);
  scratch_.push_back(empty(input, {input.size(1) * static_cast<int64_t>(entry)}, ScalarType::Byte));
  return mutable_data_of(scratch_.back());
}

void Call::check(cudaError_t error) const {
  if (error == cudaSuccess) return;
  char* text = nullptr;
  torch_c10_cuda_check_msg(static_cast<int32_t>(error), name_, name_, 0, true, &text);
  const std::string message = text ? text : cudaGetErrorString(error);
  if (text) torch_c10_cuda_free_error_msg(text);
  STD_TORCH_CHECK(false, "resnet_fused::", name_, " failed for input of shape ", shape_text(input_), " and dtype ",
                  dtype_name(input_.scalar_type()), ": ", message);
}

}  // namespace resnet_fused::cuda
