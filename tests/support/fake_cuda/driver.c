// libcuda without a GPU, as far as cuda-bindings and the plugins call it. Every call is a line in the log of
// runtime.c; a launch is counted there, and told with grid, block, shared memory, and arguments as the kernel would
// receive them.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "counters.h"

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500 };
enum { MAJOR = 75, MINOR = 76, MOST_SHARED = 101376, MOST_ARGUMENTS = 64 };

// Sizes of a kernel's parameters, in order, from its PTX: what a launch's argument pointers point to.
typedef struct {
  char name[128];
  int sizes[MOST_ARGUMENTS], count;
} Function;

static void note(const char* format, ...) {
  char line[4096];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  fake_note(line);
}

static void read_parameters(Function* f, const char* ptx) {
  const char* at = strstr(ptx, ".entry");
  const char* end = at ? strchr(at, ')') : NULL;
  f->count = 0;
  while (at && end && (at = strstr(at, ".param .")) && at < end && f->count < MOST_ARGUMENTS) {
    at += strlen(".param .");
    f->sizes[f->count++] = at[0] == 'u' || at[0] == 'b' || at[0] == 's' ? atoi(at + 1) / 8 : 0;
  }
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}
int cuDeviceGet(int* device, int number) {
  *device = number;
  return SUCCESS;
}
int cuDeviceGetName(char* name, int size, int device) {
  snprintf(name, size, "a device that computes nothing");
  return SUCCESS;
}
int cuGetProcAddress_v2(const char* symbol, void** f, int version, uint64_t flags, int* status) {
  void* self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW);
  *f = self ? dlsym(self, symbol) : NULL;
  if (status) *status = *f ? 0 : 1;
  return *f ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char* symbol, void** f, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, f, version, flags, NULL);
}
int cuCtxGetCurrent(void** context) {
  note("cuCtxGetCurrent");
  *context = (void*)0x1234;
  return SUCCESS;
}
int cuCtxGetDevice(int* device) {
  note("cuCtxGetDevice");
  *device = 0;
  return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  note("cuDeviceGetAttribute %d", attribute);
  *value = attribute == MAJOR ? 8 : attribute == MINOR ? 9 : 1;
  return SUCCESS;
}
int cuModuleLoadData(void** module, const void* image) {
  note("cuModuleLoadData %zu", strlen(image));
  *module = strdup(image);
  return SUCCESS;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  Function* f = calloc(1, sizeof *f);
  snprintf(f->name, sizeof f->name, "%s", name);
  read_parameters(f, module);
  *function = f;
  note("cuModuleGetFunction %s parameters %d", name, f->count);
  return SUCCESS;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  note("cuFuncSetAttribute %s %d %d", ((Function*)function)->name, attribute, value);
  return value > MOST_SHARED ? INVALID_VALUE : SUCCESS;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  Function* f = function;
  char line[4096];
  int used = snprintf(line, sizeof line, "%s grid %u %u %u block %u %u %u shared %u stream %p arguments", f->name, gx, gy,
                      gz, bx, by, bz, shared, stream);
  for (int i = 0; i < f->count && used < (int)sizeof line; i++) {
    char* end = line + used;
    size_t room = sizeof line - used;
    if (f->sizes[i] == 8) used += snprintf(end, room, " %#lx", *(unsigned long*)arguments[i]);
    else used += snprintf(end, room, " %d", *(int*)arguments[i]);
  }
  fake_launch(line);
  return SUCCESS;
}
int cuGetErrorName(int error, const char** name) {
  *name = "an error of the fake driver";
  return SUCCESS;
}

// What the CUDA provider of ONNX Runtime links to, and kernels for other GPUs would call.
int cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }
