// Merge, the paper's stage 1: which tokens of a frame repeat those of its anchor, and the others brought together.
#include "state.cuh"
#include "vectors.cuh"

// similarity [F, N]: cosine of each token with the one at its place in the frame's anchor, number anchor[frame] of
// `references`; nothing for frames without one (-1). tokens, references [.., N, width]. A warp a token.
template <class T>
DEVICE void similarity(const T* tokens, const T* references, const int* anchor, float* out, int frames, int per_frame,
                       int width) {
  constexpr int step = Pack<T>::count;
  int unit = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, frame = unit / per_frame;
  if (frame >= frames || anchor[frame] < 0) return;
  const T* b = tokens + (long long)unit * width;
  const T* a = references + ((long long)anchor[frame] * per_frame + unit % per_frame) * width;
  float dot = 0.0f, a2 = 0.0f, b2 = 0.0f;
  for (int k = lane * step; k < width; k += 32 * step) {
    float x[step], y[step];
    load16(a + k, x), load16(b + k, y);
#pragma unroll
    for (int e = 0; e < step; e++) dot += x[e] * y[e], a2 += x[e] * x[e], b2 += y[e] * y[e];
  }
  dot = warp_sum(dot), a2 = warp_sum(a2), b2 = warp_sum(b2);
  if (lane == 0) out[unit] = dot / fmaxf(sqrtf(a2) * sqrtf(b2), 1.17549435e-38f);
}

// index: the flat places of each frame's kept tokens, from start[frame] on, in raster order: all of a frame without an
// anchor, else the `kept` least similar, of equals the lower. A block a frame, a thread a token.
extern "C" __global__ void KERNEL(least_similar)(const float* similarity, const int* anchor, const int* start, int* index,
                                                 int per_frame, int kept) {
  __shared__ float own[1024];
  __shared__ int stays[1024];
  int frame = blockIdx.x, i = threadIdx.x, rank = 0, place = 0;
  bool whole = anchor[frame] < 0;
  if (i < per_frame) own[i] = whole ? 0.0f : similarity[frame * per_frame + i];
  __syncthreads();
  if (i < per_frame) {
    for (int j = 0; j < per_frame; j++) rank += own[j] < own[i] || (own[j] == own[i] && j < i);
    stays[i] = whole || rank < kept;
  }
  __syncthreads();
  if (i >= per_frame || !stays[i]) return;
  for (int j = 0; j < i; j++) place += stays[j];
  index[start[frame] + place] = frame * per_frame + i;
}

// out [rows, width] = tokens [.., width] at index [rows]. A warp a row.
template <class T>
DEVICE void gather(const T* tokens, const int* index, T* out, int rows, int width) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const Vec16* from = reinterpret_cast<const Vec16*>(tokens + (long long)index[row] * width);
  Vec16* to = reinterpret_cast<Vec16*>(out + (long long)row * width);
  for (int i = threadIdx.x % 32; i < width / Pack<T>::count; i += 32) to[i] = from[i];
}

#define MERGE(T, suffix)                                                                                             \
  extern "C" __global__ void KERNEL(similarity_##suffix)(const T* tokens, const T* references, const int* anchor,     \
                                                         float* out, int frames, int per_frame, int width) {          \
    similarity(tokens, references, anchor, out, frames, per_frame, width);                                            \
  }                                                                                                                   \
  extern "C" __global__ void KERNEL(gather_##suffix)(const T* tokens, const int* index, T* out, int rows,             \
                                                     int width) {                                                     \
    gather(tokens, index, out, rows, width);                                                                          \
  }

MERGE(float, f32)
MERGE(half_t, f16)
