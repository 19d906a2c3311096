// What a decode step reads and leaves behind, in device memory: all that changes from one launch of the graph to the
// next. runtime/gpu/state.py lays the same bytes out.
#pragma once
#include "dialect.cuh"

struct State {
  int token;        // the token to compute next
  int position;     // its RoPE position
  int origin;       // first text row
  int num_visual;   // M
  int num_active;   // visual rows that deep layers attend to
  int num_text;     // text rows in the buffer; the token's own row comes after them
  int step;         // tokens picked so far, counts on for ever
  int keep;         // 0 off, 1 paper, 2 official
  int num_keep;     // visual rows to choose
  int first;        // no attention has been seen yet
  int one_shot;     // the first choice is final
  int turned;       // this step: the attention turned, or is the first
  int refreshed;    // this step: the kept set changed
  int swaps;        // this step: row pairs exchanged
  float threshold;  // cosine below which the set is chosen anew
  int reserved;
};

// One token's record; the ring of them is what the host reads.
struct Record {
  int token;
  int active;
  int refreshed;
  int swaps;
  int finite;  // 0 if the logits were not
  int step;
  int reserved[2];
};

// Softmax over some rows: the largest score, and the sum of exp(score - most).
struct Part {
  float most;
  float total;
};

// Rows that a layer attends to: first .. first + cached - 1, and the token's own row after them.
struct Rows {
  int first;
  int cached;
};

DEVICE Rows rows_of(const State* state, int deep) {
  int visual = deep ? state->num_active : state->num_visual;
  Rows rows = {state->origin - visual, visual + state->num_text};
  return rows;
}
