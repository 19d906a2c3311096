// A libcublasLt without a GPU: column-major as cuBLAS is, loops as the textbook has them, on the streams of libcuda.cpp.
// It knows what the runtime uses and refuses everything else.
#include "cuda_on_cpu.h"
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Epilogue { DEFAULT = 1, BIAS = 4, GELU_BIAS = 36 };
constexpr size_t WORKSPACE = 32 << 20;
struct Handle { int alive; };
struct Work { int compute, scale, transpose_a; uint32_t epilogue; char *bias; };
struct Layout { int type; uint64_t rows, columns; int64_t ld; };
struct Preference { uint64_t workspace; uint32_t reductions, alignments[4]; };
struct Algorithm { uint64_t data[8]; };
struct Found { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };
struct Product { Work work; float alpha, beta; Layout a, b, d; char *left, *right, *c, *out; };

float read(const char *start, int type, long long at) {
    if (type == 0) return reinterpret_cast<const float *>(start)[at];
    return to_float(reinterpret_cast<const half_t *>(start)[at]);
}
void write(char *start, int type, long long at, float value) {
    if (type == 0) reinterpret_cast<float *>(start)[at] = value;
    else reinterpret_cast<half_t *>(start)[at] = half_from_float(value);
}

void multiply(void *data) {
    Product *p = static_cast<Product *>(data);
    for (uint64_t row = 0; row < p->d.rows; ++row)
        for (uint64_t column = 0; column < p->d.columns; ++column) {
            float sum = 0;
            for (uint64_t i = 0; i < p->a.rows; ++i)
                sum += read(p->left, p->a.type, i + row * p->a.ld) * read(p->right, p->b.type, i + column * p->b.ld);
            long long at = row + column * p->d.ld;
            sum = p->alpha * sum + (p->beta ? p->beta * read(p->c, p->d.type, at) : 0);
            if (p->work.epilogue != DEFAULT) sum += read(p->work.bias, p->d.type, row);
            if (p->work.epilogue == GELU_BIAS)
                sum = 0.5f * sum * (1 + std::tanh(0.797884561f * (sum + 0.044715f * sum * sum * sum)));
            write(p->out, p->d.type, at, sum);
        }
}  // not freed: a graph may do it again

bool fit(const Work *work, const Layout *a, const Layout *b, const Layout *d) {
    bool types = a->type == b->type && ((a->type == 2 && (d->type == 2 || d->type == 0)) || (a->type == 0 && d->type == 0));
    bool shapes = a->rows == b->rows && d->rows == a->columns && d->columns == b->columns;
    return types && shapes && work->compute == 68 && work->scale == 0 && work->transpose_a == 1;
}

uint32_t alignment(const void *pointer) {
    auto address = reinterpret_cast<uintptr_t>(pointer);
    return uint32_t(address & -address & 511);
}

}  // namespace

extern "C" int cpu_add_work(void *stream, void (*work)(void *), void *data);

#define CALL extern "C" __attribute__((visibility("default"))) int

CALL cublasLtCreate(Handle **handle) { *handle = new Handle{1}; return SUCCESS; }
CALL cublasLtDestroy(Handle *handle) { delete handle; return SUCCESS; }
CALL cublasLtMatmulDescCreate(Work **work, int compute, int scale) {
    *work = new Work{compute, scale, 0, DEFAULT, nullptr};
    return SUCCESS;
}
CALL cublasLtMatmulDescDestroy(Work *work) { delete work; return SUCCESS; }
CALL cublasLtMatmulDescSetAttribute(Work *work, int attribute, const void *value, size_t bytes) {
    if (attribute == 3 && bytes == 4) std::memcpy(&work->transpose_a, value, bytes);
    else if (attribute == 7 && bytes == 4) std::memcpy(&work->epilogue, value, bytes);
    else if (attribute == 8 && bytes == 8) std::memcpy(&work->bias, value, bytes);
    else return INVALID_VALUE;
    bool known = work->epilogue == DEFAULT || work->epilogue == BIAS || work->epilogue == GELU_BIAS;
    return known ? SUCCESS : NOT_SUPPORTED;
}
CALL cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    if (!rows || !columns || ld < int64_t(rows)) return INVALID_VALUE;
    *layout = new Layout{type, rows, columns, ld};
    return SUCCESS;
}
CALL cublasLtMatrixLayoutDestroy(Layout *layout) { delete layout; return SUCCESS; }
CALL cublasLtMatmulPreferenceCreate(Preference **preference) {
    *preference = new Preference{0, 7, {256, 256, 256, 256}};
    return SUCCESS;
}
CALL cublasLtMatmulPreferenceDestroy(Preference *preference) { delete preference; return SUCCESS; }
CALL cublasLtMatmulPreferenceSetAttribute(Preference *preference, int attribute, const void *value, size_t bytes) {
    if (attribute == 1 && bytes == 8) std::memcpy(&preference->workspace, value, bytes);
    else if (attribute == 3 && bytes == 4) std::memcpy(&preference->reductions, value, bytes);
    else if (attribute >= 5 && attribute <= 8 && bytes == 4) std::memcpy(preference->alignments + attribute - 5, value, bytes);
    else return INVALID_VALUE;
    return SUCCESS;
}
CALL cublasLtMatmulAlgoGetHeuristic(Handle *handle, Work *work, Layout *a, Layout *b, Layout *c, Layout *d,
                                    Preference *preference, int requested, Found *found, int *count) {
    if (!handle->alive || requested != 1 || c != d || !fit(work, a, b, d)) return NOT_SUPPORTED;
    if (preference->workspace != WORKSPACE || preference->reductions != 2) return NOT_SUPPORTED;
    if (work->epilogue != DEFAULT && !work->bias) return INVALID_VALUE;
    *found = Found{{{work->epilogue, d->rows, d->columns}}, 0, 0, 1.0f, {}};
    for (int i = 0; i < 4; ++i) found->algorithm.data[3 + i] = preference->alignments[i];
    found->algorithm.data[7] = alignment(work->bias);
    *count = 1;
    return SUCCESS;
}
CALL cublasLtMatmul(Handle *handle, Work *work, const float *alpha, char *left, Layout *a, char *right, Layout *b,
                    const float *beta, char *c, Layout *c_layout, char *out, Layout *d, const Algorithm *algorithm,
                    void *workspace, size_t workspace_bytes, void *stream) {
    if (!handle->alive || c_layout != d || c != out || !fit(work, a, b, d)) return NOT_SUPPORTED;
    if (!workspace || workspace_bytes != WORKSPACE) return NOT_SUPPORTED;
    const uint64_t *made = algorithm->data;
    if (made[0] != work->epilogue || made[1] != d->rows || made[2] != d->columns) return INVALID_VALUE;
    const void *pointers[5] = {left, right, c, out, work->bias};
    for (int i = 0; i < 5; ++i)
        if (uint32_t has = alignment(pointers[i]); has && has < made[3 + i]) return INVALID_VALUE;
    Product product{*work, *alpha, *beta, *a, *b, *d, left, right, c, out};
    return cpu_add_work(stream, multiply, new Product(product)) ? EXECUTION_FAILED : SUCCESS;
}
