// What the library was compiled for, for who has to say why it does not run.

// A list as TORCH_CUDA_ARCH_LIST has it, given by the build.
#ifndef RESNET_FUSED_CUDA_ARCHITECTURES
#define RESNET_FUSED_CUDA_ARCHITECTURES ""
#endif

extern "C" __attribute__((visibility("default"))) const char* resnet_fused_cuda_architectures() {
  return RESNET_FUSED_CUDA_ARCHITECTURES;
}
