// libcudart without a GPU, as far as the CUDA provider of onnxruntime-gpu calls it. Memory is the host's and copies
// are real; kernels do nothing. Launches, copies, synchronisations and allocations are counted, and logged by name
// where a log is open. There are two devices, so that the wrong one can be noticed.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "counters.h"

#define EXPORT __attribute__((visibility("default")))
#define DEVICES 2
#define MOST_BLOCKS 65536
#define MOST_KERNELS 200000

static Counters counters;
static FILE* log_file;
static void (*observer)(const char* name);
static _Thread_local int current;

EXPORT Counters* fake_counters(void) { return &counters; }

EXPORT void fake_log(const char* path) {
  if (log_file) fclose(log_file);
  log_file = path ? fopen(path, "w") : NULL;
}

EXPORT void fake_observe(void (*call)(const char* name)) { observer = call; }

EXPORT void fake_note(const char* line) {
  if (log_file) fprintf(log_file, "%s\n", line);
}

EXPORT void fake_launch(const char* name) {
  counters.launches++;
  if (observer) observer(name);
  if (log_file) fprintf(log_file, "launch %s\n", name);
}

// -- memory -----------------------------------------------------------------------------------------------------------
static struct {
  char* start;
  size_t bytes;
  int device;
} blocks[MOST_BLOCKS];
static int block_count;

static int block_of(const void* place) {
  for (int i = block_count - 1; i >= 0; i--)
    if ((char*)place >= blocks[i].start && (char*)place < blocks[i].start + blocks[i].bytes) return i;
  return -1;
}

// The device whose memory holds `place`, -1 for the host's.
EXPORT int fake_device_of(const void* place) {
  int i = block_of(place);
  return i < 0 ? -1 : blocks[i].device;
}

EXPORT long fake_allocated(int device) {
  long sum = 0;
  for (int i = 0; i < block_count; i++)
    if (blocks[i].device == device) sum += blocks[i].bytes;
  return sum;
}

static cudaError_t take(void** place, size_t bytes) {
  if (block_count == MOST_BLOCKS) return cudaErrorMemoryAllocation;
  *place = aligned_alloc(256, (bytes + 511) / 256 * 256);
  if (!*place) return cudaErrorMemoryAllocation;
  // What a device holds before it is written is anything: here numbers that are finite, as logits have to be.
  memset(*place, 0, bytes);
  counters.allocations++;
  counters.allocated_bytes += bytes;
  blocks[block_count].start = *place;
  blocks[block_count].bytes = bytes ? bytes : 1;
  blocks[block_count++].device = current;
  if (log_file) fprintf(log_file, "allocate %zu on %d\n", bytes, current);
  return cudaSuccess;
}

static cudaError_t give(void* place) {
  if (!place) return cudaSuccess;
  int i = block_of(place);
  if (i < 0) return cudaErrorInvalidValue;
  blocks[i] = blocks[--block_count];
  counters.frees++;
  free(place);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t n) { return take(p, n); }
cudaError_t cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t pool, cudaStream_t s) { return take(p, n); }
cudaError_t cudaFree(void* p) { return give(p); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t s) { return give(p); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned flags) {
  *p = aligned_alloc(256, (n + 511) / 256 * 256);
  counters.pinned++;
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
cudaError_t cudaFreeHost(void* p) {
  free(p);
  return cudaSuccess;
}

static void count_copy(const void* to, const void* from, size_t bytes) {
  int there = block_of(to) >= 0, here = block_of(from) >= 0;
  const char* kind = there && here ? "d2d" : there ? "h2d" : here ? "d2h" : "h2h";
  if (there && here) counters.d2d++, counters.d2d_bytes += bytes;
  else if (there) counters.h2d++, counters.h2d_bytes += bytes;
  else if (here) counters.d2h++, counters.d2h_bytes += bytes;
  if (log_file) fprintf(log_file, "%s %zu\n", kind, bytes);
}

static cudaError_t copy(void* to, const void* from, size_t bytes) {
  count_copy(to, from, bytes);
  memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* d, const void* s, size_t n, enum cudaMemcpyKind k) { return copy(d, s, n); }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
  return copy(d, s, n);
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t width, size_t rows,
                              enum cudaMemcpyKind k, cudaStream_t t) {
  count_copy(d, s, width * rows);
  for (size_t i = 0; i < rows; i++) memmove((char*)d + i * dp, (const char*)s + i * sp, width);
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void* d, const void* s, size_t n, size_t offset, enum cudaMemcpyKind k) {
  memset(d, 0, n);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t n) {
  memset(p, value, n);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t s) { return cudaMemset(p, value, n); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = (size_t)24 << 30;
  *available = *total - fake_allocated(current);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  int device = fake_device_of(p);
  a->type = device >= 0 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->device = device >= 0 ? device : 0;
  a->devicePointer = (void*)p;
  return cudaSuccess;
}

// -- devices ----------------------------------------------------------------------------------------------------------
cudaError_t cudaGetDeviceCount(int* count) {
  *count = DEVICES;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "a device that computes nothing");
  p->major = 8, p->minor = 9, p->multiProcessorCount = 128, p->warpSize = 32;
  p->totalGlobalMem = (size_t)24 << 30, p->l2CacheSize = 72 << 20;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 1536;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 101376, p->sharedMemPerMultiprocessor = 102400;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 128; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 101376; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 102400; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 1536; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

// -- streams, events, graphs ------------------------------------------------------------------------------------------
static cudaError_t handle(void** h) {
  *h = malloc(64);
  return cudaSuccess;
}
static cudaError_t drop(void* h) {
  free(h);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  counters.syncs++;
  if (log_file) fprintf(log_file, "sync device\n");
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  counters.syncs++;
  if (log_file) fprintf(log_file, "sync stream\n");
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return handle((void**)s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { return handle((void**)s); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return drop(s); }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) { return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) { return handle((void**)graph); }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return handle((void**)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) { return handle((void**)e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return drop(e); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  counters.event_syncs++;
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long flags) {
  return handle((void**)e);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t g) { return drop(g); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { return drop(e); }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void* data) {
  call(data);
  return cudaSuccess;
}

// -- memory pools: one that keeps nothing -------------------------------------------------------------------------------
cudaError_t cudaMemPoolCreate(cudaMemPool_t* p, const struct cudaMemPoolProps* props) { return handle((void**)p); }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t p) { return drop(p); }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void* value) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void* value) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t p, size_t keep) { return cudaSuccess; }

// -- kernels: registered by name when the provider is loaded -----------------------------------------------------------
static struct {
  const void* stub;
  const char* name;
} kernels[MOST_KERNELS];
static int kernel_count;

void** __cudaRegisterFatBinary(void* code) {
  static void* handles[2];
  return handles;
}
void __cudaRegisterFatBinaryEnd(void** h) {}
void __cudaUnregisterFatBinary(void** h) {}
void __cudaRegisterVar(void** h, char* a, char* b, const char* c, int d, size_t e, int f, int g) {}
void __cudaRegisterFunction(void** h, const char* stub, char* device, const char* name, int limit, void* a, void* b,
                            void* c, void* d, int* e) {
  if (kernel_count == MOST_KERNELS) return;
  kernels[kernel_count].stub = stub;
  kernels[kernel_count++].name = name;
}
static cudaError_t launch(const void* stub) {
  const char* name = "unnamed";
  for (int i = 0; i < kernel_count; i++)
    if (kernels[i].stub == stub) name = kernels[i].name;
  fake_launch(name);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t n, cudaStream_t s) { return launch(f); }
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** a, size_t n, cudaStream_t s) {
  return launch(f);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) { return launch(f); }
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void** a, size_t n, cudaStream_t s) {
  return launch(f);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = (cudaKernel_t)stub;
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t n, void* s) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* n, void* s) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute a, int value) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks_, const void* f, int threads, size_t n,
                                                                   unsigned flags) {
  *blocks_ = 2;
  return cudaSuccess;
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t k, enum cudaFuncAttribute a, int value, int device) {
  return cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t* l, const void* code, enum cudaJitOption* o, void** v, unsigned n,
                                enum cudaLibraryOption* lo, void** lv, unsigned ln) {
  return handle((void**)l);
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* k, cudaLibrary_t l, const char* name) { return handle((void**)k); }
cudaError_t cudaLibraryUnload(cudaLibrary_t l) { return drop(l); }
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult* result) {
  *f = NULL;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// -- errors: there are none --------------------------------------------------------------------------------------------
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t e) { return "an error of the fake runtime"; }
const char* cudaGetErrorString(cudaError_t e) { return "an error of the fake runtime"; }
