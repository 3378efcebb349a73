// What lies between the matrix products, forward only. Numbers are rounded once, at the end.

// As in elementwise.rs.
struct Norm {
  const void *x;      // [rows, width]
  const void *added;  // as x, or null
  const void *weight; // [width]
  void *sum;          // x + added, where there is something to add
  void *out;          // [rows, width]
  int width;          // a multiple of 8
  float eps;
};

constexpr int NORM_THREADS = 256;
constexpr int KEPT = 4; // lines that a thread keeps until their row is summed up

// What line `i` of the row is normed from; stored where it is a sum.
template <class T> DEVICE Line<T> summed(const Norm &a, i64 row, int i) {
  typedef Line<T> L;
  L line = ((const L *)a.x)[row + i];
  if (a.added) {
    const L more = ((const L *)a.added)[row + i];
#pragma unroll
    for (int j = 0; j < L::COUNT; ++j) put(line.at[j], number(line.at[j]) + number(more.at[j]));
    ((L *)a.sum)[row + i] = line;
  }
  return line;
}

// out = sum / sqrt(mean(sum^2) + eps) * weight. Grid: rows.
template <class T> DEVICE void rms_norm(const Norm &a) {
  typedef Line<T> L;
  __shared__ float parts[NORM_THREADS / WARP];
  const int lines = a.width / L::COUNT, rest = threadIdx.x + KEPT * NORM_THREADS;
  const i64 row = (i64)blockIdx.x * lines;
  const L *weights = (const L *)a.weight;
  L *out = (L *)a.out + row;
  L kept[KEPT], weight[KEPT];
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    const int i = threadIdx.x + k * NORM_THREADS;
    if (i >= lines) continue;
    weight[k] = weights[i];
    kept[k] = summed<T>(a, row, i);
    squares += squares_of(kept[k]);
  }
  for (int i = rest; i < lines; i += NORM_THREADS) squares += squares_of(summed<T>(a, row, i));
  squares = warp_sum(squares);
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = squares;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < NORM_THREADS / WARP; ++i) total += parts[i];
  const float factor = norm_factor(total, a.width, a.eps);
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    const int i = threadIdx.x + k * NORM_THREADS;
    if (i < lines) out[i] = scaled(kept[k], factor, weight[k]);
  }
  const L *from = (const L *)(a.added ? a.sum : a.x) + row;
  for (int i = rest; i < lines; i += NORM_THREADS) out[i] = scaled(from[i], factor, weights[i]);
}

struct Rotate {
  const void *x;    // [rows, heads, head_dim], a row `stride` elements after the one before
  const float *cos; // [rows, head_dim / 2]
  const float *sin;
  void *out;        // [rows, heads, head_dim]
  int heads;
  int half;
  int stride;
};

// Turns the halves of every head against each other. Grid: rows. Block: 128.
template <class T> DEVICE void rotate(const Rotate &a) {
  const i64 row = blockIdx.x;
  for (int i = threadIdx.x; i < a.heads * a.half; i += 128) {
    const int d = i % a.half, at = i / a.half * 2 * a.half + d;
    const float cos = a.cos[row * a.half + d], sin = a.sin[row * a.half + d];
    const T *x = (const T *)a.x + row * a.stride + at;
    T *out = (T *)a.out + row * a.heads * 2 * a.half + at;
    float low = number(x[0]), high = number(x[a.half]);
    turn(low, high, cos, sin);
    put(out[0], low);
    put(out[a.half], high);
  }
}

struct RotateWrite {
  const void *q;    // [rows, heads, head_dim], a row `q_stride` elements after the one before
  const void *k;    // [rows, kv_heads, head_dim]
  const void *v;    // as k
  const float *cos; // [rows, head_dim / 2]
  const float *sin;
  const i64 *slots; // [rows]: block * 16 + offset; -1: the row is not in use
  void *out;        // [rows, heads, head_dim]: q, turned
  void *keys;       // [blocks, kv_heads, 16, head_dim]: k, turned
  void *values;     // as keys
  int heads;
  int kv_heads;
  int half; // a multiple of 8, as the strides are
  int q_stride;
  int k_stride;
  int v_stride;
};

// Turns q and k, and stores k and v in their pages. Grid: rows, and as many blocks of 128 as they have
// lines in the lower halves of heads of q, k and v.
template <class T> DEVICE void rotate_write(const RotateWrite &a) {
  typedef Line<T> L;
  const int each = a.half / L::COUNT, i = blockIdx.y * 128 + threadIdx.x;
  if (i >= (a.heads + 2 * a.kv_heads) * each) return;
  const i64 row = blockIdx.x, slot = a.slots[row];
  const int head = i / each, d = i % each * L::COUNT, dim = 2 * a.half;
  const int kv = (head - a.heads) % a.kv_heads;
  const bool is_q = head < a.heads, is_v = head >= a.heads + a.kv_heads;
  if (!is_q && slot < 0) return;
  const T *x = is_q   ? (const T *)a.q + row * a.q_stride + head * dim
               : is_v ? (const T *)a.v + row * a.v_stride + kv * dim
                      : (const T *)a.k + row * a.k_stride + kv * dim;
  const i64 page = is_q ? 0 : page_row(slot, a.kv_heads, kv) * dim;
  T *out = is_q   ? (T *)a.out + (row * a.heads + head) * dim
           : is_v ? (T *)a.values + page
                  : (T *)a.keys + page;
  L low = *(const L *)(x + d), high = *(const L *)(x + d + a.half);
  if (!is_v) turn(low, high, a.cos + row * a.half + d, a.sin + row * a.half + d);
  *(L *)(out + d) = low;
  *(L *)(out + d + a.half) = high;
}

struct Gate {
  const void *gate; // [rows, width], a row `stride` elements after the one before
  const void *up;   // as gate
  void *out;        // [rows, width]
  i64 lines;        // of 16 bytes, in all
  int width_lines;
  int stride_lines;
};

// silu(gate) * up. Grid: as many blocks of 256 as there are lines.
template <class T> DEVICE void swiglu(const Gate &a) {
  typedef Line<T> L;
  const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i >= a.lines) return;
  const i64 from = i / a.width_lines * a.stride_lines + i % a.width_lines;
  const L gate = ((const L *)a.gate)[from], up = ((const L *)a.up)[from];
  L out;
#pragma unroll
  for (int j = 0; j < L::COUNT; ++j) {
    const float x = number(gate.at[j]);
    put(out.at[j], x / (1.0f + expf(-x)) * number(up.at[j]));
  }
  ((L *)a.out)[i] = out;
}

struct GateGradient {
  const void *gate; // [elements], as all of these
  const void *up;
  const void *gradient; // by the output
  void *by_gate;
  void *by_up;
  i64 lines; // of 16 bytes
};

// Grid: as many blocks of 256 as there are lines.
template <class T> DEVICE void swiglu_gradient(const GateGradient &a) {
  typedef Line<T> L;
  const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i >= a.lines) return;
  const L gate = ((const L *)a.gate)[i], up = ((const L *)a.up)[i];
  const L gradient = ((const L *)a.gradient)[i];
  L by_gate, by_up;
#pragma unroll
  for (int j = 0; j < L::COUNT; ++j) {
    const float x = number(gate.at[j]), g = number(gradient.at[j]);
    const float sigmoid = 1.0f / (1.0f + expf(-x));
    put(by_up.at[j], g * x * sigmoid);
    put(by_gate.at[j], g * number(up.at[j]) * sigmoid * (1.0f + x * (1.0f - sigmoid)));
  }
  ((L *)a.by_gate)[i] = by_gate;
  ((L *)a.by_up)[i] = by_up;
}
