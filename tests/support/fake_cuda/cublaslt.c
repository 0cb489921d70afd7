// libcublasLt: as cublas.c.
#include <stdlib.h>
#include <string.h>

#include "counters.h"

#define HANDLE(name)     \
  int name(void** h) {   \
    *h = malloc(256);    \
    return 0;            \
  }
#define NOTHING(name) \
  int name() { return 0; }

HANDLE(cublasLtCreate)
HANDLE(cublasLtMatmulDescCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
HANDLE(cublasLtMatrixLayoutCreate)
HANDLE(cublasLtMatrixTransformDescCreate)
NOTHING(cublasLtDestroy)
NOTHING(cublasLtMatmulAlgoConfigSetAttribute)
NOTHING(cublasLtMatmulAlgoInit)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatrixTransformDescDestroy)

int cublasLtMatmul() {
  fake_launch("cublasLtMatmul");
  return 0;
}
int cublasLtMatrixTransform() {
  fake_launch("cublasLtMatrixTransform");
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void* h, void* d, void* a, void* b, void* c, void* e, void* p, int wanted,
                                   void* results, int* count) {
  memset(results, 0, 96);
  *count = 1;
  return 0;
}
