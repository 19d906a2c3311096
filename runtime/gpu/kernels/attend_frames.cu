// Attention of a vision tower: the patches of a frame to each other.
#include "flash.cuh"

// qkv [F, S, 3, H, dim] -> context [F, S, H, dim]. A block some patches (x) of a head (y) of a frame (z).
template <class T>
DEVICE Attention<T> head_of_frame(const T* qkv, T* context, int patches, int heads, int dim, float scale) {
  int wide = heads * dim, head = blockIdx.y * dim;
  long long begin = (long long)blockIdx.z * patches;
  const T* queries = qkv + begin * 3 * wide + head;
  Attention<T> a = {queries, queries + wide, queries + 2 * wide, nullptr, context + begin * wide + head, 3 * wide,
                    3 * wide, wide, patches, patches, 0, dim, scale};
  return a;
}

#define ATTEND_FRAMES(T, suffix, D, attend)                                                                           \
  extern "C" __global__ void KERNEL(attend_frames_##suffix##_##D)(const T* qkv, T* context, int patches, int heads,   \
                                                                  int dim, float scale) {                             \
    attend<D, false>(head_of_frame(qkv, context, patches, heads, dim, scale), blockIdx.x);                            \
  }

ATTEND_FRAMES(float, f32, 128, attend_floats)
ATTEND_FRAMES(half_t, f16, 32, attend_halves)
ATTEND_FRAMES(half_t, f16, 48, attend_halves)
ATTEND_FRAMES(half_t, f16, 64, attend_halves)
ATTEND_FRAMES(half_t, f16, 72, attend_halves)
ATTEND_FRAMES(half_t, f16, 128, attend_halves)
