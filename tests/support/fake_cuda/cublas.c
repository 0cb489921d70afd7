// libcublas: every product is a launch by the name of its function.
#include <stdlib.h>

#include "counters.h"

#define PRODUCT(name) \
  int name() {        \
    fake_launch(#name); \
    return 0;         \
  }
#define NOTHING(name) \
  int name() { return 0; }

PRODUCT(cublasDgeam)
PRODUCT(cublasDgemmBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgetrfBatched)
PRODUCT(cublasDgetriBatched)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasScopy_v2)
PRODUCT(cublasSgeam)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgetrfBatched)
PRODUCT(cublasSgetriBatched)
PRODUCT(cublasSscal_v2)
NOTHING(cublasDestroy_v2)
NOTHING(cublasSetStream_v2)

static int mode;
int cublasCreate_v2(void** h) {
  *h = malloc(256);
  return 0;
}
int cublasGetMathMode(void* h, int* m) {
  *m = mode;
  return 0;
}
int cublasSetMathMode(void* h, int m) {
  mode = m;
  return 0;
}
const char* cublasGetStatusName(int e) { return "an error of the fake library"; }
const char* cublasGetStatusString(int e) { return "an error of the fake library"; }
