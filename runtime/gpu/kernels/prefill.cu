// Many tokens at a time, between the matrix products of a library: what a layer does to whole rows.
#include "state.cuh"
#include "vectors.cuh"

// x [n] = from [n], in fp32.
template <class T>
DEVICE void widen(const T* from, float* x, long long n) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = to_float(from[i]);
}

// out [rows, n] = RMS norm of x [rows, n], rounded where the bundle's graphs round. A warp a row, which it reads twice:
// the second time it lies in the first cache.
template <class T>
DEVICE void norm_rows(const float* x, const T* gain, float epsilon, T* out, int rows, int n) {
  constexpr int width = Pack<T>::count;
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const float* from = x + (long long)row * n;
  float sum = 0.0f, value[width], g[width];
  for (int k = lane * 4; k < n; k += 128) {
    float four[4];
    load16(from + k, four);
#pragma unroll
    for (int e = 0; e < 4; e++) sum += four[e] * four[e];
  }
  float scale = 1.0f / sqrtf(warp_sum(sum) / n + epsilon);
  for (int k = lane * width; k < n; k += 32 * width) {
    load_floats(from + k, value), load16(gain + k, g);
#pragma unroll
    for (int e = 0; e < width; e++) value[e] = to_float(from_float<T>(value[e] * scale)) * g[e];
    store16(out + (long long)row * n + k, value);
  }
}

// turns [T, D]: for each token the cosines of its position and the D/2 RoPE frequencies, then the sines. A block a token.
extern "C" __global__ void KERNEL(turns)(const int* positions, const float* inverse, float* turns, int half) {
  for (int j = threadIdx.x; j < half; j += blockDim.x)
    turn_to(turns + (long long)blockIdx.x * 2 * half, positions[blockIdx.x], inverse, half, j);
}

// qkv [T, (H + 2 G) D]: adds the bias, turns queries in place, and stores turned keys and values in the slab, from
// `keys` and `values` on: `between` rows [G, D] are left out after the first `left`. A block a token.
template <class T>
DEVICE void rope_rows(T* qkv, const T* bias, const float* turns, T* keys, T* values, int heads, int groups, int dim,
                      int left, int between) {
  int half = dim / 2, turned = (heads + groups) * half, token = blockIdx.x;
  long long to_row = (long long)(token < left ? token : token + between) * groups * dim;
  T* row = qkv + (long long)token * (heads + 2 * groups) * dim;
  for (int i = threadIdx.x; i < turned; i += blockDim.x) {
    int h = i / half, j = i % half, at = h * dim + j;
    float a = to_float(row[at]) + to_float(bias[at]), b = to_float(row[at + half]) + to_float(bias[at + half]);
    float c = turns[(long long)token * dim + j], s = turns[(long long)token * dim + half + j];
    T* to = h < heads ? row + at : keys + to_row + (h - heads) * dim + j;
    to[0] = from_float<T>(a * c - b * s), to[half] = from_float<T>(b * c + a * s);
  }
  for (int i = threadIdx.x; i < groups * dim; i += blockDim.x) {
    int at = (heads + groups) * dim + i;
    values[to_row + i] = from_float<T>(to_float(row[at]) + to_float(bias[at]));
  }
}

// out [T, n] = silu(gate) * up of both [T, 2 n]. A thread 16 bytes, a row of blocks a token.
template <class T>
DEVICE void silu_rows(const T* both, T* out, int n) {
  constexpr int width = Pack<T>::count;
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * width;
  if (i >= n) return;
  const T* row = both + (long long)blockIdx.y * 2 * n + i;
  float gate[width], up[width];
  load16(row, gate), load16(row + n, up);
#pragma unroll
  for (int e = 0; e < width; e++) gate[e] = silu(gate[e]) * up[e];
  store16(out + (long long)blockIdx.y * n + i, gate);
}

#define PREFILL(T, suffix)                                                                                             \
  extern "C" __global__ void KERNEL(widen_##suffix)(const T* from, float* x, long long n) { widen(from, x, n); }       \
  extern "C" __global__ void KERNEL(norm_rows_##suffix)(const float* x, const T* gain, float epsilon, T* out,          \
                                                        int rows, int n) {                                             \
    norm_rows(x, gain, epsilon, out, rows, n);                                                                         \
  }                                                                                                                    \
  extern "C" __global__ void KERNEL(rope_rows_##suffix)(T* qkv, const T* bias, const float* turns, T* keys,            \
                                                        T* values, int heads, int groups, int dim, int left,           \
                                                        int between) {                                                 \
    rope_rows(qkv, bias, turns, keys, values, heads, groups, dim, left, between);                                      \
  }                                                                                                                    \
  extern "C" __global__ void KERNEL(silu_rows_##suffix)(const T* both, T* out, int n) { silu_rows(both, out, n); }

PREFILL(float, f32)
PREFILL(half_t, f16)
