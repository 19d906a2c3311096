// The words of runtime/gpu/kernels/dialect.cuh for g++. A block's threads are fibers that take turns at barriers and
// warp functions; blocks run one after another. Errors that a GPU would not forgive end the launch with a text.
#pragma once
#include <float.h>
#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef __global__  // the first pass, which looks for the kernels' names, keeps the word
#define __global__
#endif
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // the build moves them into a section of their own, to be made dirty before every block
#define KERNEL(name) name
#define DEVICE inline
#define DYNAMIC_SHARED unsigned char *const dynamic_shared = cuda_on_cpu::block.dynamic_shared
#define threadIdx (cuda_on_cpu::running->place)
#define blockIdx (cuda_on_cpu::block.index)
#define blockDim (cuda_on_cpu::block.threads)
#define gridDim (cuda_on_cpu::block.grid)
#define __syncthreads() cuda_on_cpu::block_barrier(__LINE__)

struct half_t { unsigned short bits; };

namespace cuda_on_cpu {

struct Three { unsigned int x, y, z; };
struct Fiber {  // one thread of a block; the rest of it is in fibers.cpp
    Three place;
    uint32_t given, got;  // what it brings to a warp function, and what it gets there
};
struct Block { Three index, grid, threads; unsigned char *dynamic_shared; };

extern Fiber *running;
extern Block block;

enum class Op { shuffle, ballot, sync, sum_float, sum_int, sum_unsigned, max_float, max_int, max_unsigned, bit_or };
void block_barrier(int line);
void warp_operation(Op op, int operand);

template <class T> T warp(Op op, T value, int operand = 0) {
    static_assert(sizeof(T) == 4, "warp functions take 4 bytes");
    std::memcpy(&running->given, &value, 4);
    warp_operation(op, operand);
    std::memcpy(&value, &running->got, 4);
    return value;
}
template <class T> constexpr Op of_type(Op first) {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
    return Op(int(first) + (std::is_same_v<T, float> ? 0 : std::is_same_v<T, int> ? 1 : 2));
}
inline int lane() { return int(running->place.x % 32); }

// A thread's copies to shared memory: as late as they may be, for then a kernel that does not wait for them is found out.
class Copies {
    struct Copy { void *to; const void *from; size_t size; };
    std::vector<std::vector<Copy>> groups_{1};  // the last one is open
public:
    void begin(void *to, const void *from, size_t size) { groups_.back().push_back({to, from, size}); }
    void close() { groups_.emplace_back(); }
    void wait(size_t left) {
        while (groups_.size() > left + 1) {
            for (const Copy &copy : groups_.front()) std::memcpy(copy.to, copy.from, copy.size);
            groups_.erase(groups_.begin());
        }
    }
};
inline Copies &copies() {
    static Copies of_thread[1024];
    return of_thread[running->place.x];
}

// What Python can call: the arguments as CUDA takes them, an array of pointers.
struct Kernel { const char *name; const char *signature; void (*call)(void **arguments); };
extern "C" const Kernel kernels[];
extern "C" __attribute__((visibility("default"))) const int kernel_count;

template <class T> constexpr char letter() {
    if (std::is_pointer_v<T>) return 'p';
    if (std::is_same_v<T, float>) return 'f';
    if (std::is_integral_v<T> && sizeof(T) == 4) return 'i';
    static_assert(std::is_pointer_v<T> || std::is_same_v<T, float> || (std::is_integral_v<T> && sizeof(T) >= 4),
                  "arguments are pointers, int, long long and float");
    return 'q';
}
template <class F, F function> struct Callable;
template <class... A, void (*function)(A...)> struct Callable<void (*)(A...), function> {
    static constexpr char signature[] = {letter<A>()..., 0};
    template <size_t... i> static void unpack(void **arguments, std::index_sequence<i...>) {
        function(*static_cast<A *>(arguments[i])...);
    }
    static void call(void **arguments) { unpack(arguments, std::index_sequence_for<A...>()); }
};
#define KERNEL_ENTRY(name) \
    {#name, cuda_on_cpu::Callable<decltype(&name), &name>::signature, cuda_on_cpu::Callable<decltype(&name), &name>::call}

}  // namespace cuda_on_cpu

template <class T> T warp_shuffle(T value, int lane) { return cuda_on_cpu::warp(cuda_on_cpu::Op::shuffle, value, lane & 31); }
template <class T> T warp_shuffle_xor(T value, int mask) {
    return cuda_on_cpu::warp(cuda_on_cpu::Op::shuffle, value, (cuda_on_cpu::lane() ^ mask) & 31);
}
template <class T> T warp_shuffle_up(T value, int by) {
    int from = cuda_on_cpu::lane() - by;
    return cuda_on_cpu::warp(cuda_on_cpu::Op::shuffle, value, from < 0 ? cuda_on_cpu::lane() : from);
}
template <class T> T warp_shuffle_down(T value, int by) {
    int from = cuda_on_cpu::lane() + by;
    return cuda_on_cpu::warp(cuda_on_cpu::Op::shuffle, value, from > 31 ? cuda_on_cpu::lane() : from);
}
inline unsigned warp_ballot(bool predicate) { return cuda_on_cpu::warp(cuda_on_cpu::Op::ballot, unsigned(predicate)); }
inline void warp_sync() { cuda_on_cpu::warp(cuda_on_cpu::Op::sync, 0u); }
inline unsigned warp_or(unsigned value) { return cuda_on_cpu::warp(cuda_on_cpu::Op::bit_or, value); }
template <class T> T warp_sum(T value) {
    return cuda_on_cpu::warp(cuda_on_cpu::of_type<T>(cuda_on_cpu::Op::sum_float), value);
}
template <class T> T warp_max(T value) {
    return cuda_on_cpu::warp(cuda_on_cpu::of_type<T>(cuda_on_cpu::Op::max_float), value);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
// One thread runs at a time.
template <class T> T atomicAdd(T *at, T value) { T old = *at; *at = old + value; return old; }
template <class T> T atomicMax(T *at, T value) { T old = *at; *at = value > old ? value : old; return old; }
template <class T> T atomicExch(T *at, T value) { T old = *at; *at = value; return old; }

template <class To, class From> To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return bits_as<int>(value); }
inline float __uint_as_float(unsigned value) { return bits_as<float>(value); }
inline float __int_as_float(int value) { return bits_as<float>(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
inline int __ffs(int value) { return __builtin_ffs(value); }
template <class T> T __ldg(const T *from) { return *from; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }

inline float to_float(half_t value) {
    unsigned sign = unsigned(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) {  // inf stays, nan becomes quiet as cvt makes it
        unsigned fraction = magnitude & 0x3ff;
        return __uint_as_float(sign | 0x7f800000 | (fraction ? 0x400000 | fraction << 13 : 0));
    }
    if (magnitude < 0x400) return __uint_as_float(sign | __float_as_uint(float(magnitude) * 0x1p-24f));
    return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));
}

inline half_t half_from_float(float value) {  // to nearest, ties to even
    unsigned bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff, half;
    if (magnitude > 0x7f800000) half = 0x7fff;  // nan
    else if (magnitude >= 0x477ff000) half = 0x7c00;  // 65520 and more: inf
    else if (magnitude < 0x38800000)  // below the smallest normal: adding 0.5 rounds at the last place of a subnormal
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
    else half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    return half_t{(unsigned short)(sign | half)};
}
