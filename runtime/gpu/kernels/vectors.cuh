// 16-byte loads, dot products, sums over a block: what every kernel here is made of. Sums are fp32.
#pragma once
#include "dialect.cuh"

template <class T>
DEVICE void load16(const T* from, float (&to)[Pack<T>::count]) {
  unpack(*reinterpret_cast<const Vec16*>(from), to);
}

// As many floats as a Vec16 of the result's type has elements.
DEVICE void load_floats(const float* from, float (&to)[4]) { load16(from, to); }
DEVICE void load_floats(const float* from, float (&to)[8]) {
  float half[4];
  load16(from, half);
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = half[i];
  load16(from + 4, half);
#pragma unroll
  for (int i = 0; i < 4; i++) to[4 + i] = half[i];
}

DEVICE void pack(const float (&from)[4], Vec16& to) {
#pragma unroll
  for (int i = 0; i < 4; i++) to.word[i] = __float_as_uint(from[i]);
}
DEVICE void pack(const float (&from)[8], Vec16& to) {
#pragma unroll
  for (int i = 0; i < 4; i++) to.word[i] = pack_halves(from[2 * i], from[2 * i + 1]);
}

template <class T>
DEVICE void store16(T* to, const float (&from)[Pack<T>::count]) {
  Vec16 packed;
  pack(from, packed);
  *reinterpret_cast<Vec16*>(to) = packed;
}

constexpr int BEGUN = 4;  // 16-byte loads a lane and row that are on their way before anything else is done

// The beginning of `Count` rows of weights [n], for a warp.
template <int Count, class T>
DEVICE void begin_rows(const T* const* rows, int n, Vec16 (&begun)[Count][BEGUN]) {
  constexpr int width = Pack<T>::count;
#pragma unroll
  for (int part = 0; part < BEGUN; part++) {
    int k = (part * 32 + threadIdx.x % 32) * width;
#pragma unroll
    for (int r = 0; r < Count; r++)
      if (k < n) begun[r][part] = load_once(reinterpret_cast<const Vec16*>(rows[r] + k));
  }
}

// Their products with a vector [n], for every lane of the warp.
template <int Count, class T>
DEVICE void dot_rows(const T* const* rows, const T* vector, int n, const Vec16 (&begun)[Count][BEGUN], float (&sums)[Count]) {
  constexpr int width = Pack<T>::count;
  int lane = threadIdx.x % 32;
  float x[width], w[width];
#pragma unroll
  for (int r = 0; r < Count; r++) sums[r] = 0.0f;
#pragma unroll
  for (int part = 0; part < BEGUN; part++) {
    int k = (part * 32 + lane) * width;
    if (k >= n) break;
    load16(vector + k, x);
#pragma unroll
    for (int r = 0; r < Count; r++) {
      unpack(begun[r][part], w);
#pragma unroll
      for (int e = 0; e < width; e++) sums[r] += w[e] * x[e];
    }
  }
#pragma unroll 4
  for (int k = (BEGUN * 32 + lane) * width; k < n; k += 32 * width) {
    load16(vector + k, x);
#pragma unroll
    for (int r = 0; r < Count; r++) {
      unpack(load_once(reinterpret_cast<const Vec16*>(rows[r] + k)), w);
#pragma unroll
      for (int e = 0; e < width; e++) sums[r] += w[e] * x[e];
    }
  }
#pragma unroll
  for (int r = 0; r < Count; r++) sums[r] = warp_sum(sums[r]);
}

// Sum over the block, for every thread. `scratch` holds 33 floats of shared memory.
DEVICE float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int w = 0; w < (int)blockDim.x / 32; w++) sum += scratch[w];
    scratch[32] = sum;
  }
  __syncthreads();
  return scratch[32];
}

DEVICE float silu(float gate) { return gate / (1.0f + expf(-gate)); }

// Number j of a position's turn [2 half]: cosines for RoPE frequencies [half], then sines.
DEVICE void turn_to(float* turn, int position, const float* inverse, int half, int j) {
  float angle = position * inverse[j];
  turn[j] = cosf(angle), turn[j + half] = sinf(angle);
}

// RMS norm of x [n] into out [n], by the whole block, rounded where the bundle's graphs round.
template <class T>
DEVICE void normed(const float* x, const T* gain, int n, float epsilon, T* out) {
  __shared__ float scratch[33];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i] * x[i];
  float scale = 1.0f / sqrtf(block_sum(sum, scratch) / n + epsilon);
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    out[i] = from_float<T>(to_float(from_float<T>(x[i] * scale)) * to_float(gain[i]));
  __syncthreads();
}

// Sum of `value` over the threads before this one; the sum over all comes back in `total`. A whole block of THREADS,
// `scratch` [THREADS / 32].
template <int THREADS>
DEVICE int ranked(int value, int* scratch, int* total) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
  for (int step = 1; step < 32; step *= 2) {
    int other = warp_shuffle_up(sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < THREADS / 32; w++) {
    if (w < warp) before += scratch[w];
    all += scratch[w];
  }
  *total = all;
  return before + sum - value;
}
