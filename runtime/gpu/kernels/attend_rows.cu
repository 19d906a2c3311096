// Attention of new tokens over the cache and themselves.
#include "flash.cuh"

// qkv [T, width]: queries [H, D] first, turned and scaled. keys, values: the first visible row [G, D] of a layer's slab;
// bias: of the same row on, or null.
// context [T, H, D]. A block a head (x) and some tokens (y), those that see most first: what is begun last is short.
template <class T>
DEVICE Attention<T> rows_of_head(const T* qkv, const T* keys, const T* values, const float* bias, T* context, int width,
                                 int tokens, int columns, int left, int heads, int groups, int dim) {
  int head = blockIdx.x, group = head / (heads / groups);
  Attention<T> a = {qkv + head * dim, keys + group * dim, values + group * dim, bias, context + head * dim,
                    width, groups * dim, heads * dim, tokens, columns, left, dim, 1.0f};
  return a;
}

#define ATTEND_ROWS(T, suffix, D, attend)                                                                              \
  extern "C" __global__ void KERNEL(attend_rows_##suffix##_##D)(const T* qkv, const T* keys, const T* values,         \
                                                                const float* bias, T* context, int width, int tokens,  \
                                                                int columns, int left, int heads, int groups) {        \
    attend<D, true>(rows_of_head(qkv, keys, values, bias, context, width, tokens, columns, left, heads, groups, D),    \
                    gridDim.y - 1 - blockIdx.y);                                                                       \
  }

ATTEND_ROWS(float, f32, 32, attend_floats)
ATTEND_ROWS(float, f32, 64, attend_floats)
ATTEND_ROWS(float, f32, 128, attend_floats)
ATTEND_ROWS(half_t, f16, 32, attend_halves)
ATTEND_ROWS(half_t, f16, 64, attend_halves)
ATTEND_ROWS(half_t, f16, 128, attend_halves)
