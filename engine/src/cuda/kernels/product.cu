// x W^T for few rows of x, where reading W is what takes the time.
//
// The tensor cores' first matrix are rows of W, its second one rows of x: of those there may be few.
// A tile is 32 rows of W for each of `ACROSS` warps, and all of x; a unit of work is a tile over one
// slice of the depth, which `ALONG` warps divide. Every thread block takes an equal run of the units:
// some tiles, an equal part of one, or, if the number of blocks is no multiple of the tiles', whatever
// they belong to (stream-K, arXiv 2301.03598). It has `STAGES - 1` units on their way from memory while
// it computes one. Where a tile is shared, each block leaves a piece of it, and whichever comes last adds
// them up, in the order of the depth: the result does not depend on who that was.

// As in product.rs.
struct Product {
  const void *x;      // [rows, depth]
  const void *weight; // [width, depth]
  const void *bias;   // [width], or null
  void *out;          // [rows, width], or [rows, width / 2] if gated
  float *pieces;      // [blocks, 2, COLUMNS * rows of a tile]
  int *arrived;       // [tiles]: pieces that have been left; 0 before and after
  int rows;           // at most COLUMNS
  int depth;          // a multiple of 8
  int width;          // a multiple of 8, twice one if gated
  int gated;          // the result is silu(first half) * second half
  int wide;           // out is f32
};

template <class T, int COLUMNS, int ACROSS, int ALONG, int SLICE, int STAGES> struct Multiplier {
  static constexpr int THREADS = ACROSS * ALONG * WARP;
  static constexpr int ROWS = 32 * ACROSS;
  static constexpr int STRIDE = SLICE + 8; // keeps the rows of a matrix in different banks
  static constexpr int LINE = 16 / sizeof(T);
  static constexpr int LINES = SLICE / LINE;
  static constexpr int APART = THREADS / LINES; // rows from a thread's line of a slice to its next one
  static constexpr int X_LINES = (COLUMNS + APART - 1) / APART;
  static constexpr int STEPS = SLICE / 16 / ALONG;
  static constexpr bool MORE = ALONG > 1;
  static_assert(SLICE % (16 * ALONG) == 0 && COLUMNS % 16 == 0 && THREADS % LINES == 0);

  struct Stage {
    T weight[ROWS][STRIDE];
    T x[COLUMNS][STRIDE];
  };

  struct Memory {
    Stage stages[STAGES];
    // What the warps along the depth have, but for the first of them.
    Line<float> sums[MORE ? ALONG - 1 : 1][MORE ? COLUMNS / 4 : 1][MORE ? ACROSS * WARP : 1];
  };

  // Where a unit lies.
  struct Unit {
    int tile;
    int slice;

    METHOD void advance(int slices) {
      if (++slice == slices) {
        slice = 0;
        ++tile;
      }
    }
  };

  const Product &a;
  Memory &memory;
  int slices, units;
  float sums[2][COLUMNS / 8][4]; // a lane's part of 32 rows of W by all of x

  METHOD Multiplier(const Product &a, unsigned char *memory) : a(a), memory(*(Memory *)memory) {
    slices = (a.depth + SLICE - 1) / SLICE;
    units = (a.width + ROWS - 1) / ROWS * slices;
    clear();
  }

  METHOD void clear() {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[f][j][i] = 0.0f;
      }
    }
  }

  METHOD int first_unit(int block) { return (int)((i64)block * units / gridDim.x); }
  METHOD int block_of(int unit) { return (int)((((i64)unit + 1) * gridDim.x - 1) / units); }

  // The row of W that is a tile's row; -1 if there is none. A gated tile has sixteen rows of the first
  // half, then the same ones of the second, and so on: one lane has both.
  METHOD int weight_row(int tile, int row) {
    if (!a.gated) return tile * ROWS + row < a.width ? tile * ROWS + row : -1;
    const int half = a.width / 2, within = tile * (ROWS / 2) + row / 32 * 16 + row % 16;
    return within < half ? row / 16 % 2 * half + within : -1;
  }

  // Calls `load` with number, row, place and depth of each line of a slice that is this thread's, of so
  // many rows.
  template <int COUNT, class F> METHOD void each_line(int slice, F load) {
    const int first = threadIdx.x / LINES, part = threadIdx.x % LINES * LINE;
#pragma unroll
    for (int n = 0; n < (COUNT + APART - 1) / APART; ++n) {
      const int row = first + n * APART;
      if (COUNT % APART == 0 || row < COUNT) load(n, row, part, slice * SLICE + part);
    }
  }

  METHOD void load_weight(Stage &stage, Unit unit) {
    each_line<ROWS>(unit.slice, [&](int, int row, int part, int depth) {
      const int from = weight_row(unit.tile, row);
      const bool valid = from >= 0 && depth < a.depth;
      const T *weight = (const T *)a.weight + (valid ? (i64)from * a.depth + depth : 0);
      copy_ahead(&stage.weight[row][part], weight, valid);
    });
  }

  METHOD void load_x(Stage &stage, Unit unit) {
    each_line<COLUMNS>(unit.slice, [&](int, int row, int part, int depth) {
      const bool valid = row < a.rows && depth < a.depth;
      const T *x = (const T *)a.x + (valid ? (i64)row * a.depth + depth : 0);
      copy_async(&stage.x[row][part], x, valid);
    });
  }

  // x of the first `count` units, at once: it does not wait for copies that were begun before. All is asked
  // for before any of it is stored, since an answer takes its time.
  METHOD void load_first_x(Unit unit, int count) {
    Line<T> lines[STAGES - 1][X_LINES];
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
      each_line<COLUMNS>(unit.slice, [&](int n, int row, int, int depth) {
        lines[s][n] = {};
        if (s < count && row < a.rows && depth < a.depth) {
          lines[s][n] = *(const Line<T> *)((const T *)a.x + (i64)row * a.depth + depth);
        }
      });
      unit.advance(slices);
    }
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
      each_line<COLUMNS>(0, [&](int n, int row, int part, int) {
        *(Line<T> *)&memory.stages[s].x[row][part] = lines[s][n];
      });
    }
  }

  METHOD void multiply_slice(const Stage &stage) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first = warp % ACROSS * 32, part = warp / ACROSS * STEPS;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int k = (part + step) * 16;
      u32 w[2][4];
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        load_matrices(w[f], &stage.weight[first + f * 16 + lane % 16][k + lane / 16 * 8]);
      }
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j += 2) {
        u32 m[4];
        load_matrices(m, &stage.x[j * 8 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          multiply(T(), sums[f][j], w[f], m[0], m[1]);
          multiply(T(), sums[f][j + 1], w[f], m[2], m[3]);
        }
      }
    }
  }

  // Adds up what the warps along the depth have; the first of them have it then, and this is true for
  // them.
  METHOD bool gather() {
    const int warp = threadIdx.x / WARP, along = warp / ACROSS, place = threadIdx.x % (ACROSS * WARP);
    if (!MORE) return true;
    if (along > 0) {
#pragma unroll
      for (int c = 0; c < COLUMNS / 4; ++c) memory.sums[along - 1][c][place] = line(c);
    }
    __syncthreads();
    if (along > 0) return false;
    for (int other = 0; other < ALONG - 1; ++other) {
#pragma unroll
      for (int c = 0; c < COLUMNS / 4; ++c) add(c, memory.sums[other][c][place]);
    }
    return true;
  }

  // Four of a lane's sums.
  METHOD Line<float> line(int c) {
    Line<float> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.at[i] = sums[c % 2][c / 2][i];
    return four;
  }

  METHOD void add(int c, const Line<float> &four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[c % 2][c / 2][i] += four.at[i];
  }

  METHOD Line<float> *piece(int block, int tile) {
    // A block's first tile may have begun before it, and its last one may end after it.
    const int which = first_unit(block) > tile * slices ? 0 : 1;
    return (Line<float> *)a.pieces + ((i64)block * 2 + which) * (COLUMNS / 4) * (ACROSS * WARP);
  }

  // Leaves what `has` sums of a tile; true for the last block that does, whose sums are the whole
  // tile's then.
  METHOD bool share(int tile, bool has) {
    __shared__ int before;
    const int place = threadIdx.x % (ACROSS * WARP);
    const int first = block_of(tile * slices), last = block_of((tile + 1) * slices - 1);
    if (first == last) return true;
    if (has) {
      Line<float> *own = piece(blockIdx.x, tile);
#pragma unroll
      for (int c = 0; c < COLUMNS / 4; ++c) own[c * ACROSS * WARP + place] = line(c);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      // What the barriers order for this thread, the fences order for all.
      __threadfence();
      before = atomicAdd(&a.arrived[tile], 1);
      __threadfence();
    }
    __syncthreads();
    if (before != last - first) return false;
    if (threadIdx.x == 0) a.arrived[tile] = 0;
    if (!has) return true;
    clear();
    for (int block = first; block <= last; ++block) {
      const Line<float> *left = piece(block, tile);
#pragma unroll
      for (int c = 0; c < COLUMNS / 4; ++c) {
        Line<float> four;
        load_coherent(four.at, &left[c * ACROSS * WARP + place]);
        add(c, four);
      }
    }
    return true;
  }

  METHOD void finish(int tile) {
    const bool has = gather();
    if (share(tile, has) && has) write(tile);
    clear();
  }

  // Adds the bias of two rows of W, eight apart, to a lane's sums of these.
  METHOD void add_bias(float (&sums)[COLUMNS / 8][4], int row) {
    if (!a.bias) return;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int at = row + i * 4;
      const float bias = at < a.width ? number(((const T *)a.bias)[at]) : 0.0f;
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
        sums[j][i] += bias;
        sums[j][i + 1] += bias;
      }
    }
  }

  METHOD void write(int tile) {
    const int lane = threadIdx.x % WARP, across = threadIdx.x / WARP % ACROSS;
    const int half = a.width / 2;
    if (a.gated) {
      const int first = tile * (ROWS / 2) + across * 16;
      add_bias(sums[0], first + lane / 4);
      add_bias(sums[1], half + first + lane / 4);
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][j][i] = silu_fast(sums[0][j][i]) * sums[1][j][i];
        store(sums[0][j], first, j * 8, half);
      }
      return;
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int first = tile * ROWS + across * 32 + f * 16;
      add_bias(sums[f], first + lane / 4);
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) store(sums[f][j], first, j * 8, a.width);
    }
  }

  // Writes 16 rows of W from `row` on by 8 rows of x from `column` on. Neighbours of a column lie four
  // lanes apart; of two of them one stores both of one column, the other those of the next.
  METHOD void store(const float (&v)[4], int row, int column, int width) {
    const int lane = threadIdx.x % WARP, odd = lane / 4 % 2;
#pragma unroll
    for (int low = 0; low < 4; low += 2) {
      const int at = row + lane / 4 + low * 4;
      if (a.wide) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int x = column + lane % 4 * 2 + i;
          if (x < a.rows && at < width) ((float *)a.out)[(i64)x * width + at] = v[low + i];
        }
        continue;
      }
      const float other = __shfl_xor_sync(ALL_LANES, odd ? v[low] : v[low + 1], 4);
      const u32 pair = odd ? pack(T(), other, v[low + 1]) : pack(T(), v[low], other);
      const int x = column + lane % 4 * 2 + odd;
      if (x < a.rows && at < width) *(u32 *)((T *)a.out + (i64)x * width + at - odd) = pair;
    }
  }

  METHOD void run() {
    const int begin = first_unit(blockIdx.x), end = first_unit(blockIdx.x + 1);
    Unit next = {begin / slices, begin % slices}, current = next;
    // Weights are there already, whatever the kernel before makes.
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) {
      if (begin + s < end) load_weight(memory.stages[s], next);
      next.advance(slices);
      commit_copies();
    }
    wait_for_kernel_before();
    let_kernel_after_begin();
    load_first_x(current, end - begin);
    for (int unit = begin, stage = 0; unit < end; ++unit) {
      wait_for_copies<STAGES - 2>();
      __syncthreads();
      if (unit + STAGES - 1 < end) {
        Stage &free = memory.stages[stage == 0 ? STAGES - 1 : stage - 1];
        load_weight(free, next);
        load_x(free, next);
        next.advance(slices);
      }
      commit_copies();
      multiply_slice(memory.stages[stage]);
      if (current.slice == slices - 1 || unit + 1 == end) finish(current.tile);
      current.advance(slices);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
  }
};

// Grid: at most as many blocks as there are units; they need not all run at once. Shared memory: Memory.
template <class T, int COLUMNS, int ACROSS, int ALONG, int SLICE, int STAGES>
DEVICE void product(const Product &a) {
  SHARED_MEMORY(memory);
  Multiplier<T, COLUMNS, ACROSS, ALONG, SLICE, STAGES>(a, memory).run();
}
