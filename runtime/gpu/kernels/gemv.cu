// One token through the matrices of a layer. A matrix is [out, in], a warp makes one output, so that memory is read in
// whole rows. Bound by bytes: every weight is read once a token, and on its way while the block norms the vector.
#include "state.cuh"
#include "vectors.cuh"

// The output that this warp makes; past the end it works on the last one, and does not store it.
DEVICE int own_row() { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

// x [E] = table [V, E] of the token, turn [D] = cosines and sines of its position for RoPE frequencies [D/2]; and a step
// begins: nothing has changed yet.
template <class T>
DEVICE void embed(State* state, const T* table, float* x, int n, const float* inverse, float* turn, int half) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = to_float(table[(long long)state->token * n + i]);
  if (i < half) turn_to(turn, state->position, inverse, half, i);
  if (i == 0) state->turned = state->refreshed = state->swaps = 0;
}

// out [count] = matrix norm(x) + bias. Without a bias, bias is null.
template <class T>
DEVICE void norm_project(
    const float* x, const T* gain, float epsilon, const T* matrix, const T* bias, float* out, int in, int count) {
  DYNAMIC_SHARED;
  T* y = reinterpret_cast<T*>(dynamic_shared);
  int row = own_row();
  const T* rows[1] = {matrix + (long long)min(row, count - 1) * in};
  Vec16 begun[1][BEGUN];
  float sums[1];
  begin_rows(rows, in, begun);
  normed(x, gain, in, epsilon, y);
  dot_rows(rows, y, in, begun, sums);
  if (threadIdx.x % 32 == 0 && row < count) out[row] = sums[0] + (bias ? to_float(bias[row]) : 0.0f);
}

// x [count] += matrix v.
template <class T>
DEVICE void add_project(const T* v, const T* matrix, float* x, int in, int count) {
  int row = own_row();
  const T* rows[1] = {matrix + (long long)min(row, count - 1) * in};
  Vec16 begun[1][BEGUN];
  float sums[1];
  begin_rows(rows, in, begun);
  dot_rows(rows, v, in, begun, sums);
  if (threadIdx.x % 32 == 0 && row < count) x[row] += sums[0];
}

// out [I] = silu(gate) * up, with gate and up the halves of matrix [2 I, in] times norm(x). A warp makes one of out.
template <class T>
DEVICE void gate_up(
    const float* x, const T* gain, float epsilon, const T* matrix, T* out, int in, int count) {
  DYNAMIC_SHARED;
  T* y = reinterpret_cast<T*>(dynamic_shared);
  int row = own_row();
  const T* gate = matrix + (long long)min(row, count - 1) * in;
  const T* rows[2] = {gate, gate + (long long)count * in};
  Vec16 begun[2][BEGUN];
  float sums[2];
  begin_rows(rows, in, begun);
  normed(x, gain, in, epsilon, y);
  dot_rows(rows, y, in, begun, sums);
  if (threadIdx.x % 32 == 0 && row < count) out[row] = from_float<T>(silu(sums[0]) * sums[1]);
}

// The largest of a block's logits, ties to the lower id: value and id.
DEVICE bool beats(float value, int id, float other, int than) {
  return value > other || (value == other && id < than);
}

// The token of logits [n], and its record. Blocks find their best, the last one to end picks among them. With `advance`
// the token that was computed becomes a text row; a prefill has counted its rows already.
DEVICE void pick_token(
    const float* logits, int n, float* best, int* best_id, int* ticket, State* state, Record* ring, int size, int advance) {
  __shared__ float values[32];
  __shared__ int ids[32];
  __shared__ int last;
  float value = -INFINITY;
  int id = n, bad = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    float logit = logits[i];
    bad |= logit != logit || logit == INFINITY;
    if (beats(logit, i, value, id)) value = logit, id = i;
  }
  if (bad) id = -1, value = INFINITY;  // beats every other, and says that something is wrong
  for (int round = 0; round < 2; round++) {
    for (int step = 16; step > 0; step /= 2) {
      float other = warp_shuffle_xor(value, step);
      int than = warp_shuffle_xor(id, step);
      if (beats(other, than, value, id)) value = other, id = than;
    }
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, ids[threadIdx.x / 32] = id;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < (int)blockDim.x / 32; w++)
        if (beats(values[w], ids[w], values[0], ids[0])) values[0] = values[w], ids[0] = ids[w];
      if (round == 0) {
        best[blockIdx.x] = values[0], best_id[blockIdx.x] = ids[0];
        __threadfence();
        last = atomicAdd(ticket, 1) == (int)gridDim.x - 1;
      }
    }
    __syncthreads();
    if (round == 0) {
      if (!last) return;
      value = -INFINITY, id = n;
      for (int b = threadIdx.x; b < (int)gridDim.x; b += blockDim.x) {
        float other = ((volatile float*)best)[b];
        int than = ((volatile int*)best_id)[b];
        if (beats(other, than, value, id)) value = other, id = than;
      }
    }
  }
  if (threadIdx.x != 0) return;
  *ticket = 0;
  Record* record = ring + state->step % size;
  record->finite = ids[0] >= 0 && ids[0] < n;
  record->token = record->finite ? ids[0] : 0;
  record->active = state->num_active;
  record->refreshed = state->refreshed;
  record->swaps = state->swaps;
  record->step = state->step;
  state->token = record->token;
  state->step += 1;
  state->position += advance;
  state->num_text += advance;
}

#define GEMV(T, suffix)                                                                                              \
  extern "C" __global__ void KERNEL(embed_##suffix)(State* state, const T* table, float* x, int n,                   \
                                                    const float* inverse, float* turn, int half) {                   \
    embed(state, table, x, n, inverse, turn, half);                                                                  \
  }                                                                                                                  \
  extern "C" __global__ void KERNEL(norm_project_##suffix)                                                                                      \
  (const float* x, const T* gain, float epsilon, const T* matrix, const T* bias, float* out, int in, int count) {    \
    norm_project(x, gain, epsilon, matrix, bias, out, in, count);                                                    \
  }                                                                                                                  \
  extern "C" __global__ void KERNEL(add_project_##suffix)(const T* v, const T* matrix, float* x, int in, int count) {                           \
    add_project(v, matrix, x, in, count);                                                                            \
  }                                                                                                                  \
  extern "C" __global__ void KERNEL(gate_up_##suffix)                                                                                           \
  (const float* x, const T* gain, float epsilon, const T* matrix, T* out, int in, int count) {                       \
    gate_up(x, gain, epsilon, matrix, out, in, count);                                                               \
  }

GEMV(float, f32)
GEMV(half_t, f16)

extern "C" __global__ void KERNEL(pick)(const float* logits, int n, float* best, int* best_id, int* ticket, State* state, Record* ring, int size,
             int advance) {
  pick_token(logits, n, best, best_id, ticket, state, ring, size, advance);
}
