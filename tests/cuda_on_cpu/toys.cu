// Small kernels that try what kernels may do, and what they must not.
#include "dialect.cuh"

// Every warp function, of each lane's value.
extern "C" __global__ void KERNEL(warps)(const float *in, float *sum, float *most, unsigned *bits, float *moved) {
    int at = int(blockIdx.x * blockDim.x + threadIdx.x), lane = int(threadIdx.x % 32);
    float value = in[at];
    sum[at] = warp_sum(value);
    most[at] = warp_max(value);
    bits[2 * at] = warp_ballot(value > 0);
    bits[2 * at + 1] = warp_or(1u << (lane / 4));
    moved[4 * at] = warp_shuffle(value, (lane * 7) % 32);
    moved[4 * at + 1] = warp_shuffle_up(value, 3);
    moved[4 * at + 2] = warp_shuffle_down(value, 5);
    moved[4 * at + 3] = warp_shuffle_xor(value, 9);
}

// The sum of a row a block, through static shared memory; threads beyond the row have returned before the barrier.
template <class T> DEVICE void sum_row(const T *in, T *out, int width) {
    __shared__ T parts[32];
    int at = int(threadIdx.x);
    if (at >= width) return;
    T value = warp_sum(in[int(blockIdx.x) * width + at]);
    if (at % 32 == 0) parts[at / 32] = value;
    __syncthreads();
    if (at) return;
    T total = 0;
    for (int i = 0; i < width / 32; ++i) total += parts[i];
    out[blockIdx.x] = total;
}
extern "C" __global__ void KERNEL(sum_f32)(const float *in, float *out, int width) { sum_row(in, out, width); }
extern "C" __global__ void KERNEL(sum_i32)(const int *in, int *out, int width) { sum_row(in, out, width); }

// Turns a block's values around in dynamic shared memory, twice, so that a barrier is passed more than once.
extern "C" __global__ void KERNEL(turn)(float *values, int times) {
    DYNAMIC_SHARED;
    float *shared = reinterpret_cast<float *>(dynamic_shared);
    int at = int(threadIdx.x), last = int(blockDim.x) - 1;
    float *mine = values + blockIdx.x * blockDim.x + at;
    for (int i = 0; i < times; ++i) {
        shared[at] = *mine;
        __syncthreads();
        *mine = shared[last - at];
        __syncthreads();
    }
}

// As turn, once, without the barrier.
extern "C" __global__ void KERNEL(race)(float *values) {
    DYNAMIC_SHARED;
    float *shared = reinterpret_cast<float *>(dynamic_shared);
    shared[threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// The last block to come adds up what the blocks before it left.
extern "C" __global__ void KERNEL(last_block)(int *parts, int *count, int *out) {
    if (threadIdx.x) return;
    parts[blockIdx.x] = int(blockIdx.x) + 1;
    __threadfence();
    if (atomicAdd(count, 1) != int(gridDim.x) - 1) return;
    int total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];
    *out = total;
}

extern "C" __global__ void KERNEL(to_halves)(const float *in, half_t *out, long long count) {
    long long at = (long long)(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) out[at] = from_float<half_t>(in[at]);
}
extern "C" __global__ void KERNEL(to_floats)(const half_t *in, float *out, long long count) {
    long long at = (long long)(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) out[at] = to_float(in[at]);
}

// 16 bytes a thread, unpacked.
extern "C" __global__ void KERNEL(unpack_f32)(const Vec16 *in, float *out) {
    float values[4];
    unpack(load_once(in + threadIdx.x), values);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = values[i];
}
extern "C" __global__ void KERNEL(unpack_f16)(const Vec16 *in, float *out) {
    float values[8];
    unpack(load_once(in + threadIdx.x), values);
    for (int i = 0; i < 8; ++i) out[threadIdx.x * 8 + i] = values[i];
}

// The place in the grid that each thread sees.
extern "C" __global__ void KERNEL(places)(int *out) {
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[block * blockDim.x + threadIdx.x] = int(block * 1000 + threadIdx.x);
}

// What a GPU does not forgive.
extern "C" __global__ void KERNEL(half_a_warp)(float *values) {
    if (threadIdx.x % 2) return;
    values[threadIdx.x] = warp_sum(1.0f);
}
extern "C" __global__ void KERNEL(two_barriers)(int *values) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        values[0] = 1;
        __syncthreads();
    }
}
extern "C" __global__ void KERNEL(never)(float *values) {
    if (threadIdx.x < 32 || threadIdx.x % 32 == 31) __syncthreads();
    else values[threadIdx.x] = warp_sum(1.0f);
}
extern "C" __global__ void KERNEL(two_functions)(float *values) {
    values[threadIdx.x] = threadIdx.x % 2 ? warp_sum(1.0f) : warp_max(1.0f);
}
extern "C" __global__ void KERNEL(past_an_array)(int *values, int at) {
    __shared__ int shared[32];
    shared[threadIdx.x] = 0;
    __syncthreads();
    values[0] = shared[at];
}
