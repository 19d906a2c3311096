// What kernel sources may use, besides threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __shared__ (static),
// __threadfence, atomicAdd (int, unsigned), expf, erff, tanhf, rsqrtf, sqrtf, fmaxf, fminf, fabsf, __float_as_uint. One source
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

// A load of what no other thread will want (weights): past the first cache, and not written by this kernel. Volatile, so
// that it is issued where it is written: before a barrier, to be on its way meanwhile.
DEVICE Vec16 load_once(const Vec16 *from) {
#if defined(__CUDACC__)
    Vec16 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3]) : "l"(from));
    return value;
#else
    return *from;
#endif
}

// Two halves in one word, the first in its lower part.
DEVICE unsigned pack_halves(float first, float second) {
#if defined(__CUDACC__)
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#else
    return half_from_float(first).bits | (unsigned)half_from_float(second).bits << 16;
#endif
}

// What other blocks of this launch have written: past the first cache, which may hold what was there before.
DEVICE Vec16 load_fresh(const Vec16 *from) {
#if defined(__CUDACC__)
    Vec16 value;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3]) : "l"(from));
    return value;
#else
    return *from;
#endif
}

// 2 to the power of x within 2^-22 of it, 0 below -126 (PTX ISA, ex2.approx.ftz).
DEVICE float exp2_near(float x) {
#if defined(__CUDACC__)
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// 16 bytes from global to shared memory, which nobody waits for: they are there for this thread once copies_wait says
// so, for others after a barrier too. `Left` groups, of those that copies_close ended, may still be on their way.
DEVICE void copy_begin(void *to, const void *from) {
#if defined(__CUDACC__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
        :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
    cuda_on_cpu::copies().begin(to, from, sizeof(Vec16));
#endif
}
DEVICE void copies_close() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    cuda_on_cpu::copies().close();
#endif
}
template <int Left> DEVICE void copies_wait() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" :: "n"(Left) : "memory");
#else
    cuda_on_cpu::copies().wait(Left);
#endif
}

// Four 8 x 8 matrices of halves in shared memory; lane 8 m + i says where row i of matrix m begins, in halves from
// `tile`, at a multiple of 8. With g and c as in mma a lane gets of each the elements 2c, 2c+1 of row g; turned, those
// of rows 2c, 2c+1 in column g (PTX ISA, ldmatrix).
template <bool Turned> DEVICE void load_matrices(unsigned (&to)[4], const half_t *tile, int at) {
#if defined(__CUDACC__)
    unsigned from = (unsigned)__cvta_generic_to_shared(tile + at);
    if (Turned)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
            : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
            : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
#else
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    for (int m = 0; m < 4; ++m) {
        int first = warp_shuffle(at, m * 8 + (Turned ? 2 * c : g)), second = warp_shuffle(at, m * 8 + (Turned ? 2 * c + 1 : g));
        half_t low = tile[Turned ? first + g : first + 2 * c], high = tile[Turned ? second + g : second + 2 * c + 1];
        to[m] = low.bits | (unsigned)high.bits << 16;
    }
#endif
}

// d [16, 8] += a [16, 16] b [16, 8] by a warp, halves with fp32 sums. With g = lane / 4 and c = lane % 4 a lane holds
// a: columns 2c, 2c+1 of rows g and g+8, then columns 2c+8, 2c+9 of both; b: rows 2c, 2c+1, then 2c+8, 2c+9, of column g;
// d: columns 2c, 2c+1 of row g, then of row g+8 (PTX ISA, mma.m16n8k16).
DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(__CUDACC__)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    auto low = [](unsigned word) { return to_float(half_t{(unsigned short)(word & 0xffff)}); };
    auto high = [](unsigned word) { return to_float(half_t{(unsigned short)(word >> 16)}); };
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    float rows[2][16], columns[2][16];
    for (int quad = 0; quad < 4; ++quad) {
        for (int part = 0; part < 4; ++part) {
            unsigned word = warp_shuffle(a[part], g * 4 + quad);
            int k = quad * 2 + part / 2 * 8;
            rows[part % 2][k] = low(word), rows[part % 2][k + 1] = high(word);
        }
        for (int part = 0; part < 2; ++part)
            for (int column = 0; column < 2; ++column) {
                unsigned word = warp_shuffle(b[part], (2 * c + column) * 4 + quad);
                int k = quad * 2 + part * 8;
                columns[column][k] = low(word), columns[column][k + 1] = high(word);
            }
    }
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) d[i] += rows[i / 2][k] * columns[i % 2][k];
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
