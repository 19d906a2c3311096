// Merge by coverage (dycoke.py's cover_frame): which tokens of a frame cover it, and for how many each stands.
#include "state.cuh"
#include "vectors.cuh"

constexpr int COVERERS = 1024;  // threads
constexpr int MOST_TOKENS = 1024;  // of a frame
constexpr float STEPS = 1024.0f;   // of dycoke.py: gains are compared in steps of 1 / STEPS

// bias [2, capacity] of `count` rows from `row` on = log of counts [2, total] from `first` on; of a count of 0 it is 0.
extern "C" __global__ void KERNEL(weigh_rows)(const int* counts, int total, int first, float* bias, int capacity, int row,
                                              int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= 2 * count) return;
  int of = i / count, at = i % count, standing = counts[of * total + first + at];
  bias[of * capacity + row + at] = standing > 0 ? logf((float)standing) : 0.0f;
}

// to [count] = from [count] + offset
extern "C" __global__ void KERNEL(shift)(const int* from, int* to, int offset, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = from[i] + offset;
}

// The largest of a warp's keys with the lowest place, in every lane.
DEVICE void warp_best(float* value, int* place) {
  for (int mask = 16; mask > 0; mask /= 2) {
    float other = warp_shuffle_xor(*value, mask);
    int at = warp_shuffle_xor(*place, mask);
    if (other > *value || (other == *value && at < *place)) *value = other, *place = at;
  }
}

// A block takes `known` rows and then a pair of frames of N rows, the second of which may be missing. alike: its products
// [n, n] of all these rows, `stride` floats a block; it leaves cosines there. The known rows cover the first frame, what
// is kept of the first the second. index, counts [2, frames * kept]: of each frame `kept` places in raster order, flat,
// and for how many of its tokens each stands: among all kept ones, and among the first `active` that were picked.
extern "C" __global__ void KERNEL(cover)(float* alike, int stride, int* index, int* counts, int known, int frames,
                                         int per_frame, int kept, int active) {
  __shared__ float best[MOST_TOKENS];   // cosine of each token to what covers it
  __shared__ float gain[MOST_TOKENS];   // what each token would add to the sum of `best`
  __shared__ float partial[COVERERS];
  __shared__ int changed[MOST_TOKENS];  // tokens that the last pick covers better
  __shared__ float before[MOST_TOKENS];
  __shared__ int order[MOST_TOKENS];    // when a token was picked, -1: not yet
  __shared__ int rank[MOST_TOKENS];     // of a picked token, in raster order
  __shared__ int stands[2 * MOST_TOKENS];
  __shared__ float values[COVERERS / 32];
  __shared__ int places[COVERERS / 32];
  __shared__ int scratch[COVERERS / 32];
  __shared__ int pick;
  int first = 2 * blockIdx.x, here = frames - first < 2 ? frames - first : 2, rows = known + here * per_frame;
  float* cosine = alike + (long long)blockIdx.x * stride;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = COVERERS / per_frame;
  if (groups < 1) groups = 1;

  // products to cosines; the diagonal, which is squared lengths, last
  for (int i = warp; i < rows; i += COVERERS / 32) {
    float own = cosine[(long long)i * rows + i];
    for (int j = lane; j < rows; j += 32) {
      float other = cosine[(long long)j * rows + j], length = sqrtf(own) * sqrtf(other);
      if (j != i) cosine[(long long)i * rows + j] = length > 0.0f ? cosine[(long long)i * rows + j] / length : 0.0f;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows; i += COVERERS) {
    float* own = cosine + (long long)i * rows + i;
    *own = *own > 0.0f ? 1.0f : 0.0f;
  }
  __syncthreads();

  for (int f = 0; f < here; f++) {
    int base = known + f * per_frame;
    const float* own = cosine + (long long)base * rows + base;
    for (int i = threadIdx.x; i < per_frame; i += COVERERS) {
      float most = 0.0f;
      const float* row = cosine + (long long)(base + i) * rows;
      if (f == 0)
        for (int k = 0; k < known; k++) most = fmaxf(most, row[k]);
      else
        for (int k = 0; k < per_frame; k++)
          if (order[k] >= 0) most = fmaxf(most, row[known + k]);
      best[i] = most;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < per_frame; i += COVERERS) order[i] = -1, stands[i] = 0, stands[MOST_TOKENS + i] = 0;
    __syncthreads();

    // thread j of a group has column j, the groups take rows in turn (per_frame <= 1024). Gains are computed once and
    // then kept up with the rows that a pick changes: all but the first picks change few
    int j = threadIdx.x % per_frame, group = threadIdx.x / per_frame, rows_changed = per_frame;
    for (int round = 0; round < kept; round++) {
      float sum = 0.0f;
      if (group < groups)
        for (int k = group; k < rows_changed; k += groups) {
          int i = round ? changed[k] : k;
          float like = own[(long long)i * rows + j];
          sum += fmaxf(like - best[i], 0.0f) - (round ? fmaxf(like - before[k], 0.0f) : 0.0f);
        }
      partial[threadIdx.x] = sum;
      __syncthreads();
      float value = -2.0f;
      int place = MOST_TOKENS;
      if (threadIdx.x < per_frame) {
        float all = round ? gain[threadIdx.x] : 0.0f;
        for (int g = 0; g < groups; g++) all += partial[g * per_frame + threadIdx.x];
        gain[threadIdx.x] = all;
        if (order[threadIdx.x] < 0) value = (float)(int)(fmaxf(all, 0.0f) * STEPS + 0.5f), place = threadIdx.x;
      }
      warp_best(&value, &place);
      if (lane == 0) values[warp] = value, places[warp] = place;
      __syncthreads();
      if (warp == 0) {
        value = values[lane], place = places[lane];
        warp_best(&value, &place);
        if (lane == 0) pick = place, order[place] = round;
      }
      __syncthreads();
      float old = 0.0f, now = 0.0f;
      if (threadIdx.x < per_frame) {
        old = best[threadIdx.x];
        now = fmaxf(old, own[(long long)pick * rows + threadIdx.x]);
      }
      int at = ranked<COVERERS>(now > old, scratch, &rows_changed);
      if (now > old) changed[at] = threadIdx.x, before[at] = old, best[threadIdx.x] = now;
      __syncthreads();
    }

    for (int i = threadIdx.x; i < per_frame; i += COVERERS) {
      int ahead = 0, nearest = -1, active_one = -1;
      float most = -2.0f, most_active = -2.0f;
      for (int k = 0; k < per_frame; k++) {
        if (order[k] < 0) continue;
        ahead += k < i;
        float like = k == i ? 2.0f : own[(long long)i * rows + k];
        if (like > most) most = like, nearest = k;
        if (order[k] < active && like > most_active) most_active = like, active_one = k;
      }
      rank[i] = ahead;
      atomicAdd(stands + nearest, 1);
      atomicAdd(stands + MOST_TOKENS + active_one, 1);
    }
    __syncthreads();
    int start = (first + f) * kept, total = frames * kept;
    for (int i = threadIdx.x; i < per_frame; i += COVERERS) {
      if (order[i] < 0) continue;
      index[start + rank[i]] = (first + f) * per_frame + i;
      counts[start + rank[i]] = stands[i];
      counts[total + start + rank[i]] = stands[MOST_TOKENS + i];
    }
    __syncthreads();
  }
}
