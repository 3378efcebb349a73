// Attention over pages.
//
// Keys and values are [blocks, kv_heads, 16, HD]. The host cuts the work into tiles: up to 64 query
// rows (positions times the query heads of one KV head) and a range of tokens that lie in one block
// table. A thread block runs one tile for one KV head: 64 tokens a step come into shared memory
// while the step before is computed on tensor cores with an online softmax (arXiv 2307.08691). Of
// the four warps `STRIPS` divide the rows, and those with the same rows divide the step's tokens.
// A row of several tiles leaves pieces; the block that leaves the last of a row's adds them up, by their
// largest scores and sums and in their order.
//
// `attend` finds the keys and values of all tokens in the pages. `decode` is for sequences of one row each:
// the one new token of a tile is normed, turned and stored on the way, and all others are asked for before
// the kernel before has ended.

// As in attention.rs: what `decode` norms, turns and stores, and by what.
struct Unstored {
  const void *k;      // [rows, kv_heads, HD], a row `k_stride` elements after the one before
  const void *v;      // as k
  const float *cos;   // [rows, HD / 2]
  const float *sin;
  const i64 *slots;   // [rows]: block * 16 + offset; -1: it is stored nowhere
  const void *q_norm; // [HD] each: weights of a norm of every head before it is turned; or null
  const void *k_norm;
  int k_stride;
  int v_stride;
  float eps; // of the norms
};

// As in attention.rs.
struct Attend {
  const void *q;           // [rows, heads, HD], a row `q_stride` elements after the one before
  void *keys;              // [blocks, kv_heads, 16, HD]
  void *values;            // as keys
  void *out;               // [rows, heads, HD]
  const int *tables;       // [spans, *table_width]
  const int *table_width;  // there too, because it changes between runs of a graph
  const int *row_span;     // [rows]
  const int *row_position; // [rows]; -1: the row is not in use
  const int *row_pieces;   // [rows + 1]: where a row's pieces begin; none: it is written at once
  const int *tiles;        // [tiles, 6], see Tile
  const int *tile_rows;    // rows of the tiles
  float *pieces;           // [pieces, heads, HD], weighted values
  float *sums;             // [pieces, heads, 2]: largest score, sum of weights
  int *arrived;            // [rows, kv_heads]: pieces that have been left; 0 before and after
  Unstored own;            // for `decode`
  int q_stride;
  int rows;
  int heads;
  int kv_heads;
  int window; // positions that a row sees, its own included
  float scale; // of the scores, times log2(e)
};

struct Tile {
  int first_row; // in tile_rows
  int rows;      // 0: nothing to do
  int span;      // whose block table
  int begin;     // tokens: a multiple of 16,
  int end;       // and the end of them
  int ordinal;   // which of a row's pieces this makes
};

constexpr int STEP = 64;  // tokens at a time
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int MOST_ROWS = 64;

// The rows of a tile, where their pieces begin and how many they are, and what all of them see.
struct Rows {
  int row[MOST_ROWS];
  int position[MOST_ROWS];
  int first[MOST_ROWS];
  int pieces[MOST_ROWS];
  int lowest;
  int highest;
  bool cut; // some have pieces
};

// The tokens of a tile.
struct Tokens {
  int begin;
  int settled; // the end of those that were in the pages before the step
  int fresh;   // the one that was not; -1: there is none
  int end;
};

template <class T, int HD> struct Stage {
  static_assert(STEP * HD * sizeof(T) / 16 % THREADS == 0, "all threads copy as many lines");
  static constexpr int STRIDE = HD + 8; // keeps the rows of a matrix in different banks
  T keys[STEP][STRIDE];
  T values[STEP][STRIDE];
};

// Keys and values of a token that are not in the pages yet.
template <class T, int HD> struct Fresh {
  static constexpr int LINES = HD / 2 / Line<T>::COUNT; // of half a head
  alignas(16) T halves[2][2][HD / 2];                   // lower and upper one, of keys and values

  // The first 2 LINES threads look after a line of each half, from a number on: of keys, then of values.
  METHOD bool active() const { return threadIdx.x < 2 * LINES; }
  METHOD bool is_v() const { return threadIdx.x >= LINES; }
  METHOD int first() const { return threadIdx.x % LINES * Line<T>::COUNT; }

  struct Own {
    Line<T> low, high;
  };

  METHOD Own load(const Attend &a, int row, int head) const {
    if (!active()) return {};
    const T *x = is_v() ? (const T *)a.own.v + (i64)row * a.own.v_stride
                        : (const T *)a.own.k + (i64)row * a.own.k_stride;
    x += head * HD + first();
    return {*(const Line<T> *)x, *(const Line<T> *)(x + HD / 2)};
  }

  // Norms, turns and stores it; a whole warp does.
  METHOD void take(Own own, const Attend &a, int row, int head) {
    const i64 angle = (i64)row * (HD / 2) + first(), slot = a.own.slots[row];
    if (a.own.k_norm) {
      const float squares = warp_sum(is_v() ? 0.0f : squares_of(own.low) + squares_of(own.high));
      const Line<T> *weights = (const Line<T> *)((const T *)a.own.k_norm + first());
      const Line<T> low = weights[0], high = weights[LINES];
      const float factor = norm_factor(squares, HD, a.own.eps);
      if (!is_v()) own = {scaled(own.low, factor, low), scaled(own.high, factor, high)};
    }
    if (!active()) return;
    if (!is_v()) turn(own.low, own.high, a.own.cos + angle, a.own.sin + angle);
    *(Line<T> *)&halves[is_v()][0][first()] = own.low;
    *(Line<T> *)&halves[is_v()][1][first()] = own.high;
    if (slot < 0) return;
    T *page = (T *)(is_v() ? a.values : a.keys) + page_row(slot, a.kv_heads, head) * HD + first();
    *(Line<T> *)page = own.low;
    *(Line<T> *)(page + HD / 2) = own.high;
  }

  // Lays that into a row of a stage.
  METHOD void lay(Stage<T, HD> &stage, int row) const {
    if (!active()) return;
    T *to = (is_v() ? stage.values[row] : stage.keys[row]) + first();
    *(Line<T> *)to = *(const Line<T> *)&halves[is_v()][0][first()];
    *(Line<T> *)(to + HD / 2) = *(const Line<T> *)&halves[is_v()][1][first()];
  }
};

// Begins to copy a step's tokens, but for a fresh one, and zeros beyond the last. `SETTLED`: they were there
// before the step, so it may be before the kernel before has ended.
template <bool SETTLED, class T, int HD>
DEVICE void load_step(Stage<T, HD> &stage, const Attend &a, int span, const Tokens &tokens, int token,
                      int head) {
  constexpr int LINES = HD * sizeof(T) / 16, EACH = STEP * LINES / THREADS;
  if (token < tokens.end) {
    // No copy waits for the place of another. A step begins where a block does.
    const int *table = a.tables + (i64)span * *a.table_width + token / BLOCK;
    int block[EACH];
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int row = (threadIdx.x + n * THREADS) / LINES;
      block[n] = token + row < tokens.settled ? table[row / BLOCK] : 0;
    }
    const int page = a.kv_heads * BLOCK * HD;
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const u32 i = threadIdx.x + n * THREADS, row = i / LINES, part = i % LINES * (16 / sizeof(T));
      const int at = token + (int)row;
      if (SETTLED && at == tokens.fresh) continue;
      const i64 from = (i64)block[n] * page + (head * BLOCK + row % BLOCK) * HD + part;
      copy_async<SETTLED>(&stage.keys[row][part], (const T *)a.keys + from, at < tokens.settled);
      copy_async<SETTLED>(&stage.values[row][part], (const T *)a.values + from, at < tokens.settled);
    }
  }
  commit_copies();
}

// One warp's part of a tile: sixteen rows, two of which every lane looks after. `TURNS`: queries have yet to
// be normed and turned.
template <class T, int HD, int TOKENS, bool TURNS> struct Strip {
  u32 q[HD / 16][4];
  float out[HD / 8][4];
  float largest[2];
  float sum[2];
  int position[2];

  METHOD void start(const Attend &a, const Rows &rows, int first, int count, int head) {
    const int lane = threadIdx.x % WARP, group = a.heads / a.kv_heads;
    int row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = first + lane / 4 + 8 * half;
      const bool valid = at < count * group;
      const int place = valid ? at / group : 0;
      row[half] = rows.row[place];
      position[half] = valid ? rows.position[place] : -1;
      largest[half] = minus_infinity();
      sum[half] = 0.0f;
      const T *query = (const T *)a.q + (i64)row[half] * a.q_stride + (head * group + at % group) * HD;
#pragma unroll
      for (int k = 0; k < HD / 16; ++k) {
        const u32 *pair = (const u32 *)(query + k * 16 + lane % 4 * 2);
        q[k][half] = valid ? pair[0] : 0;
        q[k][half + 2] = valid ? pair[4] : 0;
      }
    }
    // All of them have been asked for by now.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (TURNS && a.own.q_norm) norm_query(half, a);
      if (TURNS && position[half] >= 0) turn_query(half, a, row[half]);
    }
#pragma unroll
    for (int n = 0; n < HD / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
  }

  // Eight numbers of a row's query: a lane has two of them.
  METHOD u32 &eight(int half, int index) { return q[index / 2][half + index % 2 * 2]; }

  METHOD void norm_query(int half, const Attend &a) {
    const u32 *weights = (const u32 *)a.own.q_norm + threadIdx.x % 4;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < HD / 8; ++i) {
      const float x = number(lower(T(), eight(half, i))), y = number(upper(T(), eight(half, i)));
      squares += x * x + y * y;
    }
    squares += __shfl_xor_sync(ALL_LANES, squares, 1);
    squares += __shfl_xor_sync(ALL_LANES, squares, 2);
    const float factor = norm_factor(squares, HD, a.own.eps);
#pragma unroll
    for (int i = 0; i < HD / 8; ++i) {
      u32 &pair = eight(half, i);
      const u32 weight = weights[i * 4];
      const float x = number(lower(T(), pair)) * factor, y = number(upper(T(), pair)) * factor;
      pair = pack(T(), x * number(lower(T(), weight)), y * number(upper(T(), weight)));
    }
  }

  METHOD void turn_query(int half, const Attend &a, int row) {
    constexpr int EIGHTS = HD / 16; // of half a head
    const i64 angle = (i64)row * (HD / 2) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
      u32 &low = eight(half, i), &high = eight(half, i + EIGHTS);
      float x[2] = {number(lower(T(), low)), number(upper(T(), low))};
      float y[2] = {number(lower(T(), high)), number(upper(T(), high))};
      const Angles<2> cos(a.own.cos + angle + i * 8), sin(a.own.sin + angle + i * 8);
#pragma unroll
      for (int j = 0; j < 2; ++j) turn(x[j], y[j], cos.at[j], sin.at[j]);
      low = pack(T(), x[0], x[1]);
      high = pack(T(), y[0], y[1]);
    }
  }

  // Scores of `TOKENS` keys, from `row` of the stage on.
  METHOD void scores(float (&s)[TOKENS / 8][4], const Stage<T, HD> &stage, int row) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = s[n + 1][i] = 0.0f;
#pragma unroll
      for (int k = 0; k < HD / 16; ++k) {
        u32 m[4];
        load_matrices(m, &stage.keys[row + n * 8 + lane / 16 * 8 + lane % 8][k * 16 + lane / 8 % 2 * 8]);
        multiply(T(), s[n], q[k], m[0], m[1]);
        multiply(T(), s[n + 1], q[k], m[2], m[3]);
      }
    }
  }

  // Hides the tokens that a row does not see; `token` is the first one.
  METHOD void hide(float (&s)[TOKENS / 8][4], int token, int end, int window) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = token + n * 8 + lane % 4 * 2 + i % 2, own = position[i / 2];
        if (at >= end || at > own || at <= own - window) s[n][i] = minus_infinity();
      }
    }
  }

  // Scores become weights; what was summed before is weighed anew.
  METHOD void weigh(float (&s)[TOKENS / 8][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = minus_infinity();
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
      top = fmaxf(top * scale, largest[half]);
      // Where nothing has been seen yet all weights are 0.
      const float base = top == minus_infinity() ? 0.0f : top;
      const float factor = exp2_fast(largest[half] - base);
      largest[half] = top;
      sum[half] *= factor;
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2_fast(s[n][i] * scale - base);
          sum[half] += s[n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < HD / 8; ++n) {
        out[n][2 * half] *= factor;
        out[n][2 * half + 1] *= factor;
      }
    }
  }

  METHOD void add_values(const float (&s)[TOKENS / 8][4], const Stage<T, HD> &stage, int row) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < TOKENS / 16; ++k) {
      const u32 weights[4] = {pack(T(), s[2 * k][0], s[2 * k][1]), pack(T(), s[2 * k][2], s[2 * k][3]),
                              pack(T(), s[2 * k + 1][0], s[2 * k + 1][1]),
                              pack(T(), s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < HD / 8; n += 2) {
        u32 m[4];
        load_matrices_transposed(m, &stage.values[row + k * 16 + lane % 16][n * 8 + lane / 16 * 8]);
        multiply(T(), out[n], weights, m[0], m[1]);
        multiply(T(), out[n + 1], weights, m[2], m[3]);
      }
    }
  }
};

// What the warps of a tile found, to be put together; takes the place of the stages.
template <int HD> struct Found {
  float out[WARPS][16][HD + 4];
  float largest[WARPS][16];
  float sum[WARPS][16];
};

template <class T, int HD, int TOKENS, bool TURNS>
DEVICE void leave(Found<HD> &found, Strip<T, HD, TOKENS, TURNS> &strip) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = strip.sum[half];
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    const int row = lane / 4 + 8 * half;
    if (lane % 4 == 0) {
      found.largest[warp][row] = strip.largest[half];
      found.sum[warp][row] = sum;
    }
#pragma unroll
    for (int n = 0; n < HD / 8; ++n) {
      float *at = &found.out[warp][row][n * 8 + lane % 4 * 2];
      at[0] = strip.out[n][2 * half];
      at[1] = strip.out[n][2 * half + 1];
    }
  }
}

// Where the result has a row and head.
template <class T, int HD> DEVICE T *result(const Attend &a, int row, int query_head) {
  return (T *)a.out + ((i64)row * a.heads + query_head) * HD;
}

// Puts the warps' parts together and writes them: as the result, or as a piece of it.
template <class T, int HD, int STRIPS>
DEVICE void write(const Found<HD> &found, const Attend &a, const Tile &tile, const Rows &rows, int head) {
  constexpr int SHARERS = WARPS / STRIPS;
  const int group = a.heads / a.kv_heads;
  for (int i = threadIdx.x; i < tile.rows * group * (HD / 4); i += THREADS) {
    const int at = i / (HD / 4), d = i % (HD / 4) * 4, strip = at / 16 * SHARERS;
    float largest = minus_infinity();
    for (int w = 0; w < SHARERS; ++w) largest = fmaxf(largest, found.largest[strip + w][at % 16]);
    const float base = largest == minus_infinity() ? 0.0f : largest;
    float sum = 0.0f, out[4] = {};
    for (int w = 0; w < SHARERS; ++w) {
      const float factor = exp2_fast(found.largest[strip + w][at % 16] - base);
      sum += factor * found.sum[strip + w][at % 16];
      for (int j = 0; j < 4; ++j) out[j] += factor * found.out[strip + w][at % 16][d + j];
    }
    const int member = at / group, query_head = head * group + at % group;
    if (rows.pieces[member] == 0) {
      for (int j = 0; j < 4; ++j) out[j] /= sum;
      put_four(result<T, HD>(a, rows.row[member], query_head) + d, out);
      continue;
    }
    const i64 piece = (i64)(rows.first[member] + tile.ordinal) * a.heads + query_head;
    put_four(&a.pieces[piece * HD + d], out);
    if (d == 0) {
      a.sums[piece * 2] = largest;
      a.sums[piece * 2 + 1] = sum;
    }
  }
}

// Of the rows and heads of a tile whose last piece has been left.
struct Whole {
  int pieces[MOST_ROWS]; // 0: it has not
  float largest[MOST_ROWS];
  float inverse[MOST_ROWS]; // of the sum of weights
};

// Finds them; all pieces of other blocks can be read then.
DEVICE void find_whole(Whole &whole, const Attend &a, const Tile &tile, const Rows &rows, int head) {
  const int group = a.heads / a.kv_heads, at = threadIdx.x;
  __shared__ bool last[MOST_ROWS];
  __syncthreads();
  if (at < tile.rows) {
    int *arrived = &a.arrived[rows.row[at] * a.kv_heads + head];
    last[at] = rows.pieces[at] > 0 && count_up(*arrived) == rows.pieces[at] - 1;
    if (last[at]) *arrived = 0;
  }
  __syncthreads();
  if (at < tile.rows * group) {
    const int member = at / group, count = last[member] ? rows.pieces[member] : 0;
    const float *sums = a.sums + ((i64)rows.first[member] * a.heads + head * group + at % group) * 2;
    float largest = minus_infinity(), sum = 0.0f;
#pragma unroll 4
    for (int piece = 0; piece < count; ++piece) {
      const float top = load_coherent(&sums[(i64)piece * a.heads * 2]);
      const float part = load_coherent(&sums[(i64)piece * a.heads * 2 + 1]);
      const float base = fmaxf(largest, top);
      // Neither has seen anything: the sum stays 0.
      if (base == minus_infinity()) continue;
      sum = sum * exp2_fast(largest - base) + part * exp2_fast(top - base);
      largest = base;
    }
    whole.pieces[at] = count;
    whole.largest[at] = largest;
    whole.inverse[at] = 1.0f / sum;
  }
  __syncthreads();
}

// Puts the rows together whose last piece has been left: so many lines of a thread at a time, since an
// answer takes its time.
template <class T, int HD>
DEVICE void merge_rows(const Attend &a, const Tile &tile, const Rows &rows, int head) {
  constexpr int EACH = 4;
  __shared__ Whole whole;
  const int group = a.heads / a.kv_heads, lines = tile.rows * group * (HD / 4);
  find_whole(whole, a, tile, rows, head);
  for (int begin = threadIdx.x; begin < lines; begin += EACH * THREADS) {
    float out[EACH][4] = {};
    int left = 0;
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int i = begin + n * THREADS;
      if (i < lines) left = max(left, whole.pieces[i / (HD / 4)]);
    }
    for (int ordinal = 0; ordinal < left; ++ordinal) {
      float top[EACH], four[EACH][4];
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        const int i = begin + n * THREADS, at = i < lines ? i / (HD / 4) : 0;
        const int piece = rows.first[at / group] + (ordinal < whole.pieces[at] ? ordinal : 0);
        const i64 from = (i64)piece * a.heads + head * group + at % group;
        top[n] = load_coherent(&a.sums[from * 2]);
        load_coherent(four[n], &a.pieces[from * HD + i % (HD / 4) * 4]);
      }
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        const int i = begin + n * THREADS, at = i < lines ? i / (HD / 4) : 0;
        if (i >= lines || ordinal >= whole.pieces[at]) continue;
        const float factor = exp2_fast(top[n] - whole.largest[at]) * whole.inverse[at];
#pragma unroll
        for (int j = 0; j < 4; ++j) out[n][j] += factor * four[n][j];
      }
    }
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int i = begin + n * THREADS, at = i / (HD / 4);
      if (i >= lines || whole.pieces[at] == 0) continue;
      T *to = result<T, HD>(a, rows.row[at / group], head * group + at % group);
      put_four(to + i % (HD / 4) * 4, out[n]);
    }
  }
}

// Lets pages of tokens, from a multiple of 16 on, come into the second cache; what is written to them
// meanwhile comes there, too.
template <class T, int HD> DEVICE void fetch_pages(const Attend &a, int span, int begin, int end, int head) {
  constexpr int BYTES = BLOCK * HD * sizeof(T);
  const int *table = a.tables + (i64)span * *a.table_width;
  const int first = begin / BLOCK, pages = (end + BLOCK - 1) / BLOCK - first;
  for (int i = threadIdx.x; i < 2 * pages; i += THREADS) {
    const i64 from = ((i64)table[first + i / 2] * a.kv_heads + head) * BLOCK * HD;
    fetch_ahead((const T *)(i % 2 ? a.values : a.keys) + from, BYTES);
  }
}

template <class T, int HD, int STRIPS, bool DECODES>
DEVICE void attend_tile(unsigned char *memory, const Attend &a, const Tile &tile, const Rows &rows,
                        const Tokens &tokens, int head) {
  constexpr int SHARERS = WARPS / STRIPS, TOKENS = STEP / SHARERS;
  __shared__ Fresh<T, HD> fresh;
  Stage<T, HD> *stages = (Stage<T, HD> *)memory;
  const int warp = threadIdx.x / WARP, part = warp % SHARERS * TOKENS;
  const bool takes = DECODES && tokens.fresh >= 0 && warp == 0;

  if (!DECODES) wait_for_kernel_before();
  load_step<DECODES>(stages[0], a, tile.span, tokens, tokens.begin, head);
  load_step<DECODES>(stages[1], a, tile.span, tokens, tokens.begin + STEP, head);
  if (DECODES) {
    fetch_pages<T, HD>(a, tile.span, tokens.begin + 2 * STEP, tokens.end, head);
    wait_for_kernel_before();
  }
  typename Fresh<T, HD>::Own own = {};
  if (takes) own = fresh.load(a, rows.row[0], head);
  Strip<T, HD, TOKENS, DECODES> strip;
  strip.start(a, rows, warp / SHARERS * 16, tile.rows, head);
  if (takes) fresh.take(own, a, rows.row[0], head);

  int current = 0;
  for (int token = tokens.begin; token < tokens.end; token += STEP) {
    Stage<T, HD> &stage = stages[current];
    wait_for_copies<1>();
    const int row = tokens.fresh - token;
    if (takes && row >= 0 && row < STEP) fresh.lay(stage, row);
    __syncthreads();
    float s[TOKENS / 8][4];
    strip.scores(s, stage, part);
    const bool all_seen = token + STEP <= tokens.end && token + STEP <= rows.lowest + 1 &&
                          token > rows.highest - a.window;
    if (!all_seen) strip.hide(s, token + part, tokens.end, a.window);
    strip.weigh(s, a.scale);
    strip.add_values(s, stage, part);
    __syncthreads();
    load_step<DECODES>(stage, a, tile.span, tokens, token + 2 * STEP, head);
    current = 1 - current;
  }
  Found<HD> &found = *(Found<HD> *)memory;
  leave(found, strip);
  __syncthreads();
  write<T, HD, STRIPS>(found, a, tile, rows, head);
  if (rows.cut) merge_rows<T, HD>(a, tile, rows, head);
}

// What of a tile is read by all of its rows.
DEVICE void load_rows(Rows &rows, const Attend &a, const Tile &tile) {
  if (threadIdx.x >= WARP) return;
  int lowest = 0x7fffffff, highest = 0, most = 0;
  for (int i = threadIdx.x; i < tile.rows; i += WARP) {
    const int row = a.tile_rows[tile.first_row + i], position = a.row_position[row];
    const int first = a.row_pieces[row];
    rows.row[i] = row;
    rows.position[i] = position;
    rows.first[i] = first;
    rows.pieces[i] = a.row_pieces[row + 1] - first;
    lowest = min(lowest, position);
    highest = max(highest, position);
    most = max(most, rows.pieces[i]);
  }
  lowest = warp_min(lowest);
  highest = -warp_min(-highest);
  most = -warp_min(-most);
  if (threadIdx.x == 0) {
    rows.lowest = lowest;
    rows.highest = highest;
    rows.cut = most > 0;
  }
}

template <class T, int HD, bool DECODES> DEVICE void run(const Attend &a) {
  SHARED_MEMORY(memory, 16);
  __shared__ Rows rows;
  let_kernel_after_begin();
  const int head = blockIdx.x % a.kv_heads;
  const Tile tile = ((const Tile *)a.tiles)[blockIdx.x / a.kv_heads];
  if (tile.rows == 0) return end_idle();
  load_rows(rows, a, tile);
  __syncthreads();
  const int first_seen = rows.lowest - a.window + 1;
  Tokens tokens = {tile.begin, tile.end, -1, tile.end};
  if (first_seen > tile.begin) tokens.begin = first_seen / BLOCK * BLOCK;
  // What a tile of several rows reads is before all of them.
  if (DECODES && rows.lowest < tile.end) tokens.settled = tokens.fresh = rows.lowest;
  if (!DECODES) fetch_pages<T, HD>(a, tile.span, tokens.begin, tokens.end, head);
  if (tile.rows * (a.heads / a.kv_heads) <= 16) {
    attend_tile<T, HD, 1, DECODES>(memory, a, tile, rows, tokens, head);
  } else {
    attend_tile<T, HD, 4, DECODES>(memory, a, tile, rows, tokens, head);
  }
}

// Grid: tiles times kv_heads; empty tiles are the last. Shared memory: two stages. What the plan says is
// there before all kernels of a step.
template <class T, int HD> DEVICE void attend(const Attend &a) { run<T, HD, false>(a); }
template <class T, int HD> DEVICE void decode(const Attend &a) { run<T, HD, true>(a); }

// The same without tensor cores, for f32: a warp for each row and head, a token at a time.
template <class T, int HD> DEVICE void attend_plainly(const Attend &a) {
  constexpr int EACH = (HD + WARP - 1) / WARP;
  const int index = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (index >= a.rows * a.heads) return;
  const int row = index / a.heads, head = index % a.heads;
  const int position = a.row_position[row];
  if (position < 0) return;
  const int *table = a.tables + (i64)a.row_span[row] * *a.table_width;
  float q[EACH], out[EACH];
  for (int i = 0; i < EACH; ++i) {
    const int d = lane + i * WARP;
    q[i] = d < HD ? number(((const T *)a.q)[(i64)row * a.q_stride + head * HD + d]) : 0.0f;
    out[i] = 0.0f;
  }
  float largest = minus_infinity(), sum = 0.0f;
  for (int token = max(0, position - a.window + 1); token <= position; ++token) {
    const i64 block = (i64)table[token / BLOCK] * a.kv_heads + head / (a.heads / a.kv_heads);
    const i64 from = (block * BLOCK + token % BLOCK) * HD + lane;
    float score = 0.0f;
    for (int i = 0; i < EACH; ++i) {
      if (lane + i * WARP < HD) score += q[i] * number(((const T *)a.keys)[from + i * WARP]);
    }
    score = warp_sum(score) * a.scale;
    const float top = fmaxf(largest, score);
    const float factor = exp2_fast(largest - top), weight = exp2_fast(score - top);
    largest = top;
    sum = sum * factor + weight;
    for (int i = 0; i < EACH; ++i) {
      if (lane + i * WARP < HD) {
        out[i] = out[i] * factor + weight * number(((const T *)a.values)[from + i * WARP]);
      }
    }
  }
  for (int i = 0; i < EACH; ++i) {
    const int d = lane + i * WARP;
    if (d < HD) put(((T *)a.out)[((i64)row * a.heads + head) * HD + d], out[i] / sum);
  }
}
