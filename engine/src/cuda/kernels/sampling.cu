// Logits to tokens and their statistics, with the sums of logits.rs: with d = (x - max) / temperature,
// Z = sum e^d, A1 = sum e^d d, B = sum e^2d, C = sum e^2d d.
//
// `sum_slices` sums up slices of a row, a warp each, from its own largest logit; `draw` adds the slices up
// and looks for the token in the one slice that the random number falls into, or that holds the
// largest logit, or is given the token. Tokens lie on the line of the random number in their order.

// As in sampling.rs.
struct Draw {
  const void *logits;   // [rows, vocab], a row `stride` elements after the one before
  const double *how;    // [rows, 2]: 1 / temperature; a number in [0, 1), or -1: the likeliest token
  const i64 *given;     // [rows], tokens that are given; null: they are drawn
  float *slices;        // [rows, slices of a row, 6], see Slice
  float *out;           // [rows, 4]: token, or what is wrong with the row; log-prob, H, E_p[S]
  i64 *tokens;          // [rows]: the token, or 0
  double *sums;         // [rows, 2]: largest logit, Z
  i64 stride;
  int vocab;
  int count;            // slices of a row
};

struct Slice {
  float z, a1, b, c;
  float max;
  int nans; // whether there are any
};

constexpr int EACH = 16; // logits of a lane
constexpr int SLICE = EACH * WARP;
constexpr int DRAWERS = 256;
constexpr int DRAW_WARPS = DRAWERS / WARP;
constexpr int DRAWN = SLICE / DRAWERS; // logits of a thread in the slice that is drawn from
constexpr int NOBODY = 0x7fffffff;

// What `out` says in a token's place.
constexpr float IS_NAN = -1.0f, IS_INFINITE = -2.0f, IS_EMPTY = -3.0f;

DEVICE float not_a_number() { return __int_as_float(0x7fc00000); }

constexpr float LEAST = -3.4028234663852886e38f;

// As in kernels/rows.rs and simd/exp.rs: d is cut off where e^d is 0 already.
DEVICE float cut(float d) { return d < -100.0f ? -100.0f : d; }
DEVICE float weight(float d) { return d < -87.33f ? 0.0f : expf(d); }

// One number for the whole block out of one of each thread; all threads get it. `room` has a place
// for each warp, and is not in use before or after.
template <class V, class Join> DEVICE V joined(V own, V *room, Join join) {
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = own;
  __syncthreads();
  V all = room[0];
  for (int i = 1; i < DRAW_WARPS; ++i) all = join(all, room[i]);
  __syncthreads();
  return all;
}

DEVICE double block_sum(double x, double *room) {
  return joined(warp_sum(x), room, [](double a, double b) { return a + b; });
}
DEVICE float block_max(float x, float *room) {
  return joined(warp_max(x), room, [](float a, float b) { return fmaxf(a, b); });
}
DEVICE int block_min(int x, int *room) {
  return joined(warp_min(x), room, [](int a, int b) { return a < b ? a : b; });
}

// Grid: a row's slices, a block's warps at a time; rows.
template <class T> DEVICE void sum_slices(const Draw &a) {
  const int slice = blockIdx.x * DRAW_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (slice >= a.count) return;
  const i64 row = blockIdx.y;
  const T *logits = (const T *)a.logits + row * a.stride;
  const float factor = (float)a.how[row * 2];
  float x[EACH], max = LEAST;
  int nans = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = slice * SLICE + i * WARP + lane;
    x[i] = at < a.vocab ? number(logits[at]) : minus_infinity();
    max = fmaxf(max, x[i]);
    nans |= x[i] != x[i];
  }
  max = warp_max(max);
  float z = 0.0f, a1 = 0.0f, b = 0.0f, c = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const float d = cut((x[i] - max) * factor), e = weight(d);
    z += e;
    a1 += e * d;
    b += e * e;
    c += e * e * d;
  }
  const Slice sums = {warp_sum(z), warp_sum(a1), warp_sum(b), warp_sum(c), max, -warp_min(-nans)};
  if (lane == 0) ((Slice *)a.slices)[row * a.count + slice] = sums;
}

// A whole row.
struct Row {
  double z, a1, b, c;
  float max;
  int nans;
};

// Adds up the slices; the threads' numbers are moved to the row's largest logit first.
DEVICE Row whole(const Slice *slices, int count, double factor, double *doubles, float *floats) {
  Row row = {0, 0, 0, 0, LEAST, 0};
  for (int i = threadIdx.x; i < count; i += DRAWERS) row.max = fmaxf(row.max, slices[i].max);
  row.max = block_max(row.max, floats);
  for (int i = threadIdx.x; i < count; i += DRAWERS) {
    const Slice s = slices[i];
    const double far = ((double)s.max - row.max) * factor, d = far < -700.0 ? -700.0 : far;
    const double w = exp(d);
    row.z += w * s.z;
    row.a1 += w * (s.a1 + d * s.z);
    row.b += w * w * s.b;
    row.c += w * w * (s.c + d * s.b);
    row.nans += s.nans;
  }
  row.z = block_sum(row.z, doubles);
  row.a1 = block_sum(row.a1, doubles);
  row.b = block_sum(row.b, doubles);
  row.c = block_sum(row.c, doubles);
  row.nans = (int)block_sum(row.nans, doubles);
  return row;
}

// Where a thread's share of something lies among those of all threads: from `before` to `until`.
struct Share {
  double before, until;
};

DEVICE Share share_of(double own, double *room) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  double until = own;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const double other = __shfl_up_sync(ALL_LANES, until, step);
    if (lane >= step) until += other;
  }
  if (lane == WARP - 1) room[warp] = until;
  __syncthreads();
  double before = 0.0;
  for (int i = 0; i < warp; ++i) before += room[i];
  __syncthreads();
  return {before + until - own, before + until};
}

// The first thread whose share reaches beyond `target`, or the last one that has any: then `target`
// lies beyond all of it, by rounding.
DEVICE int owner(double own, Share share, double target, int *room) {
  const int first = block_min(own > 0.0 && share.until > target ? (int)threadIdx.x : NOBODY, room);
  if (first != NOBODY) return first;
  return -block_min(own > 0.0 ? -(int)threadIdx.x : 0, room);
}

// Grid: rows.
template <class T> DEVICE void draw(const Draw &a) {
  __shared__ float floats[DRAW_WARPS];
  __shared__ double doubles[DRAW_WARPS];
  __shared__ int ints[DRAW_WARPS];
  __shared__ int found;
  __shared__ double rest;
  const i64 index = blockIdx.x;
  const T *logits = (const T *)a.logits + index * a.stride;
  const Slice *slices = (const Slice *)a.slices + index * a.count;
  const double factor = a.how[index * 2], u = a.how[index * 2 + 1];
  const Row row = whole(slices, a.count, factor, doubles, floats);
  const bool valid = row.nans == 0 && row.max < -minus_infinity() && row.z > 0.0;
  float *out = a.out + index * 4;
  if (threadIdx.x == 0) {
    a.sums[index * 2] = row.max;
    a.sums[index * 2 + 1] = valid ? row.z : not_a_number();
    found = -1;
  }
  __syncthreads();
  if (!valid) {
    if (threadIdx.x == 0) {
      a.tokens[index] = 0;
      out[0] = row.nans > 0 ? IS_NAN : row.max == -minus_infinity() ? IS_INFINITE : IS_EMPTY;
      out[1] = out[2] = out[3] = not_a_number();
    }
    return;
  }
  if (a.given) {
    if (threadIdx.x == 0) found = (int)a.given[index];
  } else if (u < 0.0) {
    int slice = NOBODY;
    for (int i = threadIdx.x; i < a.count; i += DRAWERS) {
      if (slice == NOBODY && slices[i].max == row.max) slice = i;
    }
    slice = block_min(slice, ints);
    const int start = slice * SLICE + threadIdx.x * DRAWN;
    int first = NOBODY;
    for (int i = DRAWN; i-- > 0;) {
      if (start + i < a.vocab && number(logits[start + i]) == row.max) first = start + i;
    }
    first = block_min(first, ints);
    if (threadIdx.x == 0) found = first;
  } else {
    // A thread's slices follow each other, so that shares do.
    const int each = (a.count + DRAWERS - 1) / DRAWERS, begin = threadIdx.x * each;
    double mass = 0.0;
    const auto mass_of = [&](int i) {
      const double far = ((double)slices[i].max - row.max) * factor;
      return far < -700.0 ? 0.0 : exp(far) * slices[i].z;
    };
    for (int i = begin; i < min(begin + each, a.count); ++i) mass += mass_of(i);
    const double target = u * row.z;
    Share share = share_of(mass, doubles);
    if ((int)threadIdx.x == owner(mass, share, target, ints)) {
      double left = target - share.before;
      for (int i = begin; i < min(begin + each, a.count); ++i) {
        const double m = mass_of(i);
        if (m > 0.0) {
          found = i;
          rest = left;
          if (m > left) break;
        }
        left -= m;
      }
    }
    __syncthreads();
    const int start = found * SLICE + threadIdx.x * DRAWN;
    const double wanted = rest;
    float weights[DRAWN];
    double own = 0.0;
#pragma unroll
    for (int i = 0; i < DRAWN; ++i) {
      const float x = start + i < a.vocab ? number(logits[start + i]) : minus_infinity();
      weights[i] = weight(cut((x - row.max) * (float)factor));
      own += weights[i];
    }
    share = share_of(own, doubles);
    if ((int)threadIdx.x == owner(own, share, wanted, ints)) {
      double left = wanted - share.before;
      bool done = false;
#pragma unroll
      for (int i = 0; i < DRAWN; ++i) {
        if (!done && weights[i] > 0.0f) {
          found = start + i;
          done = weights[i] > left;
        }
        left -= weights[i];
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool there = found >= 0 && found < a.vocab;
    const double x = there ? number(logits[found]) : not_a_number();
    const double log_z = log(row.z), mean = row.a1 / row.z;
    a.tokens[index] = there ? found : 0;
    out[0] = (float)found;
    out[1] = (float)((x - row.max) * factor - log_z);
    out[2] = (float)(log_z - mean);
    out[3] = (float)((row.c - row.b * mean) / (row.z * row.z));
  }
}

struct Gradient {
  const void *logits;   // [rows, vocab], a row `stride` elements after the one before
  void *out;            // [rows, vocab]; may be the logits themselves
  const i64 *tokens;    // [rows]
  const float *scales;  // [rows]
  const double *sums;   // [rows, 2], of `draw`
  i64 stride;
  i64 out_stride;
  int vocab;
  float factor; // 1 / temperature
};

constexpr int GRADIENTS = EACH * DRAWERS; // of a block

// scale * factor * (onehot(token) - p), as a U. Grid: blocks of a row, rows.
template <class T, class U> DEVICE void gradient_as(const Gradient &a) {
  const i64 row = blockIdx.y;
  const T *logits = (const T *)a.logits + row * a.stride;
  U *out = (U *)a.out + row * a.out_stride;
  const float scale = a.scales[row] * a.factor, max = (float)a.sums[row * 2];
  const float share = scale == 0.0f ? 0.0f : (float)(-scale / a.sums[row * 2 + 1]);
  for (int i = 0; i < EACH; ++i) {
    const int at = blockIdx.x * GRADIENTS + i * DRAWERS + threadIdx.x;
    if (at >= a.vocab) break;
    const float p = scale == 0.0f ? 0.0f : weight(cut((number(logits[at]) - max) * a.factor)) * share;
    put(out[at], at == (int)a.tokens[row] ? p + scale : p);
  }
}

template <class T> DEVICE void gradient(const Gradient &a) { gradient_as<T, T>(a); }
template <class T> DEVICE void gradient_bf16(const Gradient &a) { gradient_as<T, bf16>(a); }
template <class T> DEVICE void gradient_f16(const Gradient &a) { gradient_as<T, f16>(a); }
