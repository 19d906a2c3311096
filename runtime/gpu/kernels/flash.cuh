// Attention of many tokens over many rows, without scores in memory (flash attention, arXiv 2205.14135): a block takes
// queries of one head and goes through the rows KEYS at a time. In fp16 on tensor cores; fp32, which is there to be
// compared with, in plain sums.
#pragma once
#include "state.cuh"
#include "vectors.cuh"

constexpr int ROW_WARPS = 4;
constexpr float LOG2E = 1.44269504f;
constexpr float ROOM = 8.0f;  // weights may reach 2^ROOM before sums are scaled anew, which few tiles then ask for

// One head. Where the columns end in the tokens' own rows: the first `left` tokens are the first columns, the others the
// last, and nobody sees a newer one.
template <class T>
struct Attention {
  const T* queries;  // [tokens, D]
  const T* keys;     // [columns, D]
  const T* values;
  const float* bias;                    // [columns] on unscaled scores, or null
  T* context;                           // [tokens, D]
  int query_row, key_row, context_row;  // elements from one row to the next
  int tokens, columns, left;
  int dim;      // D, a multiple of 8; up to what the kernel is made for
  float scale;  // of scores
};

// Columns that a token sees: those before `before`, and those from `from` to `end`.
struct Seen {
  int before, from, end;

  DEVICE bool has(int column) const { return (column < before) | ((column >= from) & (column < end)); }
};

template <bool Causal, class T>
DEVICE Seen seen_by(const Attention<T>& a, int token) {
  Seen all = {a.columns, a.columns, a.columns};
  if (!Causal) return all;
  int right = a.columns - a.tokens + min(max(token + 1, a.left), a.tokens);
  Seen some = {min(token + 1, a.left), a.left, right};
  return some;
}

// Tokens that a block of the fp16 kernel takes: 16 a warp and tile. Two tiles halve what is read of shared memory for a
// product; head sizes above 80 lack the registers.
template <int D>
struct Shape {
  static constexpr int tiles = D > 80 ? 1 : 2, queries = 16 * tiles * ROW_WARPS;
  static constexpr int keys = D > 80 ? 32 : 64;  // rows of a tile: four tiles must fit 48 KiB
  static constexpr int wide = (D + 15) / 16 * 16;  // halves of a row: products take 16 at a time
  static constexpr int stride = wide + 8;          // from row to row of a tile: 8 more, for the banks
};

// Rows of a head size that does not fill them end in zeros, which are written once.
template <int D>
DEVICE void clear_ends(half_t* tiles, int rows, int dim) {
  int words = (Shape<D>::wide - dim) / 2;
  for (int i = threadIdx.x; i < rows * words; i += 32 * ROW_WARPS)
    *(unsigned*)(tiles + i / words * Shape<D>::stride + dim + i % words * 2) = 0;
}

// 16 queries as the left factor of products; a lane holds columns from 2 c on of rows `token` and token + 8.
template <int D>
DEVICE void read_queries(const Attention<half_t>& a, int token, int c, unsigned (&query)[Shape<D>::wide / 16][4]) {
#pragma unroll
  for (int s = 0; s < Shape<D>::wide / 16; s++)
#pragma unroll
    for (int part = 0; part < 4; part++) {
      int own = token + part % 2 * 8, at = s * 16 + part / 2 * 8 + 2 * c;
      bool there = s * 16 + part / 2 * 8 < D && own < a.tokens && at < a.dim;
      query[s][part] = there ? *(const unsigned*)(a.queries + (long long)own * a.query_row + at) : 0;
    }
}

// To TILES times 16 x KEYS scores, of which a lane holds columns `at`, at + 1, at + 8 and so on.
template <int TILES, int KEYS>
DEVICE void add_bias(float (&score)[TILES][KEYS / 8][4], const Attention<half_t>& a, int at) {
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float own = a.bias[min(at + n * 8 + i, a.columns - 1)];
#pragma unroll
      for (int t = 0; t < TILES; t++) score[t][n][i] += own, score[t][n][2 + i] += own;
    }
}

// Half the rows of one tile of such scores: what is not seen is -inf.
template <int KEYS>
DEVICE void hide(float (&score)[KEYS / 8][4], int half, Seen own, int at) {
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (!own.has(at + n * 8 + i)) score[n][2 * half + i] = -INFINITY;
}

// Weights of 16 x KEYS scores, 2 to the power of what a score is above the `most` of its row; and what that makes of
// `total` and `sum`, which earlier tiles added up.
template <int KEYS, int OUT>
DEVICE void make_weights(const float (&score)[KEYS / 8][4], float scale, float (&most)[2], float (&total)[4],
                         float (&sum)[OUT][4], unsigned (&weight)[KEYS / 16][4]) {
  float best[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    best[half] = most[half];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) best[half] = fmaxf(best[half], fmaxf(score[n][2 * half], score[n][2 * half + 1]));
    best[half] = fmaxf(best[half], warp_shuffle_xor(best[half], 1));
    best[half] = fmaxf(best[half], warp_shuffle_xor(best[half], 2));  // finite: all see the first tile's first column
  }
  if (warp_ballot(fmaxf(best[0] - most[0], best[1] - most[1]) * scale > ROOM)) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float factor = exp2_near((most[half] - best[half]) * scale);
      most[half] = best[half], total[2 * half] *= factor;
#pragma unroll
      for (int n = 0; n < OUT; n++) sum[n][2 * half] *= factor, sum[n][2 * half + 1] *= factor;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float from = most[half] * scale;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
      float one = exp2_near(score[n][2 * half] * scale - from), two = exp2_near(score[n][2 * half + 1] * scale - from);
      weight[n / 2][n % 2 * 2 + half] = pack_halves(one, two);
    }
  }
}

// 16 rows of the context, as the last products left them.
template <int OUT>
DEVICE void write_context(const Attention<half_t>& a, int token, int c, const float (&sum)[OUT][4], const float (&total)[4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int own = token + half * 8;
    if (own >= a.tokens) continue;
    half_t* to = a.context + (long long)own * a.context_row + 2 * c;
#pragma unroll
    for (int n = 0; n < OUT; n++)
      if (n * 8 < a.dim)
        *(unsigned*)(to + n * 8) = pack_halves(sum[n][2 * half] / total[2 * half], sum[n][2 * half + 1] / total[2 * half]);
  }
}

// `block` counts from the first tokens. K and V of the next tile are on their way while one is worked on.
template <int D, bool Causal>
DEVICE void attend_halves(const Attention<half_t> a, int block) {
  constexpr int TILES = Shape<D>::tiles, KEYS = Shape<D>::keys, stride = Shape<D>::stride, steps = Shape<D>::wide / 16, out = D / 8;
  constexpr int AT_ONCE = 32 * ROW_WARPS / (D / 8);  // rows that the block loads, 16 bytes a thread
  __shared__ __align__(16) half_t keys[2][KEYS * stride], values[2][KEYS * stride];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  int first = block * Shape<D>::queries, last = min(first + Shape<D>::queries, a.tokens) - 1;
  int row = first + warp * 16 * TILES + g;
  int key_at = (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8, value_at = lane % 16 * stride + lane / 16 * 8;
  Seen least = seen_by<Causal>(a, first), most_of = seen_by<Causal>(a, last);
  int load_row = threadIdx.x / (D / 8), load_at = threadIdx.x % (D / 8) * 8;
  bool loads = load_row < AT_ONCE && load_at < a.dim;
  auto begin = [&](int stage, int tile) {
#pragma unroll
    for (int r = 0; r < KEYS; r += AT_ONCE) {
      if (!loads || (KEYS % AT_ONCE && r + load_row >= KEYS)) continue;
      long long from = (long long)min(tile + r + load_row, a.columns - 1) * a.key_row + load_at;
      copy_begin(keys[stage] + (r + load_row) * stride + load_at, a.keys + from);
      copy_begin(values[stage] + (r + load_row) * stride + load_at, a.values + from);
    }
    copies_close();
  };
  begin(0, 0);
  if (a.dim < Shape<D>::wide) clear_ends<D>(keys[0], 2 * KEYS, a.dim), clear_ends<D>(values[0], 2 * KEYS, a.dim);
  const unsigned ones[2] = {pack_halves(1.0f, 1.0f), pack_halves(1.0f, 1.0f)};  // a product with them sums weights up
  unsigned query[TILES][steps][4];
#pragma unroll
  for (int t = 0; t < TILES; t++) read_queries<D>(a, row + t * 16, c, query[t]);
  float sum[TILES][out][4], most[TILES][2], total[TILES][4], scale = a.scale * LOG2E;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    most[t][0] = most[t][1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++) total[t][i] = 0.0f;
#pragma unroll
    for (int n = 0; n < out; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[t][n][i] = 0.0f;
  }
  for (int tile = 0, stage = 0, next; tile < most_of.end; tile = next, stage ^= 1) {
    next = tile + KEYS;
    if (next >= most_of.before && next + KEYS <= most_of.from) next = most_of.from / KEYS * KEYS;
    copies_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the other one any more
    if (next < most_of.end) begin(stage ^ 1, next);
    float score[TILES][KEYS / 8][4];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) score[t][n][i] = 0.0f;
#pragma unroll
    for (int s = 0; s < steps; s++)
#pragma unroll
      for (int n = 0; n < KEYS / 8; n += 2) {
        unsigned key[4];
        load_matrices<false>(key, keys[stage], n * 8 * stride + s * 16 + key_at);
        unsigned left[2] = {key[0], key[1]}, right[2] = {key[2], key[3]};
#pragma unroll
        for (int t = 0; t < TILES; t++) mma(score[t][n], query[t][s], left), mma(score[t][n + 1], query[t][s], right);
      }
    if (a.bias) add_bias<TILES, KEYS>(score, a, tile + 2 * c);
    bool all_see = tile + KEYS <= least.before || (tile >= least.from && tile + KEYS <= least.end);
    if (!all_see) {
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          hide<KEYS>(score[t], half, seen_by<Causal>(a, row + t * 16 + half * 8), tile + 2 * c);
    }
    unsigned weight[TILES][KEYS / 16][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) make_weights<KEYS, out>(score[t], scale, most[t], total[t], sum[t], weight[t]);
#pragma unroll
    for (int s = 0; s < KEYS / 16; s++) {
#pragma unroll
      for (int t = 0; t < TILES; t++) mma(total[t], weight[t][s], ones);
#pragma unroll
      for (int n = 0; n < out; n += 2) {
        unsigned value[4];
        load_matrices<true>(value, values[stage], s * 16 * stride + n * 8 + value_at);
        unsigned left[2] = {value[0], value[1]}, right[2] = {value[2], value[3]};
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          mma(sum[t][n], weight[t][s], left);
          if (n + 1 < out) mma(sum[t][n + 1], weight[t][s], right);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; t++) write_context<out>(a, row + t * 16, c, sum[t], total[t]);
}

// A warp a token: lanes are 32 rows while scores are made, and columns of D while they are summed up.
template <int D, bool Causal>
DEVICE void attend_floats(const Attention<float> a, int block) {
  constexpr int parts = (D + 31) / 32;
  __shared__ float query[ROW_WARPS][D], weight[ROW_WARPS][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = block * ROW_WARPS + warp;
  if (token >= a.tokens) return;
  Seen own_columns = seen_by<Causal>(a, token);
  for (int d = lane; d < a.dim; d += 32) query[warp][d] = a.queries[(long long)token * a.query_row + d] * a.scale;
  warp_sync();
  float sum[parts] = {}, most = -INFINITY, total = 0.0f;
  for (int tile = 0; tile < a.columns; tile += 32) {
    int column = tile + lane;
    bool seen = own_columns.has(column);
    float score = seen ? 0.0f : -INFINITY;
    const float* key = a.keys + (long long)column * a.key_row;
    if (seen && a.bias) score = a.bias[column];
    if (seen)
      for (int d = 0; d < a.dim; d++) score += query[warp][d] * key[d];
    float best = fmaxf(most, warp_max(score)), factor = expf(most - best), own = expf(score - best);
    most = best, total = total * factor + warp_sum(own);
    weight[warp][lane] = own;
    warp_sync();
    for (int i = 0; i < parts; i++) {
      sum[i] *= factor;
      if (i * 32 + lane < a.dim)
        for (int r = 0; r < min(32, a.columns - tile); r++)
          sum[i] += weight[warp][r] * a.values[(long long)(tile + r) * a.key_row + i * 32 + lane];
    }
    warp_sync();
  }
  for (int i = 0; i < parts; i++)
    if (i * 32 + lane < a.dim) a.context[(long long)token * a.context_row + i * 32 + lane] = sum[i] / total;
}
