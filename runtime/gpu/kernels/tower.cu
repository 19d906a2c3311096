// A vision tower's work between the matrix products of a library (SigLIP, arXiv 2303.15343, and LLaVA-OneVision's
// projector and pooling, arXiv 2408.03326). Rows are patches, of one frame after the other.
#include "state.cuh"
#include "vectors.cuh"

// out [F, side * side, depth]: of each patch of pixels [F, 3, size, size] its colours' rows, one after the other, then
// zeros. A thread an element.
template <class T>
DEVICE void patches(const T* pixels, T* out, int size, int patch, int side, int depth) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, area = side * side;
  if (i >= area * depth) return;
  int place = i / depth, at = i % depth, colour = at / (patch * patch);
  int y = place / side * patch + at / patch % patch, x = place % side * patch + at % patch;
  const T* frame = pixels + (long long)blockIdx.y * 3 * size * size;
  out[(long long)blockIdx.y * area * depth + i] = colour < 3 ? frame[(colour * size + y) * size + x] : from_float<T>(0.0f);
}

// x [F, n] += offset [n]: what a frame's patches get of their places. A thread 16 bytes, a row of blocks a frame.
template <class T>
DEVICE void add_places(T* x, const T* offset, int n) {
  constexpr int width = Pack<T>::count;
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * width;
  if (i >= n) return;
  T* to = x + (long long)blockIdx.y * n + i;
  float a[width], b[width];
  load16(to, a), load16(offset + i, b);
#pragma unroll
  for (int e = 0; e < width; e++) a[e] += b[e];
  store16(to, a);
}

// out [rows, n] = (x - mean) / sqrt(variance + epsilon) * gain + bias of x [rows, n], in fp32; a warp a row, of which a
// lane holds PARTS times 16 bytes.
template <class T>
DEVICE void layer_norm(const T* x, const T* gain, const T* bias, float epsilon, T* out, int rows, int n) {
  constexpr int width = Pack<T>::count, PARTS = 64 / width;
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  Vec16 held[PARTS];
  float sum = 0.0f, square = 0.0f, value[width], g[width], b[width];
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    int k = (part * 32 + lane) * width;
    if (k >= n) continue;
    held[part] = *reinterpret_cast<const Vec16*>(x + (long long)row * n + k);
    unpack(held[part], value);
#pragma unroll
    for (int e = 0; e < width; e++) sum += value[e];
  }
  float mean = warp_sum(sum) / n;
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    if ((part * 32 + lane) * width >= n) continue;
    unpack(held[part], value);
#pragma unroll
    for (int e = 0; e < width; e++) square += (value[e] - mean) * (value[e] - mean);
  }
  float scale = 1.0f / sqrtf(warp_sum(square) / n + epsilon);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    int k = (part * 32 + lane) * width;
    if (k >= n) continue;
    unpack(held[part], value), load16(gain + k, g), load16(bias + k, b);
#pragma unroll
    for (int e = 0; e < width; e++) value[e] = (value[e] - mean) * scale * g[e] + b[e];
    store16(out + (long long)row * n + k, value);
  }
}

// GELU, or its form with tanh (arXiv 1606.08415).
DEVICE float gelu(float x, bool near) {
  float inner = near ? tanhf(0.797884561f * (x + 0.044715f * x * x * x)) : erff(x * 0.707106781f);
  return 0.5f * x * (1.0f + inner);
}

// One axis of bilinear pooling from `side` places to `half`: two places and the weight of the second.
struct Taps {
  int first, second;
  float weight;
};

DEVICE Taps taps_of(int place, int side, int half) {
  float at = fmaxf((place + 0.5f) * side / half - 0.5f, 0.0f);
  int first = (int)at;
  Taps taps = {first, min(first + 1, side - 1), at - first};
  return taps;
}

// out [F, half * half, n] = bilinear pooling of gelu(x) [F, side * side, n]. A thread 16 bytes, a row of blocks a place
// (y) of a frame (z).
template <class T>
DEVICE void gelu_pool(const T* x, T* out, int side, int half, int n, int near) {
  constexpr int width = Pack<T>::count;
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * width;
  if (i >= n) return;
  Taps y = taps_of(blockIdx.y / half, side, half), x_ = taps_of(blockIdx.y % half, side, half);
  const T* frame = x + (long long)blockIdx.z * side * side * n + i;
  float sum[width] = {}, value[width];
#pragma unroll
  for (int tap = 0; tap < 4; tap++) {
    int row = tap / 2 ? y.second : y.first, column = tap % 2 ? x_.second : x_.first;
    float weight = (tap / 2 ? y.weight : 1.0f - y.weight) * (tap % 2 ? x_.weight : 1.0f - x_.weight);
    load16(frame + (long long)(row * side + column) * n, value);
#pragma unroll
    for (int e = 0; e < width; e++) sum[e] += weight * gelu(value[e], near);
  }
  store16(out + ((long long)blockIdx.z * half * half + blockIdx.y) * n + i, sum);
}

#define TOWER(T, suffix)                                                                                              \
  extern "C" __global__ void KERNEL(patches_##suffix)(const T* pixels, T* out, int size, int patch, int side,        \
                                                      int depth) {                                                   \
    patches(pixels, out, size, patch, side, depth);                                                                   \
  }                                                                                                                   \
  extern "C" __global__ void KERNEL(add_places_##suffix)(T* x, const T* offset, int n) { add_places(x, offset, n); }  \
  extern "C" __global__ void KERNEL(layer_norm_##suffix)(const T* x, const T* gain, const T* bias, float epsilon,     \
                                                         T* out, int rows, int n) {                                   \
    layer_norm(x, gain, bias, epsilon, out, rows, n);                                                                 \
  }                                                                                                                   \
  extern "C" __global__ void KERNEL(gelu_pool_##suffix)(const T* x, T* out, int side, int half, int n, int near) {    \
    gelu_pool(x, out, side, half, n, near);                                                                           \
  }

TOWER(float, f32)
TOWER(half_t, f16)
