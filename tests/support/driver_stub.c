// A libcuda.so.1 for machines without a card: as much of the driver as Triton asks for.
//
// It reads what it is to load, an ELF file: registers, stack, shared memory and the parameters of the kernel. It refuses
// what a card would refuse: more shared memory than a block may have, and grids whose programs wait for each other and
// would not all be resident. Modules and launches become lines of JSON in the file that DRIVER_STUB_LOG names. Nothing
// is computed.
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { MULTIPROCESSORS = 132, SHARED = 227 * 1024, SHARED_WITHOUT_OPT_IN = 48 * 1024, REGISTERS = 65536, THREADS = 2048, MOST = 64 };
// Attributes in .nv.info sections, as readelf-like tools for cubins list them.
enum { SIZED = 4, FRAME_SIZE = 0x11, PARAMETER = 0x17, REGISTER_COUNT = 0x2f };

typedef struct {
  char name[256];
  int registers, stack, parameters;
  unsigned shared, opt_in;
  int size[MOST];
} Kernel;

static void record(const char *format, ...) {
  const char *path = getenv("DRIVER_STUB_LOG");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (!file) return;
  va_list values;
  va_start(values, format);
  vfprintf(file, format, values);
  va_end(values);
  fclose(file);
}

static void read_attributes(Kernel *kernel, const unsigned char *at, const unsigned char *end) {
  while (at + 4 <= end) {
    unsigned format = at[0], attribute = at[1], size = at[2] | at[3] << 8;
    const unsigned char *value = at + 4;
    if (format != SIZED) {
      at += 4;
      continue;
    }
    int number = 0;
    if (size >= 8) memcpy(&number, value + 4, sizeof number);
    if (attribute == REGISTER_COUNT) kernel->registers = number;
    if (attribute == FRAME_SIZE && number > kernel->stack) kernel->stack = number;
    if (attribute == PARAMETER) {  // its number, its offset, and in the upper bits its size
      uint16_t place;
      uint32_t bits;
      memcpy(&place, value + 4, sizeof place);
      memcpy(&bits, value + 8, sizeof bits);
      if (place >= MOST) abort();
      kernel->size[place] = bits >> 18;
      if (place >= kernel->parameters) kernel->parameters = place + 1;
    }
    at += 4 + size;
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *data) {
  const char *refused = getenv("DRIVER_STUB_REFUSES");  // as an old driver
  int result = refused ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
  const Elf64_Ehdr *header = data;
  if (!result && memcmp(header->e_ident, ELFMAG, SELFMAG)) result = CUDA_ERROR_INVALID_IMAGE;
  record("{\"event\": \"load\", \"result\": %d}\n", result);
  if (result) return result;
  Kernel *kernel = calloc(1, sizeof *kernel);
  const unsigned char *bytes = data;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(bytes + header->e_shoff);
  const char *names = (const char *)(bytes + sections[header->e_shstrndx].sh_offset);
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + sections[i].sh_name;
    const unsigned char *start = bytes + sections[i].sh_offset;
    if (!strncmp(name, ".nv.shared.", 11) && !strstr(name, "reserved")) kernel->shared = sections[i].sh_size;
    if (!strncmp(name, ".nv.info", 8)) read_attributes(kernel, start, start + sections[i].sh_size);
  }
  *module = (CUmodule)kernel;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Kernel *kernel = (Kernel *)module;
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const Kernel *kernel = (const Kernel *)function;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->stack; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = kernel->shared; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  ((Kernel *)function)->opt_in = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **given, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ, waits = 0;
  unsigned blocks = config->gridDimX * config->gridDimY * config->gridDimZ;
  unsigned dynamic = config->sharedMemBytes;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) waits = config->attrs[i].value.cooperative;
  unsigned registers = (kernel->registers + 7) / 8 * 8 * threads, at_once = THREADS / threads;
  if (registers && REGISTERS / registers < at_once) at_once = REGISTERS / registers;
  if (dynamic + kernel->shared && SHARED / (dynamic + kernel->shared) < at_once)
    at_once = SHARED / (dynamic + kernel->shared);
  int result = CUDA_SUCCESS;
  int too_much = kernel->opt_in ? dynamic > kernel->opt_in : dynamic + kernel->shared > SHARED_WITHOUT_OPT_IN;
  if (!result && too_much) result = CUDA_ERROR_INVALID_VALUE;
  if (!result && !at_once) result = CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  if (!result && waits && blocks > at_once * MULTIPROCESSORS) result = CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
  record("{\"event\": \"launch\", \"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"waits\": %u, ",
         kernel->name, config->gridDimX, config->gridDimY, config->gridDimZ, threads, waits);
  record("\"result\": %d, \"arguments\": [", result);
  for (int i = 0; i < kernel->parameters; i++) {
    uint64_t value = 0;
    memcpy(&value, given[i], kernel->size[i]);
    record("%s%llu", i ? ", " : "", (unsigned long long)value);
  }
  record("]}\n");
  return result;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  switch (error) {
    case CUDA_ERROR_INVALID_IMAGE: *text = "device kernel image is invalid"; break;
    case CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: *text = "too many blocks in cooperative launch"; break;
    default: *text = "another error";
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

// One card, one context, always current.
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}
