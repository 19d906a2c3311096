// Attention of many new tokens over the cache and themselves, without scores in memory (flash attention): a block takes
// QUERIES tokens of one head and goes through the rows KEYS at a time. In fp16 on tensor cores; fp32, which is there to
// be compared with, in plain sums.
#include "state.cuh"
#include "vectors.cuh"

constexpr int QUERIES = 64, ROW_WARPS = 4;  // 16 queries a warp
constexpr float LOG2E = 1.44269504f;

// qkv [T, width]: queries [H, D] first, turned and scaled. keys, values: the first visible row [G, D] of a layer's slab.
// Columns new_at .. new_at + T - 1 are the new tokens, of which token t sees the first t + 1.
template <class T>
struct AttendRows {
  const T* qkv;
  const T* keys;
  const T* values;
  T* context;  // [T, H, D]
  int width, tokens, columns, new_at, heads, groups;
};

template <class T>
DEVICE bool hidden(const AttendRows<T>& a, int token, int column) {
  return column > a.new_at + token && column < a.new_at + a.tokens;
}

// K and V of the next tile are on their way while one is worked on.
template <int D>
DEVICE void attend_halves(const AttendRows<half_t> a) {
  constexpr int KEYS = D > 64 ? 32 : 64;                    // rows of a tile: four tiles must fit 48 KiB
  constexpr int steps = D / 16, out = D / 8, stride = D + 8;  // halves of a tile's row: 8 more, for the banks
  __shared__ __align__(16) half_t keys[2][KEYS * stride], values[2][KEYS * stride];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  int head = blockIdx.y, group = head / (a.heads / a.groups), first = blockIdx.x * QUERIES, row = first + warp * 16 + g;
  long long apart = (long long)a.groups * D;
  int key_at = (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8, value_at = lane % 16 * stride + lane / 16 * 8;
  auto begin = [&](int stage, int tile) {
    for (int i = threadIdx.x; i < KEYS * D / 8; i += 32 * ROW_WARPS) {
      int r = i / (D / 8), d = i % (D / 8) * 8;
      long long from = min(tile + r, a.columns - 1) * apart + group * D + d;
      copy_begin(keys[stage] + r * stride + d, a.keys + from);
      copy_begin(values[stage] + r * stride + d, a.values + from);
    }
  };
  auto after = [&](int tile) {  // the next tile of which the block's last token sees something
    int last = first + QUERIES - 1;
    do tile += KEYS;
    while (tile < a.columns && hidden(a, last, tile) && hidden(a, last, tile + KEYS - 1));
    return tile;
  };
  begin(0, 0);
  copies_close();
  unsigned query[steps][4];
#pragma unroll
  for (int s = 0; s < steps; s++)
#pragma unroll
    for (int part = 0; part < 4; part++) {
      int token = row + part % 2 * 8, at = head * D + s * 16 + part / 2 * 8 + 2 * c;
      query[s][part] = token < a.tokens ? *(const unsigned*)(a.qkv + (long long)token * a.width + at) : 0;
    }
  float sum[out][4], most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int n = 0; n < out; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[n][i] = 0.0f;
  for (int tile = 0, stage = 0, next; tile < a.columns; tile = next, stage ^= 1) {
    next = after(tile);
    if (next < a.columns) begin(stage ^ 1, next);
    copies_close();
    copies_wait<1>();
    __syncthreads();
    float score[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) score[n][i] = 0.0f;
#pragma unroll
    for (int s = 0; s < steps; s++)
#pragma unroll
      for (int n = 0; n < KEYS / 8; n += 2) {
        unsigned key[4];
        load_matrices<false>(key, keys[stage], n * 8 * stride + s * 16 + key_at);
        unsigned left[2] = {key[0], key[1]}, right[2] = {key[2], key[3]};
        mma(score[n], query[s], left);
        mma(score[n + 1], query[s], right);
      }
    if (tile + KEYS > a.columns || (tile + KEYS - 1 > a.new_at + first && tile < a.new_at + a.tokens)) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int column = tile + n * 8 + 2 * c + i % 2;
          if (column >= a.columns || hidden(a, row + i / 2 * 8, column)) score[n][i] = -INFINITY;
        }
    }
    float best[2] = {most[0], most[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) best[i / 2] = fmaxf(best[i / 2], score[n][i]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      best[half] = fmaxf(best[half], warp_shuffle_xor(best[half], 1));
      best[half] = fmaxf(best[half], warp_shuffle_xor(best[half], 2));
      float from = best[half] == -INFINITY ? 0.0f : best[half];  // nothing seen yet: 2 to the power of -inf - 0 is 0
      float factor = exp2_near((most[half] - from) * LOG2E);
      most[half] = best[half], best[half] = from * LOG2E, total[half] *= factor;
#pragma unroll
      for (int n = 0; n < out; n++) sum[n][2 * half] *= factor, sum[n][2 * half + 1] *= factor;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[i / 2] += score[n][i] = exp2_near(score[n][i] * LOG2E - best[i / 2]);
#pragma unroll
    for (int s = 0; s < KEYS / 16; s++) {
      unsigned weight[4];
#pragma unroll
      for (int part = 0; part < 4; part++) {
        const float* from = score[2 * s + part / 2] + part % 2 * 2;
        weight[part] = pack_halves(from[0], from[1]);
      }
#pragma unroll
      for (int n = 0; n < out; n += 2) {
        unsigned value[4];
        load_matrices<true>(value, values[stage], s * 16 * stride + n * 8 + value_at);
        unsigned left[2] = {value[0], value[1]}, right[2] = {value[2], value[3]};
        mma(sum[n], weight, left);
        mma(sum[n + 1], weight, right);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    total[half] += warp_shuffle_xor(total[half], 1);
    total[half] += warp_shuffle_xor(total[half], 2);
    int token = row + half * 8;
    if (token >= a.tokens) continue;
    half_t* to = a.context + ((long long)token * a.heads + head) * D + 2 * c;
#pragma unroll
    for (int n = 0; n < out; n++)
      *(unsigned*)(to + n * 8) = pack_halves(sum[n][2 * half] / total[half], sum[n][2 * half + 1] / total[half]);
  }
}

// A warp a token: lanes are 32 rows while scores are made, and columns of D while they are summed up.
template <int D>
DEVICE void attend_floats(const AttendRows<float> a) {
  __shared__ float query[ROW_WARPS][D], weight[ROW_WARPS][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.x * ROW_WARPS + warp;
  int head = blockIdx.y, group = head / (a.heads / a.groups);
  if (token >= a.tokens) return;
  for (int d = lane; d < D; d += 32) query[warp][d] = a.qkv[(long long)token * a.width + head * D + d];
  warp_sync();
  float sum[D / 32] = {}, most = -INFINITY, total = 0.0f;
  for (int tile = 0; tile < a.columns; tile += 32) {
    int column = tile + lane;
    bool seen = column < a.columns && !hidden(a, token, column);
    float score = seen ? 0.0f : -INFINITY;
    const float* key = a.keys + ((long long)column * a.groups + group) * D;
    if (seen)
      for (int d = 0; d < D; d++) score += query[warp][d] * key[d];
    float best = fmaxf(most, warp_max(score)), from = best == -INFINITY ? 0.0f : best, factor = expf(most - from);
    float own = expf(score - from);
    most = best, total = total * factor + warp_sum(own);
    weight[warp][lane] = own;
    warp_sync();
    for (int i = 0; i < D / 32; i++) {
      sum[i] *= factor;
      for (int r = 0; r < min(32, a.columns - tile); r++)
        sum[i] += weight[warp][r] * a.values[((long long)(tile + r) * a.groups + group) * D + i * 32 + lane];
    }
    warp_sync();
  }
  for (int i = 0; i < D / 32; i++)
    a.context[((long long)token * a.heads + head) * D + i * 32 + lane] = sum[i] / total;
}

#define ATTEND_ROWS(T, suffix, D, attend)                                                                               \
  extern "C" __global__ void KERNEL(attend_rows_##suffix##_##D)(const T* qkv, const T* keys, const T* values,           \
                                                                T* context, int width, int tokens, int columns,         \
                                                                int new_at, int heads, int groups) {                    \
    AttendRows<T> a = {qkv, keys, values, context, width, tokens, columns, new_at, heads, groups};                      \
    attend<D>(a);                                                                                                       \
  }

ATTEND_ROWS(float, f32, 32, attend_floats)
ATTEND_ROWS(float, f32, 64, attend_floats)
ATTEND_ROWS(float, f32, 128, attend_floats)
ATTEND_ROWS(half_t, f16, 32, attend_halves)
ATTEND_ROWS(half_t, f16, 64, attend_halves)
ATTEND_ROWS(half_t, f16, 128, attend_halves)
