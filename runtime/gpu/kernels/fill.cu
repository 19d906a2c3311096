// A value in every element. Grid and block cover `count` elements, one a thread.
#include "dialect.cuh"

template <class T> DEVICE void fill(T *out, int count, float value) {
    int at = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (at < count) out[at] = from_float<T>(value);
}

extern "C" __global__ void KERNEL(fill_f32)(float *out, int count, float value) { fill(out, count, value); }
extern "C" __global__ void KERNEL(fill_f16)(half_t *out, int count, float value) { fill(out, count, value); }
