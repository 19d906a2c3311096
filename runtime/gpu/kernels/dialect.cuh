// What kernel sources may use, besides threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __shared__ (static),
// __threadfence, atomicAdd (int, unsigned), expf, rsqrtf, sqrtf, fmaxf, fminf, fabsf, __float_as_uint. One source
// compiles with NVRTC and nvcc for GPUs and, in tests, with g++ for the CPU (tests/cuda_on_cpu/cuda_on_cpu.h has the
// same words).
//
//     extern "C" __global__ void KERNEL(fill_f16)(half_t *out, int count, float value) { ... }
//
// Blocks are one-dimensional, a multiple of 32 threads. Arguments are pointers, int, long long and float. Warp functions
// are called by all 32 threads of a warp, none of which may have returned before.
#pragma once

#if defined(__CUDACC__)

#define KERNEL(name) name
#define DYNAMIC_SHARED extern __shared__ __align__(16) unsigned char dynamic_shared[]
#define DEVICE __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

struct half_t { unsigned short bits; };

DEVICE float to_float(half_t value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

DEVICE half_t half_from_float(float value) {
    half_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

constexpr unsigned ALL_LANES = 0xffffffffu;

// Another lane's value; of a lane outside 0..31 the own one (up, down), or that of lane % 32.
template <class T> DEVICE T warp_shuffle(T value, int lane) { return __shfl_sync(ALL_LANES, value, lane); }
template <class T> DEVICE T warp_shuffle_up(T value, int by) { return __shfl_up_sync(ALL_LANES, value, by); }
template <class T> DEVICE T warp_shuffle_down(T value, int by) { return __shfl_down_sync(ALL_LANES, value, by); }
template <class T> DEVICE T warp_shuffle_xor(T value, int mask) { return __shfl_xor_sync(ALL_LANES, value, mask); }

// Bit i is set where lane i's predicate is true.
DEVICE unsigned warp_ballot(bool predicate) { return __ballot_sync(ALL_LANES, predicate); }
// What lanes wrote to shared memory is seen by the others afterwards.
DEVICE void warp_sync() { __syncwarp(); }

// Every lane gets the same bits: a + b is b + a.
template <class T> DEVICE T warp_sum(T value) {
    for (int mask = 16; mask > 0; mask /= 2) value += warp_shuffle_xor(value, mask);
    return value;
}
template <class T> DEVICE T warp_max(T value) {
    for (int mask = 16; mask > 0; mask /= 2) {
        T other = warp_shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}
DEVICE unsigned warp_or(unsigned value) {
    for (int mask = 16; mask > 0; mask /= 2) value |= warp_shuffle_xor(value, mask);
    return value;
}

#else
#include "cuda_on_cpu.h"
#endif

DEVICE float to_float(float value) { return value; }
template <class T> DEVICE T from_float(float value);
template <> DEVICE float from_float<float>(float value) { return value; }
template <> DEVICE half_t from_float<half_t>(float value) { return half_from_float(value); }

// 16 bytes, one load or store; its address must be a multiple of 16.
struct alignas(16) Vec16 { unsigned int word[4]; };

// A load of what no other thread will want (weights): past the first cache, and not written by this kernel.
DEVICE Vec16 load_once(const Vec16 *from) {
#if defined(__CUDACC__)
    Vec16 value;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3]) : "l"(from));
    return value;
#else
    return *from;
#endif
}

// The 4 floats or 8 halves of a Vec16.
DEVICE void unpack(const Vec16 &from, float (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(from.word[i]);
}
DEVICE void unpack(const Vec16 &from, float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = to_float(half_t{(unsigned short)(from.word[i] & 0xffff)});
        to[2 * i + 1] = to_float(half_t{(unsigned short)(from.word[i] >> 16)});
    }
}
template <class T> struct Pack { static constexpr int count = 16 / sizeof(T); };  // elements in a Vec16
