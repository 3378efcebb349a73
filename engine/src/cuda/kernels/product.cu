// x W^T for few rows of x, where reading W is what takes the time: for compute capability 9.0.
//
// The tensor cores' first matrix are rows of W, its second one rows of x: of those there may be few.
// A tile is 128 rows of W for each of `GROUPS` groups of four warps, and all of x; a unit of work is a
// tile over one slice of the depth. One thread asks for the slices, in boxes that the hardware copies into
// shared memory, `STAGES` of them under way; the groups multiply what has come. Every thread block takes
// an equal run of the units: some tiles, an equal part of one, or, if the number of blocks is no multiple
// of the tiles', whatever they belong to (stream-K, arXiv 2301.03598). Where a tile is shared, each block
// leaves a piece of it, and whichever comes last adds them up, in the order of the depth: the result does
// not depend on who that was.

// As in product.rs.
struct Product {
  Boxes weight;     // of [width, depth], 64 rows each
  Boxes x;          // of [rows, depth], COLUMNS rows each
  const void *bias; // [width], or null
  void *out;        // [rows, width], or [rows, width / 2] if gated
  float *pieces;    // [blocks, 2, COLUMNS * rows of a tile]
  int *arrived;     // [tiles]: pieces that have been left; 0 before and after
  int rows;         // at most COLUMNS
  int depth;        // a multiple of 8
  int width;        // a multiple of 8, twice one if gated
  int gated;        // the result is silu(first half) * second half
  int wide;         // out is f32
};

constexpr int SLICE = 64;   // of the depth: 128 bytes, as wide as a box may be
constexpr int BOX = 64;     // rows of W in a box
constexpr int GROUP = 128;  // threads that multiply two boxes

template <class T, int COLUMNS, int GROUPS, int STAGES> struct Multiplier {
  static constexpr int ROWS = 2 * BOX * GROUPS;
  static constexpr int MULTIPLIERS = GROUP * GROUPS; // threads; a warp more asks for slices

  struct Stage {
    T weight[2 * GROUPS][BOX * SLICE];
    T x[COLUMNS * SLICE];
  };

  struct Memory {
    Stage stages[STAGES];
    u64 full[STAGES];  // a stage has come
    u64 empty[STAGES]; // all warps are done with it
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
  float sums[2][COLUMNS / 8][4]; // a lane's part of two boxes of W by all of x

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

  // The row of W that a group's first or second box of a tile begins with. A gated tile has boxes of the
  // first half and the same ones of the second: one lane has both.
  METHOD int first_row(int tile, int group, int f) {
    if (!a.gated) return tile * ROWS + (2 * group + f) * BOX;
    return f * (a.width / 2) + tile * (ROWS / 2) + group * BOX;
  }

  METHOD void load_weight(int stage, Unit unit) {
    expect_bytes(memory.full[stage], sizeof(Stage));
#pragma unroll
    for (int box = 0; box < 2 * GROUPS; ++box) {
      const int row = first_row(unit.tile, box / 2, box % 2);
      load_box<true>(memory.stages[stage].weight[box], a.weight, unit.slice * SLICE, row, memory.full[stage]);
    }
  }

  METHOD void load_x(int stage, Unit unit) {
    load_box<false>(memory.stages[stage].x, a.x, unit.slice * SLICE, 0, memory.full[stage]);
  }

  // What one thread does: it asks for all slices of the block's units.
  METHOD void load(int begin, int end) {
    const int first = min(STAGES, end - begin);
    Unit next = {begin / slices, begin % slices}, next_x = next;
    // Weights are there already, whatever the kernel before makes.
    for (int stage = 0; stage < first; ++stage) {
      load_weight(stage, next);
      next.advance(slices);
    }
    wait_for_kernel_before();
    for (int stage = 0; stage < first; ++stage) {
      load_x(stage, next_x);
      next_x.advance(slices);
    }
    int stage = 0, turn = 0;
    for (int unit = begin + first; unit < end; ++unit) {
      wait_for(memory.empty[stage], turn % 2);
      load_weight(stage, next);
      load_x(stage, next);
      next.advance(slices);
      if (++stage == STAGES) {
        stage = 0;
        ++turn;
      }
    }
    let_kernel_after_begin();
  }

  METHOD void multiply_stage(const Stage &stage) {
    const int group = threadIdx.x / GROUP;
    begin_multiplying();
#pragma unroll
    for (int k = 0; k < SLICE; k += 16) {
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        multiply_boxes<COLUMNS>(T(), sums[f], stage.weight[2 * group + f], stage.x, k);
      }
    }
    end_multiplying();
  }

  // What the others do.
  METHOD void multiply(int begin, int end) {
    wait_for_kernel_before();
    Unit current = {begin / slices, begin % slices};
    int stage = 0, turn = 0;
    for (int unit = begin; unit < end; ++unit) {
      wait_for(memory.full[stage], turn % 2);
      multiply_stage(memory.stages[stage]);
      if (threadIdx.x % WARP == 0) arrive(memory.empty[stage]);
      if (current.slice == slices - 1 || unit + 1 == end) finish(current.tile);
      current.advance(slices);
      if (++stage == STAGES) {
        stage = 0;
        ++turn;
      }
    }
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
    return (Line<float> *)a.pieces + ((i64)block * 2 + which) * (COLUMNS / 4) * MULTIPLIERS;
  }

  // Leaves what there is of a tile; true for the last block that does, whose sums are the whole tile's
  // then.
  METHOD bool share(int tile) {
    __shared__ int before;
    const int first = block_of(tile * slices), last = block_of((tile + 1) * slices - 1);
    if (first == last) return true;
    Line<float> *own = piece(blockIdx.x, tile);
#pragma unroll
    for (int c = 0; c < COLUMNS / 4; ++c) own[c * MULTIPLIERS + threadIdx.x] = line(c);
    sync_threads<MULTIPLIERS>();
    if (threadIdx.x == 0) {
      // What the barriers order for this thread, the fences order for all.
      __threadfence();
      before = atomicAdd(&a.arrived[tile], 1);
      __threadfence();
    }
    sync_threads<MULTIPLIERS>();
    if (before != last - first) return false;
    if (threadIdx.x == 0) a.arrived[tile] = 0;
    clear();
    for (int block = first; block <= last; ++block) {
      const Line<float> *left = piece(block, tile);
#pragma unroll
      for (int c = 0; c < COLUMNS / 4; ++c) {
        Line<float> four;
        load_coherent(four.at, &left[c * MULTIPLIERS + threadIdx.x]);
        add(c, four);
      }
    }
    return true;
  }

  METHOD void finish(int tile) {
    if (share(tile)) write(tile);
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
    const int lane = threadIdx.x % WARP, group = threadIdx.x / GROUP;
    const int within = threadIdx.x % GROUP / WARP * 16;
#pragma unroll
    for (int f = 0; f < 2; ++f) add_bias(sums[f], first_row(tile, group, f) + within + lane / 4);
    if (a.gated) {
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][j][i] = silu_fast(sums[0][j][i]) * sums[1][j][i];
        store(sums[0][j], first_row(tile, group, 0) + within, j * 8, a.width / 2);
      }
      return;
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
        store(sums[f][j], first_row(tile, group, f) + within, j * 8, a.width);
      }
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
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < STAGES; ++stage) {
        init_barrier(memory.full[stage], 1);
        init_barrier(memory.empty[stage], MULTIPLIERS / WARP);
      }
      show_barriers();
    }
    __syncthreads();
    if (threadIdx.x < MULTIPLIERS) {
      multiply(begin, end);
    } else if (threadIdx.x == MULTIPLIERS) {
      load(begin, end);
    } else {
      wait_for_kernel_before();
    }
  }
};

// Grid: at most as many blocks as there are units; they need not all run at once. Shared memory: Memory,
// and what it takes to begin at a multiple of 1024.
template <class T, int COLUMNS, int GROUPS, int STAGES> DEVICE void product(const Product &a) {
  SHARED_MEMORY(memory);
  Multiplier<T, COLUMNS, GROUPS, STAGES>(a, memory + (1024 - shared_address(memory) % 1024) % 1024).run();
}
