// One token's attention over the cache, flash-decoding style: blocks take parts of the rows, the last one of a KV head
// to end joins them. The block with the last part also writes the token's own K and V row, so that a layer's attention
// is one launch. Lengths come from the state: the same launch serves every length. Bound by bytes: K and V are read once.
#include "state.cuh"
#include "vectors.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int HEADS = 8;  // most query heads a KV head
constexpr int AT_ONCE = 4;  // rows a lane loads before it looks at the first
constexpr int LEAST_ROWS = 32;  // of a part; not tuned yet
constexpr int MOST_PARTS = 128;  // parts that are joined

// What a launch is given. qkv [(H + 2 G) D] of the token, before RoPE; keys and values: the first row of a layer's slab;
// bias [capacity] on the scores of each row, or null.
template <class T>
struct Attend {
  const State* state;
  const float* qkv;
  const float* turn;  // [D] cosines, then sines, of the token's position
  T* keys;
  T* values;
  const float* bias;
  T* context;    // [H, D]
  float* sums;   // [G, parts, R, D]
  Part* parts;   // [G, parts, R]
  int* tickets;  // [G], zero
  float* scores;  // [H, capacity], or null
  Part* heads;    // [H] over all rows, or null
  int group;      // R = H / G
  int capacity;
  int deep;
};

// RoPE of the query heads of a KV head, into shared memory; and of the token's own key.
template <class T, int D>
DEVICE void take(const Attend<T>& a, float (*query)[D], bool own, long long row) {
  int kv = blockIdx.y, groups = gridDim.y;
  for (int i = threadIdx.x; i < (a.group + own) * (D / 2); i += THREADS) {
    int h = i / (D / 2), j = i % (D / 2);
    bool key = h == a.group;
    const float* from = a.qkv + (key ? groups * a.group + kv : kv * a.group + h) * D;
    float c = a.turn[j], s = a.turn[j + D / 2];
    float first = from[j] * c - from[j + D / 2] * s, second = from[j + D / 2] * c + from[j] * s;
    if (key) {
      T* to = a.keys + (row * groups + kv) * D;
      to[j] = from_float<T>(first), to[j + D / 2] = from_float<T>(second);
    } else {
      query[h][j] = first, query[h][j + D / 2] = second;
    }
  }
  if (own) {
    const float* from = a.qkv + (groups * (a.group + 1) + kv) * D;
    for (int j = threadIdx.x; j < D; j += THREADS) a.values[(row * groups + kv) * D + j] = from_float<T>(from[j]);
  }
  __syncthreads();
}

// Softmax over the parts: context = sum of each part's sums, by its share of the whole.
template <class T, int D>
DEVICE void join(const Attend<T>& a, int used, float (*share)[MOST_PARTS]) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv = blockIdx.y, group = a.group;
  if (threadIdx.x == 0) a.tickets[kv] = 0;
  volatile Part* parts = a.parts + (long long)kv * gridDim.x * group;
  const float* sums = a.sums + (long long)kv * gridDim.x * group * D;
  for (int h = warp; h < group; h += WARPS) {
    float most[MOST_PARTS / 32], sum[MOST_PARTS / 32], best = -INFINITY, total = 0.0f;
#pragma unroll
    for (int j = 0; j < MOST_PARTS / 32; j++) {
      int p = j * 32 + lane;
      most[j] = p < used ? parts[p * group + h].most : -INFINITY;
      sum[j] = p < used ? parts[p * group + h].total : 0.0f;
      best = fmaxf(best, most[j]);
    }
    best = warp_max(best);
#pragma unroll
    for (int j = 0; j < MOST_PARTS / 32; j++) total += sum[j] * (most[j] = expf(most[j] - best));
    total = warp_sum(total);
#pragma unroll
    for (int j = 0; j < MOST_PARTS / 32; j++) share[h][j * 32 + lane] = most[j] / total;
    if (lane == 0 && a.heads) {
      Part whole = {best, total};
      a.heads[kv * group + h] = whole;
    }
  }
  __syncthreads();
  for (int i = 4 * threadIdx.x; i < group * D; i += 4 * THREADS) {
    float value[4] = {};
#pragma unroll 8
    for (int p = 0; p < used; p++) {  // unrolled, so that eight loads are on their way at once
      float part[4];
      unpack(load_fresh(reinterpret_cast<const Vec16*>(sums + p * group * D + i)), part);
#pragma unroll
      for (int e = 0; e < 4; e++) value[e] += share[i / D][p] * part[e];
    }
#pragma unroll
    for (int e = 0; e < 4; e++) a.context[kv * group * D + i + e] = from_float<T>(value[e]);
  }
}

template <class T, int D>
DEVICE void attend(const Attend<T> a) {
  constexpr int width = Pack<T>::count, lanes = D / width, per_warp = 32 / lanes;  // lanes a row, rows a warp
  constexpr int stride = WARPS * per_warp, TILE = AT_ONCE * stride;  // rows a block loads at once
  __shared__ float query[HEADS][D];
  __shared__ float score[HEADS][TILE];
  __shared__ float gathered[WARPS][HEADS][D];
  __shared__ float most[HEADS], total[HEADS], factor[HEADS];
  __shared__ float share[HEADS][MOST_PARTS];
  __shared__ int last;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane % lanes * width, place = warp * per_warp + lane / lanes;
  int kv = blockIdx.y, groups = gridDim.y, group = a.group;
  Rows rows = rows_of(a.state, a.deep);
  int all = rows.cached + 1, size = max((all + (int)gridDim.x - 1) / (int)gridDim.x, LEAST_ROWS);
  int used = (all + size - 1) / size, begin = blockIdx.x * size, end = min(all, begin + size);
  if ((int)blockIdx.x >= used) return;
  take<T, D>(a, query, end == all, (long long)rows.first + rows.cached);
  if (threadIdx.x < HEADS) most[threadIdx.x] = -INFINITY, total[threadIdx.x] = 0.0f;
  float q[HEADS][width], sum[HEADS][width];
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int e = 0; e < width; e++) q[h][e] = h < group ? query[h][column + e] : 0.0f, sum[h][e] = 0.0f;
  for (int tile = begin; tile < end; tile += TILE) {
    int count = min(TILE, end - tile);
    Vec16 keys[AT_ONCE], values[AT_ONCE];
    float weighs[AT_ONCE];  // what a row's scores begin with, in one of its lanes
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      long long row = rows.first + tile + min(place + i * stride, count - 1), at = (row * groups + kv) * D + column;
      keys[i] = *reinterpret_cast<const Vec16*>(a.keys + at);
      values[i] = *reinterpret_cast<const Vec16*>(a.values + at);
      weighs[i] = a.bias && column == 0 ? a.bias[row] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {  // every lane takes part in the shuffles
      int r = place + i * stride;
      float k[width];
      unpack(keys[i], k);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        if (h >= group) break;
        float dot = weighs[i];
#pragma unroll
        for (int e = 0; e < width; e++) dot += q[h][e] * k[e];
#pragma unroll
        for (int step = lanes / 2; step > 0; step /= 2) dot += warp_shuffle_xor(dot, step);
        if (column == 0 && r < count) score[h][r] = dot;
      }
    }
    __syncthreads();
    for (int h = warp; h < group; h += WARPS) {
      float best = most[h];
      for (int r = lane; r < count; r += 32) {
        best = fmaxf(best, score[h][r]);
        if (a.scores) a.scores[(long long)(kv * group + h) * a.capacity + tile + r] = score[h][r];
      }
      best = warp_max(best);
      float weight = 0.0f;
      for (int r = lane; r < count; r += 32) weight += score[h][r] = expf(score[h][r] - best);
      weight = warp_sum(weight);
      if (lane == 0) {
        factor[h] = expf(most[h] - best);
        total[h] = total[h] * factor[h] + weight;
        most[h] = best;
      }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int e = 0; e < width; e++)
        if (h < group) sum[h][e] *= factor[h];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int r = place + i * stride;
      float v[width];
      unpack(values[i], v);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        if (h >= group) break;
        float weight = r < count ? score[h][r] : 0.0f;
#pragma unroll
        for (int e = 0; e < width; e++) sum[h][e] += weight * v[e];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (h >= group) break;
#pragma unroll
    for (int e = 0; e < width; e++) {
#pragma unroll
      for (int step = lanes; step < 32; step *= 2) sum[h][e] += warp_shuffle_xor(sum[h][e], step);
      if (lane < lanes) gathered[warp][h][column + e] = sum[h][e];
    }
  }
  __syncthreads();
  long long slot = (long long)kv * gridDim.x + blockIdx.x;
  for (int i = threadIdx.x; i < group * D; i += THREADS) {
    float value = 0.0f;
    for (int w = 0; w < WARPS; w++) value += gathered[w][i / D][i % D];
    a.sums[slot * group * D + i] = value;
  }
  if ((int)threadIdx.x < group) {
    Part part = {most[threadIdx.x], total[threadIdx.x]};
    a.parts[slot * group + threadIdx.x] = part;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(a.tickets + kv, 1) == used - 1;
  __syncthreads();
  if (!last) return;
  join<T, D>(a, used, share);
}

#define ATTEND(T, suffix, D)                                                                                            \
  extern "C" __global__ void KERNEL(attend_##suffix##_##D)                                                                                         \
  (const State* state, const float* qkv, const float* turn, T* keys, T* values, const float* bias, T* context, float* sums, Part* parts, \
   int* tickets, float* scores, Part* heads, int group, int capacity, int deep) {                                       \
    Attend<T> a = {state, qkv, turn, keys, values, bias, context, sums, parts, tickets, scores, heads, group, capacity, deep}; \
    attend<T, D>(a);                                                                                                    \
  }

ATTEND(float, f32, 32)
ATTEND(float, f32, 64)
ATTEND(float, f32, 128)
ATTEND(half_t, f16, 32)
ATTEND(half_t, f16, 64)
ATTEND(half_t, f16, 128)
