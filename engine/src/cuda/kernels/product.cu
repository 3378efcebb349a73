// x W^T for few rows of x, where reading W is what takes the time: for compute capability 9.0.
//
// The tensor cores' first matrix are rows of W, its second one rows of x: of those there may be few.
// A tile is 128 rows of W and all of x; a unit of work is a tile over one slice of the depth. One thread
// asks for the slices, in boxes that the hardware copies into shared memory, `STAGES` of them under way;
// four warps multiply what has come. The parts of a tile that is divided are made by the thread blocks of
// one cluster, each of which then adds up some of the tile's columns, in the order of the depth, out of
// the others' shared memory. Or every thread block takes an equal run of the units, whichever tiles they
// belong to (stream-K, arXiv 2301.03598): where a tile is shared, each block leaves a piece of it in global
// memory, and whichever comes last adds them up, in the same order. So results depend on no race.

// As in product.rs.
struct Product {
  Boxes weight;     // of [width, depth], 64 rows each
  Boxes x;          // of [rows, depth], COLUMNS rows each
  const void *bias; // [width], or null
  void *out;        // [rows, width], or [rows, width / 2] if gated
  float *pieces;    // [blocks, 2, COLUMNS * ROWS]
  int *arrived;     // [tiles]: pieces that have been left; 0 before and after
  int rows;         // at most COLUMNS
  int depth;        // a multiple of 8
  int width;        // a multiple of 8, twice one if gated
  int gated;        // the result is silu(first half) * second half
  int wide;         // out is f32
  int parts;        // blocks of a cluster, which make a tile together; 1: there are no clusters
};

constexpr int SLICE = 64;        // of the depth: 128 bytes, as wide as a box may be
constexpr int BOX = 64;          // rows of W in a box
constexpr int ROWS = 2 * BOX;    // of a tile
constexpr int MULTIPLIERS = 128; // threads; a warp more asks for slices
constexpr int STRIDE = ROWS + 4; // of sums in shared memory: keeps a warp's in different banks

template <class T, int COLUMNS, int STAGES> struct Multiplier {
  static constexpr int LINES = COLUMNS * ROWS / 4; // of four sums of a tile

  struct Stage {
    T weight[2][BOX * SLICE];
    T x[COLUMNS * SLICE];
  };

  struct Memory {
    Stage stages[STAGES];
    float sums[COLUMNS][STRIDE]; // of a tile
    u64 full[STAGES];            // a stage has come
    u64 empty[STAGES];           // all warps are done with it
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
  float sums[2][COLUMNS / 8][4]; // a lane's part of the tile's two boxes by all of x

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

  // The row of W that a tile's first or second box begins with. Those of a gated tile are of the first half
  // and the same ones of the second.
  METHOD int first_row(int tile, int box) {
    return a.gated ? box * (a.width / 2) + tile * BOX : tile * ROWS + box * BOX;
  }

  METHOD void load_weight(int stage, Unit unit) {
    expect_bytes(memory.full[stage], sizeof(Stage));
#pragma unroll
    for (int box = 0; box < 2; ++box) {
      load_box<true>(memory.stages[stage].weight[box], a.weight, unit.slice * SLICE,
                     first_row(unit.tile, box), memory.full[stage]);
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
    begin_multiplying();
#pragma unroll
    for (int k = 0; k < SLICE; k += 16) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        multiply_boxes<COLUMNS>(T(), sums[box], stage.weight[box], stage.x, k);
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

  // Lays the lanes' sums of a tile into shared memory.
  METHOD void lay_out() {
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (int box = 0; box < 2; ++box) {
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          memory.sums[j * 8 + lane % 4 * 2 + i % 2][box * BOX + first + i / 2 * 8] = sums[box][j][i];
        }
      }
    }
    clear();
  }

  METHOD const float *own(int line) { return &memory.sums[line / (ROWS / 4)][line % (ROWS / 4) * 4]; }

  METHOD Line<float> *piece(int block, int tile) {
    // A block's first tile may have begun before it, and its last one may end after it.
    const int which = first_unit(block) > tile * slices ? 0 : 1;
    return (Line<float> *)a.pieces + ((i64)block * 2 + which) * LINES;
  }

  // A block has made its part of a tile.
  METHOD void finish(int tile) {
    lay_out();
    // The blocks of a cluster meet first.
    if (a.parts > 1) return;
    sync_threads<MULTIPLIERS>();
    const int first = block_of(tile * slices), last = block_of((tile + 1) * slices - 1);
    if (first == last) {
      write(tile, 0, 1, [&](int line, float(&four)[4]) {
        const float *from = own(line);
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = from[i];
      });
    } else if (leave(tile, last - first)) {
      write(tile, 0, 1, [&](int line, float(&four)[4]) {
        add_up(four, first, last, [&](float(&part)[4], int block) {
          load_coherent(part, &piece(block, tile)[line]);
        });
      });
    }
    // The next tile's sums take this one's place.
    sync_threads<MULTIPLIERS>();
  }

  // Some of the columns of a tile whose parts the blocks of a cluster have.
  METHOD void write_share(int tile, int rank) {
    write(tile, rank, a.parts, [&](int line, float(&four)[4]) {
      add_up(four, 0, a.parts - 1, [&](float(&part)[4], int block) { load_of_peer(part, own(line), block); });
    });
  }

  // Four sums out of those of all parts.
  template <class F> METHOD void add_up(float (&four)[4], int first, int last, F load) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = 0.0f;
#pragma unroll 4
    for (int part = first; part <= last; ++part) {
      float more[4];
      load(more, part);
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] += more[i];
    }
  }

  // Leaves what there is of a tile beside what others leave; true for the last block that does.
  METHOD bool leave(int tile, int others) {
    __shared__ int before;
    Line<float> *place = piece(blockIdx.x, tile);
    for (int i = threadIdx.x; i < LINES; i += MULTIPLIERS) place[i] = *(const Line<float> *)own(i);
    sync_threads<MULTIPLIERS>();
    if (threadIdx.x == 0) {
      // What the barriers order for this thread, the fences order for all.
      __threadfence();
      before = atomicAdd(&a.arrived[tile], 1);
      __threadfence();
      if (before == others) a.arrived[tile] = 0;
    }
    sync_threads<MULTIPLIERS>();
    return before == others;
  }

  // Writes every `step`th column of a tile from `first` on, four rows of W at a time, out of what `sum`
  // says of them.
  template <class F> METHOD void write(int tile, int first, int step, F sum) {
    const int rows = a.gated ? BOX : ROWS, lines = rows / 4, width = a.gated ? a.width / 2 : a.width;
#pragma unroll 2
    for (int i = threadIdx.x;; i += MULTIPLIERS) {
      const int column = first + i / lines * step, within = i % lines * 4, at = tile * rows + within;
      if (column >= a.rows) break;
      if (at >= width) continue;
      float four[4];
      sum(column * (ROWS / 4) + within / 4, four);
      add_bias(four, at);
      if (a.gated) {
        float up[4];
        sum(column * (ROWS / 4) + (BOX + within) / 4, up);
        add_bias(up, width + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = silu_fast(four[j]) * up[j];
      }
      store(four, (i64)column * width + at);
    }
  }

  METHOD void add_bias(float (&four)[4], int row) {
    if (!a.bias) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] += number(((const T *)a.bias)[row + j]);
  }

  METHOD void store(const float (&four)[4], i64 at) {
    if (a.wide) {
      *(Line<float> *)((float *)a.out + at) = {{four[0], four[1], four[2], four[3]}};
    } else {
      *(u64 *)((T *)a.out + at) = (u64)pack(T(), four[2], four[3]) << 32 | pack(T(), four[0], four[1]);
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
    if (a.parts == 1) return;
    __syncwarp();
    sync_cluster();
    if (threadIdx.x < MULTIPLIERS) write_share(begin / slices, blockIdx.x % a.parts);
    // Until then the others read this block's sums.
    sync_cluster();
  }
};

// Grid: at most as many blocks as there are units, in clusters of as many as a tile has parts; clusters need
// not all run at once. Shared memory: Memory, and what it takes to begin at a multiple of 1024.
template <class T, int COLUMNS, int STAGES> DEVICE void product(const Product &a) {
  SHARED_MEMORY(memory);
  Multiplier<T, COLUMNS, STAGES>(a, memory + (1024 - shared_address(memory) % 1024) % 1024).run();
}
