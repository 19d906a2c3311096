// A libcublas without a GPU: column-major as cuBLAS is, loops as the textbook has them, on the streams of libcuda.cpp.
#include "cuda_on_cpu.h"

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
struct Handle { void *stream, *workspace; size_t workspace_bytes; int math_mode; };
struct Matrix { char *start; int type, ld; };
struct Product { int transpose_a, transpose_b, m, n, k; float alpha, beta; Matrix a, b, c; };

float read(const Matrix &matrix, long long at) {
    if (matrix.type == 0) return reinterpret_cast<float *>(matrix.start)[at];
    return to_float(reinterpret_cast<half_t *>(matrix.start)[at]);
}
void write(const Matrix &matrix, long long at, float value) {
    if (matrix.type == 0) reinterpret_cast<float *>(matrix.start)[at] = value;
    else reinterpret_cast<half_t *>(matrix.start)[at] = half_from_float(value);
}

void multiply(void *data) {
    Product *p = static_cast<Product *>(data);
    for (long long row = 0; row < p->m; ++row)
        for (long long column = 0; column < p->n; ++column) {
            float sum = 0;
            for (long long i = 0; i < p->k; ++i)
                sum += read(p->a, p->transpose_a ? i + row * p->a.ld : row + i * p->a.ld) *
                       read(p->b, p->transpose_b ? column + i * p->b.ld : i + column * p->b.ld);
            long long at = row + column * p->c.ld;
            float before = p->beta ? p->beta * read(p->c, at) : 0;
            write(p->c, at, p->alpha * sum + before);
        }
}  // not freed: a graph may do it again

}  // namespace

extern "C" int cpu_add_work(void *stream, void (*work)(void *), void *data);

#define CALL extern "C" __attribute__((visibility("default"))) int

CALL cublasCreate_v2(Handle **handle) { *handle = new Handle{}; return SUCCESS; }
CALL cublasDestroy_v2(Handle *handle) { delete handle; return SUCCESS; }
CALL cublasSetStream_v2(Handle *handle, void *stream) {
    handle->stream = stream, handle->workspace = nullptr, handle->workspace_bytes = 0;
    return SUCCESS;
}
CALL cublasSetWorkspace_v2(Handle *handle, void *workspace, size_t bytes) {
    handle->workspace = workspace, handle->workspace_bytes = bytes;
    return SUCCESS;
}
CALL cublasSetMathMode(Handle *handle, int mode) { handle->math_mode = mode; return SUCCESS; }
CALL cublasGemmEx(Handle *handle, int transpose_a, int transpose_b, int m, int n, int k, const float *alpha, char *a,
                  int a_type, int lda, char *b, int b_type, int ldb, const float *beta, char *c, int c_type, int ldc,
                  int compute, int algorithm) {
    bool types = a_type == b_type && ((a_type == 2 && (c_type == 2 || c_type == 0)) || (a_type == 0 && c_type == 0));
    if (!types || compute != 68 || algorithm != -1) return NOT_SUPPORTED;
    if (handle->math_mode != 16 || handle->workspace_bytes != 32 << 20 || !handle->workspace) return NOT_SUPPORTED;
    if (lda < (transpose_a ? k : m) || ldb < (transpose_b ? n : k) || ldc < m) return INVALID_VALUE;
    Product product{transpose_a, transpose_b, m, n, k, *alpha, *beta, {a, a_type, lda}, {b, b_type, ldb}, {c, c_type, ldc}};
    return cpu_add_work(handle->stream, multiply, new Product(product)) ? EXECUTION_FAILED : SUCCESS;
}
