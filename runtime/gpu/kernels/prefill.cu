// Many tokens at a time, between the matrix products of a library: what a layer does to whole rows.
#include "state.cuh"
#include "vectors.cuh"

// x [n] = from [n], in fp32.
template <class T>
DEVICE void widen(const T* from, float* x, long long n) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = to_float(from[i]);
}

// out [T, n] = RMS norm of x [T, n]; a block a row.
template <class T>
DEVICE void norm_rows(const float* x, const T* gain, float epsilon, T* out, int n) {
  normed(x + (long long)blockIdx.x * n, gain, n, epsilon, out + (long long)blockIdx.x * n);
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

// out [T, n] = silu(gate) * up of both [T, 2 n].
template <class T>
DEVICE void silu_rows(const T* both, T* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const T* row = both + (long long)blockIdx.y * 2 * n;
  out[(long long)blockIdx.y * n + i] = from_float<T>(silu(to_float(row[i])) * to_float(row[n + i]));
}

#define PREFILL(T, suffix)                                                                                             \
  extern "C" __global__ void KERNEL(widen_##suffix)(const T* from, float* x, long long n) { widen(from, x, n); }       \
  extern "C" __global__ void KERNEL(norm_rows_##suffix)(const float* x, const T* gain, float epsilon, T* out, int n) { \
    norm_rows(x, gain, epsilon, out, n);                                                                               \
  }                                                                                                                    \
  extern "C" __global__ void KERNEL(rope_rows_##suffix)(T* qkv, const T* bias, const float* turns, T* keys,            \
                                                        T* values, int heads, int groups, int dim, int left,           \
                                                        int between) {                                                 \
    rope_rows(qkv, bias, turns, keys, values, heads, groups, dim, left, between);                                      \
  }                                                                                                                    \
  extern "C" __global__ void KERNEL(silu_rows_##suffix)(const T* both, T* out, int n) { silu_rows(both, out, n); }

PREFILL(float, f32)
PREFILL(half_t, f16)
