// Compiles what stands between BEGIN and END for more than the default target, with either compiler.
#pragma once

#define RESNET_FUSED_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define RESNET_FUSED_TARGET_BEGIN(features)                                                                            \
  RESNET_FUSED_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RESNET_FUSED_TARGET_END _Pragma("clang attribute pop")
#else
// Templates take the options of the end of the file, so they stay on until there.
#define RESNET_FUSED_TARGET_BEGIN(features) RESNET_FUSED_PRAGMA(GCC target(features))
#define RESNET_FUSED_TARGET_END
#endif
