// Keep on the device (DESIGN of the paper's stage 2, dycoke.py's KeepPolicy): what the visual tokens weigh, whether the
// attention turned, which of them are active, and the exchange of rows. Nothing comes back to the host but a record.
#include "state.cuh"
#include "vectors.cuh"

// attention [M], in order of visual tokens: layer L-1's probabilities, mean over heads; `attention` holds the last
// step's before. Then the last block to end decides whether it turned: cosine of the two below the threshold.
extern "C" __global__ void KERNEL(weigh)(State* state, const float* scores, const Part* heads, const int* slot, float* attention, float* partial,
              int* ticket, int num_heads, int capacity) {
  __shared__ float scratch[33];
  __shared__ int last;
  int count = state->num_visual, start = state->origin - count;
  if (state->keep == 0) return;
  float dot = 0.0f, before2 = 0.0f, now2 = 0.0f;
  for (int v = blockIdx.x * blockDim.x + threadIdx.x; v < count; v += gridDim.x * blockDim.x) {
    int row = slot[v] - start;
    float now = 0.0f, before = attention[v];
    for (int h = 0; h < num_heads; h++)
      now += expf(scores[(long long)h * capacity + row] - heads[h].most) / heads[h].total;
    now /= num_heads;
    attention[v] = now;
    dot += now * before, before2 += before * before, now2 += now * now;
  }
  dot = block_sum(dot, scratch), before2 = block_sum(before2, scratch), now2 = block_sum(now2, scratch);
  if (threadIdx.x == 0) {
    float* own = partial + 3 * blockIdx.x;
    own[0] = dot, own[1] = before2, own[2] = now2;
    __threadfence();
    last = atomicAdd(ticket, 1) == (int)gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  *ticket = 0;
  dot = before2 = now2 = 0.0f;
  for (int b = 0; b < (int)gridDim.x; b++) {
    volatile float* own = partial + 3 * b;
    dot += own[0], before2 += own[1], now2 += own[2];
  }
  float cosine = dot / fmaxf(sqrtf(before2) * sqrtf(now2), 1.17549435e-38f);
  state->turned = state->keep != 3 && (state->first || cosine < state->threshold);
  state->first = 0;
}

constexpr int CHOOSERS = 1024;

// The key of which `wanted` are larger or equal, by radix: attention is never negative, so its bits are ordered.
// `ties` is how many that equal it belong to the wanted ones.
DEVICE unsigned kth_largest(const float* attention, int count, int wanted, int* histogram, int* ties) {
  __shared__ unsigned prefix;
  __shared__ int left;
  if (threadIdx.x == 0) prefix = 0, left = wanted;
  unsigned mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int v = threadIdx.x; v < count; v += CHOOSERS) {
      unsigned key = __float_as_uint(attention[v]);
      if ((key & mask) == prefix) atomicAdd(histogram + (key >> shift & 255), 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      while (digit > 0 && histogram[digit] < left) left -= histogram[digit--];
      prefix |= (unsigned)digit << shift;
    }
    mask |= 255u << shift;
    __syncthreads();
  }
  *ties = left;
  return prefix;
}

// One block of CHOOSERS threads. Chooses the kept set if the attention turned, lists the row pairs to exchange, in order
// of visual tokens as KVBuffer does, and exchanges their slots.
extern "C" __global__ void KERNEL(choose)(State* state, const float* attention, int* slot, int* enter, int* leave, int* pairs) {
  __shared__ int scratch[CHOOSERS / 32];
  __shared__ int histogram[256];
  int count = state->num_visual, wanted = state->num_keep, before = state->num_active;
  if (state->keep == 0 || state->keep == 3) return;
  if (!state->turned) {
    if (state->keep == 2 && threadIdx.x == 0) {
      state->refreshed = before != count;
      state->num_active = count;
    }
    return;
  }
  int ties = 0, tied = 0, entering = 0, leaving = 0, total;
  unsigned least = wanted > 0 ? kth_largest(attention, count, wanted, histogram, &ties) : 0xffffffffu;
  for (int base = 0; base < count; base += CHOOSERS) {
    int v = base + threadIdx.x;
    unsigned key = v < count ? __float_as_uint(attention[v]) : 0;
    int tie = v < count && wanted > 0 && key == least;
    int rank = tied + ranked<CHOOSERS>(tie, scratch, &total);
    tied += total;
    int active = v < count && wanted > 0 && (key > least || (tie && rank < ties));
    int inside = v < count && slot[v] >= state->origin - wanted;
    int enters = active && !inside, leaves = v < count && !active && inside;
    rank = entering + ranked<CHOOSERS>(enters, scratch, &total);
    entering += total;
    if (enters) enter[rank] = v;
    rank = leaving + ranked<CHOOSERS>(leaves, scratch, &total);
    leaving += total;
    if (leaves) leave[rank] = v;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < entering; i += CHOOSERS) {
    int a = slot[enter[i]], b = slot[leave[i]];
    pairs[2 * i] = a, pairs[2 * i + 1] = b;
    slot[enter[i]] = b, slot[leave[i]] = a;
  }
  if (threadIdx.x == 0) {
    state->swaps = entering;
    state->refreshed = entering > 0 || before != wanted;
    state->num_active = wanted;
    if (state->one_shot) state->keep = 3;  // final: no choice any more
  }
}

// Exchanges the rows of every pair in every plane of the slab [planes, capacity, row bytes], and their bias [2, capacity],
// unless it is null; a warp takes one row of a plane at a time.
extern "C" __global__ void KERNEL(exchange)(const int* swaps, const int* pairs, unsigned char* slab, float* bias, long long plane_bytes, int row_bytes, int planes) {
  int lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
  long long units = (long long)*swaps * planes;
  for (long long unit = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; unit < units; unit += warps) {
    const int* pair = pairs + 2 * (unit / planes);
    unsigned char* plane = slab + unit % planes * plane_bytes;
    Vec16* a = reinterpret_cast<Vec16*>(plane + (long long)pair[0] * row_bytes);
    Vec16* b = reinterpret_cast<Vec16*>(plane + (long long)pair[1] * row_bytes);
    if (bias && unit % planes == 0 && lane < 2) {
      float* own = bias + lane * (plane_bytes / row_bytes);
      float kept = own[pair[0]];
      own[pair[0]] = own[pair[1]], own[pair[1]] = kept;
    }
    for (int i = lane; i < row_bytes / 16; i += 32) {
      Vec16 kept = a[i];
      a[i] = b[i], b[i] = kept;
    }
  }
}
