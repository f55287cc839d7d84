/* Preloaded before a CUDA runtime: writes down what the host code of the library asks it and torch for, a line each.
 * With `recorder_dry` no kernel runs, so that shapes of any size can be planned; with `recorder_captures` every stream
 * says that it is captured. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
  unsigned x, y, z;
} dim3;

int recorder_dry, recorder_captures;
char recorder_text[1 << 20];
static size_t used;

void recorder_reset(void) { recorder_text[used = 0] = 0; }

static void note(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  used += (size_t)vsnprintf(recorder_text + used, sizeof recorder_text - used, format, arguments);
  va_end(arguments);
}

/* torch's libraries are not in the global scope, in which dlsym looks. */
static void* next(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  return found ? found : dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), name);
}
#define NEXT(name) ((__typeof__(&name))next(#name))

int __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  note("launch %u %u %u %zu\n", grid.x, grid.y, block.x, shared);
  return recorder_dry ? 0 : NEXT(__cudaLaunchKernel)(kernel, grid, block, arguments, shared, stream);
}

int cudaLaunchCooperativeKernel(void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  note("launch %u %u %u %zu\n", grid.x, grid.y, block.x, shared);
  return recorder_dry ? 0 : NEXT(cudaLaunchCooperativeKernel)(kernel, grid, block, arguments, shared, stream);
}

int cudaMemsetAsync(void* to, int value, size_t bytes, void* stream) {
  note("memset %zu\n", bytes);
  return NEXT(cudaMemsetAsync)(to, value, bytes, stream);
}

/* Of torch: an allocation, and any operator. */
int aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int dtype, int device,
                             int index, void** tensor) {
  int64_t values = 1;
  for (int64_t d = 0; d < dims; ++d) values *= sizes[d];
  note(values ? "allocate\n" : "nothing\n");
  return NEXT(aoti_torch_empty_strided)(dims, sizes, strides, dtype, device, index, tensor);
}

int torch_call_dispatcher(const char* name, const char* overload, uint64_t* stack, uint64_t version) {
  note("call %s\n", name);
  return NEXT(torch_call_dispatcher)(name, overload, stack, version);
}

/* Questions and settings of a launch. */
#define ASKED(name, ...)                      \
  int name(long a, long b, long c, long d) {  \
    note("ask " #name "\n");                  \
    return NEXT(name)(a, b, c, d);            \
  }
ASKED(cudaGetDevice)
ASKED(cudaGetLastError)
ASKED(cudaDeviceGetAttribute)
ASKED(cudaFuncSetAttribute)
ASKED(cudaOccupancyMaxActiveBlocksPerMultiprocessor)

int cudaStreamIsCapturing(void* stream, int* status) {
  note("ask cudaStreamIsCapturing\n");
  if (!recorder_captures) return NEXT(cudaStreamIsCapturing)(stream, status);
  *status = 1;
  return 0;
}
