// What the vision graph takes, made of frames as they are decoded.
#include "dialect.cuh"

// Bytes [F, R, R, 3] to pixels [F, 3, R, R]: byte * scale - shift, each colour its own. A thread a pixel of `area` = R * R,
// a row of blocks a frame.
template <class T>
DEVICE void pixels(const unsigned char* frames, T* out, int area, float red, float green, float blue, float red_shift,
                   float green_shift, float blue_shift) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= area) return;
  const unsigned char* from = frames + ((long long)blockIdx.y * area + at) * 3;
  T* to = out + (long long)blockIdx.y * 3 * area + at;
  to[0] = from_float<T>(from[0] * red - red_shift);
  to[area] = from_float<T>(from[1] * green - green_shift);
  to[2 * (long long)area] = from_float<T>(from[2] * blue - blue_shift);
}

#define PIXELS(T, suffix)                                                                                             \
  extern "C" __global__ void KERNEL(pixels_##suffix)(const unsigned char* frames, T* out, int area, float red,        \
                                                     float green, float blue, float red_shift, float green_shift,     \
                                                     float blue_shift) {                                              \
    pixels(frames, out, area, red, green, blue, red_shift, green_shift, blue_shift);                                  \
  }

PIXELS(float, f32)
PIXELS(half_t, f16)
