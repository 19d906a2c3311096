// Merge by coverage (dycoke.py's cover_frame): which tokens of a frame cover it, and for how many each stands.
#include "state.cuh"

constexpr int COVERERS = 1024;  // threads
constexpr int MOST_TOKENS = 1024;  // of a frame
constexpr float STEPS = 1024.0f;   // of dycoke.py: gains are compared in steps of 1 / STEPS

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
  __shared__ float gains[COVERERS];
  __shared__ int order[MOST_TOKENS];    // when a token was picked, -1: not yet
  __shared__ int rank[MOST_TOKENS];     // of a picked token, in raster order
  __shared__ int stands[2 * MOST_TOKENS];
  __shared__ float values[COVERERS / 32];
  __shared__ int places[COVERERS / 32];
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

    for (int round = 0; round < kept; round++) {
      // column j by thread j of each group; the groups take rows in turn (per_frame <= 1024: a thread, a column)
      int j = threadIdx.x % per_frame, group = threadIdx.x / per_frame;
      float gain = 0.0f;
      if (group < groups)
        for (int i = group; i < per_frame; i += groups) gain += fmaxf(own[(long long)i * rows + j] - best[i], 0.0f);
      gains[threadIdx.x] = gain;
      __syncthreads();
      float value = -2.0f;
      int place = MOST_TOKENS;
      if (threadIdx.x < per_frame && order[threadIdx.x] < 0) {
        value = 0.0f, place = threadIdx.x;
        for (int g = 0; g < groups; g++) value += gains[g * per_frame + threadIdx.x];
        value = (float)(int)(value * STEPS + 0.5f);
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
      for (int i = threadIdx.x; i < per_frame; i += COVERERS) best[i] = fmaxf(best[i], own[(long long)pick * rows + i]);
      __syncthreads();
    }

    for (int i = threadIdx.x; i < per_frame; i += COVERERS) {
      int before = 0, nearest = -1, active_one = -1;
      float most = -2.0f, most_active = -2.0f;
      for (int k = 0; k < per_frame; k++) {
        if (order[k] < 0) continue;
        before += k < i;
        float like = k == i ? 2.0f : own[(long long)i * rows + k];
        if (like > most) most = like, nearest = k;
        if (order[k] < active && like > most_active) most_active = like, active_one = k;
      }
      rank[i] = before;
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
