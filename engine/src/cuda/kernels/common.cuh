// Element types, and loads and stores of them.

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

DEVICE float number(float x) { return x; }
DEVICE float number(f16 x) { return float_of_f16(x.bits); }
DEVICE float number(bf16 x) { return __int_as_float((int)((u32)x.bits << 16)); }

DEVICE void put(float &at, float x) { at = x; }
DEVICE void put(bf16 &at, float x) { at.bits = (u16)pack_bf16(x, 0.0f); }
DEVICE void put(f16 &at, float x) { at.bits = (u16)pack_f16(x, 0.0f); }

// As it is after being stored as a T.
template <class T> DEVICE float rounded(float x) {
  T stored;
  put(stored, x);
  return number(stored);
}

DEVICE u32 pack(bf16, float low, float high) { return pack_bf16(low, high); }
DEVICE u32 pack(f16, float low, float high) { return pack_f16(low, high); }

DEVICE void multiply(bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_bf16(d, a, b0, b1);
}
DEVICE void multiply(f16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_f16(d, a, b0, b1);
}

template <int COLUMNS>
DEVICE void multiply_boxes(bf16, float (&d)[COLUMNS / 8][4], const void *a, const void *b, int k) {
  multiply_boxes_bf16(d, operand(a, k), operand(b, k));
}
template <int COLUMNS>
DEVICE void multiply_boxes(f16, float (&d)[COLUMNS / 8][4], const void *a, const void *b, int k) {
  multiply_boxes_f16(d, operand(a, k), operand(b, k));
}

// Sixteen bytes of elements, at an address that is a multiple of 16.
template <class T> struct alignas(16) Line {
  static constexpr int COUNT = 16 / sizeof(T);
  T at[COUNT];
};

// Four numbers at a multiple of four.
template <class T> DEVICE void put_four(T *at, const float (&x)[4]) {
  *(u64 *)at = (u64)pack(T(), x[2], x[3]) << 32 | pack(T(), x[0], x[1]);
}
DEVICE void put_four(float *at, const float (&x)[4]) { *(Line<float> *)at = {{x[0], x[1], x[2], x[3]}}; }

template <class T> DEVICE float squares_of(const Line<T> &line) {
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < Line<T>::COUNT; ++j) squares += number(line.at[j]) * number(line.at[j]);
  return squares;
}

template <class T> DEVICE Line<T> scaled(const Line<T> &line, float factor, const Line<T> &weight) {
  Line<T> made;
#pragma unroll
  for (int j = 0; j < Line<T>::COUNT; ++j) {
    put(made.at[j], number(line.at[j]) * factor * number(weight.at[j]));
  }
  return made;
}

// What a row is multiplied with by its root-mean-square norm.
DEVICE float norm_factor(float squares, int width, float eps) {
  return 1.0f / sqrtf(squares / (float)width + eps);
}

constexpr int BLOCK = 16; // tokens of a page

// The row of a layer's pages, [blocks, kv_heads, BLOCK, head_dim], that a slot (block * BLOCK + offset) names.
DEVICE i64 page_row(i64 slot, int kv_heads, int head) {
  return (slot / BLOCK * kv_heads + head) * BLOCK + slot % BLOCK;
}

// The two of a pair.
template <class T> DEVICE T lower(T, u32 pair) { return T{(u16)pair}; }
template <class T> DEVICE T upper(T, u32 pair) { return T{(u16)(pair >> 16)}; }

// COUNT numbers of a table of angles, from a multiple of two on, and of four if there are as many.
template <int COUNT> struct Angles {
  static constexpr int EACH = COUNT < 4 ? COUNT : 4;
  struct alignas(4 * EACH) Few {
    float at[EACH];
  };
  float at[COUNT];

  METHOD Angles(const float *table) {
#pragma unroll
    for (int j = 0; j < COUNT; j += EACH) {
      const Few few = *(const Few *)(table + j);
#pragma unroll
      for (int i = 0; i < EACH; ++i) at[j + i] = few.at[i];
    }
  }
};

// Rotary embedding: turns the halves of a head against each other.
DEVICE void turn(float &low, float &high, float cos, float sin) {
  const float x = low, y = high;
  low = x * cos - y * sin;
  high = y * cos + x * sin;
}
template <class T> DEVICE void turn(Line<T> &low, Line<T> &high, const float *cos, const float *sin) {
  const Angles<Line<T>::COUNT> cosines(cos), sines(sin);
#pragma unroll
  for (int j = 0; j < Line<T>::COUNT; ++j) {
    float x = number(low.at[j]), y = number(high.at[j]);
    turn(x, y, cosines.at[j], sines.at[j]);
    put(low.at[j], x);
    put(high.at[j], y);
  }
}

DEVICE float minus_infinity() { return __int_as_float((int)0xff800000u); }

// x sigmoid(x), within some ulp of f32: for results that are rounded to 16 bits.
DEVICE float silu_fast(float x) {
  constexpr float LOG2_E = 1.4426950408889634f;
  return x * reciprocal_fast(1.0f + exp2_fast(-LOG2_E * x));
}

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

DEVICE double warp_sum(double x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

DEVICE int warp_min(int x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(ALL_LANES, x, step);
    x = other < x ? other : x;
  }
  return x;
}
