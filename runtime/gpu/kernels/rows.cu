// Rows moved about: weights turned from [in, out] to [out, in] while loading, and keys turned to other positions.
#include "state.cuh"
#include "vectors.cuh"

// to [columns, rows] = from [rows, columns]; a row of `to` is `stride` elements long. Blocks of 256 threads, a tile of
// 32 x 32 each.
template <class T>
DEVICE void transpose(const T* from, T* to, int rows, int columns, int stride) {
  __shared__ T tile[32][33];
  int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int j = y; j < 32; j += 8) {
    int row = blockIdx.y * 32 + j, column = blockIdx.x * 32 + x;
    if (row < rows && column < columns) tile[j][x] = from[(long long)row * columns + column];
  }
  __syncthreads();
  for (int j = y; j < 32; j += 8) {
    int row = blockIdx.x * 32 + j, column = blockIdx.y * 32 + x;
    if (row < columns && column < rows) to[(long long)row * stride + column] = tile[x][j];
  }
}

// Keys [rows, G, D] of a plane turned by one angle a dimension pair, cos and sin [D/2]: RoPE positions move by a common
// offset. A block a row and layer; the planes of K lie `stride` elements apart.
template <class T>
DEVICE void rotate(T* keys, const float* cosine, const float* sine, int groups, int dim, long long stride) {
  T* row = keys + blockIdx.y * stride + (long long)blockIdx.x * groups * dim;
  int half = dim / 2;
  for (int i = threadIdx.x; i < groups * half; i += blockDim.x) {
    int j = i % half, at = i / half * dim + j;
    float a = to_float(row[at]), b = to_float(row[at + half]);
    row[at] = from_float<T>(a * cosine[j] - b * sine[j]);
    row[at + half] = from_float<T>(b * cosine[j] + a * sine[j]);
  }
}

#define MOVES(T, suffix)                                                                                      \
  extern "C" __global__ void KERNEL(transpose_##suffix)(const T* from, T* to, int rows, int columns, int stride) { \
    transpose(from, to, rows, columns, stride);                                                                       \
  }                                                                                                           \
  extern "C" __global__ void KERNEL(rotate_##suffix)(T* keys, const float* cosine, const float* sine,         \
                                                     int groups, int dim, long long stride) {                 \
    rotate(keys, cosine, sine, groups, dim, stride);                                                          \
  }

MOVES(float, f32)
MOVES(half_t, f16)
