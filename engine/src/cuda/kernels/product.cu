// x W^T for few rows of x, where reading W is what takes the time: for compute capability 9.0.
//
// The tensor cores' first matrix are rows of W, its second one rows of x: of those there may be few.
// A tile is 128 rows of W for each group of four warps, and all of x; a unit of work is a tile over one slice
// of the depth. One thread asks for the slices, in boxes that the hardware copies into shared memory, `STAGES`
// of them under way; the groups multiply what has come. Where x has many rows, reading them over and over
// takes its time, too: two groups share them, or two thread blocks side by side each ask for half of them, for
// both.
//
// The parts of a tile that is divided are made by the thread blocks of one cluster, each of which then adds
// up some of the tile's columns, in the order of the depth, out of the others' shared memory. Or every
// thread block takes an equal run of the units, whichever tiles they belong to (stream-K, arXiv
// 2301.03598): where a tile is shared, each block leaves a piece of it in global memory, and whichever
// comes last adds them up, in the same order. So results depend on no race.

// As in product.rs.
struct Product {
  Boxes weight;     // of [width, depth], 64 rows each
  Boxes x;          // of [rows, depth], COLUMNS / PAIR rows each
  const void *bias; // [width], or null
  void *out;        // [rows, width], or [rows, width / 2] if gated
  float *pieces;    // [blocks, 2, COLUMNS * rows of a tile]
  int *arrived;     // [tiles]: pieces that have been left; 0 before and after
  int rows;         // at most COLUMNS
  int depth;        // a multiple of 8
  int width;        // a multiple of 8, twice one if gated
  int gated;        // the result is silu(first half) * second half
  int wide;         // out is f32
  int parts;        // blocks or pairs of a cluster, which make a tile each together
};

constexpr int SLICE = 64;  // of the depth: 128 bytes, as wide as a box may be
constexpr int BOX = 64;    // rows of W in a box
constexpr int GROUP = 128; // threads, which multiply two boxes

// `PAIR`: 2 where blocks read x for each other, which makes one of two tiles; or 1.
template <class T, int COLUMNS, int STAGES, int PAIR, int GROUPS> struct Multiplier {
  static constexpr int BOXES = 2 * GROUPS;           // of a tile
  static constexpr int ROWS = BOXES * BOX;           // of it
  static constexpr int STRIDE = ROWS + 4;            // of its sums: keeps a warp's in different banks
  static constexpr int MULTIPLIERS = GROUPS * GROUP; // threads; a warp more asks for slices
  static constexpr int LINES = COLUMNS * ROWS / 4;   // of four sums, that a piece has room for

  struct Stage {
    T weight[BOXES][BOX * SLICE];
    T x[COLUMNS * SLICE];
  };

  struct Memory {
    Stage stages[STAGES];
    float sums[COLUMNS][STRIDE]; // of a tile
    u64 full[STAGES];            // a stage has come
    u64 empty[STAGES];           // all warps are done with it
    int before;                  // pieces that others have left
  };

  // Where a unit lies: tiles of a pair are counted as one.
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

  // The stage that is next, and the phase of its barriers.
  struct Turn {
    int stage = 0;
    int phase = 0;

    METHOD void advance() {
      if (++stage == STAGES) {
        stage = 0;
        phase ^= 1;
      }
    }
  };

  const Product &a;
  Memory &memory;
  int slices, units;
  int runner, runners; // blocks or pairs that take runs of units
  int member;          // which one of its pair the block is
  int part;            // of a tile, where a cluster shares it
  float sums[2][COLUMNS / 8][4]; // a lane's part of its group's two boxes by all of x

  METHOD Multiplier(const Product &a, unsigned char *memory) : a(a), memory(*(Memory *)memory) {
    slices = (a.depth + SLICE - 1) / SLICE;
    units = (a.width + PAIR * ROWS - 1) / (PAIR * ROWS) * slices;
    runner = blockIdx.x / PAIR;
    runners = gridDim.x / PAIR;
    member = blockIdx.x % PAIR;
    part = runner % a.parts;
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

  METHOD int first_unit(int runner) { return (int)((i64)runner * units / runners); }
  METHOD int runner_of(int unit) { return (int)((((i64)unit + 1) * runners - 1) / units); }
  // The block's tile of a unit's.
  METHOD int own_tile(int tile) { return tile * PAIR + member; }

  // The row of W that a box of a tile begins with. A gated tile's are of the first half and the same ones of
  // the second, in turns.
  METHOD int first_row(int tile, int box) {
    return a.gated ? box % 2 * (a.width / 2) + (tile * GROUPS + box / 2) * BOX : tile * ROWS + box * BOX;
  }

  METHOD void load_weight(int stage, Unit unit) {
    expect_bytes(memory.full[stage], sizeof(Stage));
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
      load_box<true>(memory.stages[stage].weight[box], a.weight, unit.slice * SLICE,
                     first_row(own_tile(unit.tile), box), memory.full[stage]);
    }
  }

  METHOD void load_x(int stage, Unit unit) {
    constexpr int SHARE = COLUMNS / PAIR;
    T *to = memory.stages[stage].x + member * SHARE * SLICE;
    if (PAIR == 1) {
      load_box<false>(to, a.x, unit.slice * SLICE, 0, memory.full[stage]);
    } else {
      load_box_for(3 << part * PAIR, to, a.x, unit.slice * SLICE, member * SHARE, memory.full[stage]);
    }
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
    if (PAIR > 1) wait_for_cluster();
    for (int stage = 0; stage < first; ++stage) {
      load_x(stage, next_x);
      next_x.advance(slices);
    }
    Turn turn;
    for (int unit = begin + first; unit < end; ++unit) {
      wait_for(memory.empty[turn.stage], turn.phase);
      load_weight(turn.stage, next);
      load_x(turn.stage, next);
      next.advance(slices);
      turn.advance();
    }
    let_kernel_after_begin();
  }

  METHOD void multiply_stage(const Stage &stage) {
    const auto *own = &stage.weight[threadIdx.x / GROUP * 2];
    begin_multiplying();
#pragma unroll
    for (int k = 0; k < SLICE; k += 16) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        multiply_boxes<COLUMNS>(T(), sums[box], own[box], stage.x, k);
      }
    }
    end_multiplying();
  }

  // A warp is done with a stage: the pair's blocks, which wait for that, may overwrite it.
  METHOD void release(int stage) {
    if (PAIR == 1) {
      arrive(memory.empty[stage]);
    } else {
#pragma unroll
      for (int i = 0; i < PAIR; ++i) arrive_at_peer(memory.empty[stage], part * PAIR + i);
    }
  }

  // What the others do.
  METHOD void multiply(int begin, int end) {
    wait_for_kernel_before();
    if (PAIR > 1) wait_for_cluster();
    Unit current = {begin / slices, begin % slices};
    Turn turn;
    for (int unit = begin; unit < end; ++unit) {
      wait_for(memory.full[turn.stage], turn.phase);
      multiply_stage(memory.stages[turn.stage]);
      // Nobody waits for the last ones, and none is on its way to a block that has ended.
      if (threadIdx.x % WARP == 0 && unit + STAGES < end) release(turn.stage);
      if (current.slice == slices - 1 || unit + 1 == end) finish(current.tile);
      current.advance(slices);
      turn.advance();
    }
  }

  // Lays the lanes' sums of a tile into shared memory.
  METHOD void lay_out() {
    const int lane = threadIdx.x % WARP, group = threadIdx.x / GROUP;
    const int first = group * 2 * BOX + threadIdx.x % GROUP / WARP * 16 + lane / 4;
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
  }

  METHOD const Line<float> *own(int line) {
    return (const Line<float> *)&memory.sums[line / (ROWS / 4)][line % (ROWS / 4) * 4];
  }

  // Where a runner leaves its part of a tile: of the one that its run ends in, whose `first` part it has, or of
  // the one that its run begins in.
  METHOD Line<float> *piece(int runner, bool first) {
    return (Line<float> *)a.pieces + ((i64)(runner * PAIR + member) * 2 + first) * LINES;
  }

  // A block has made its part of a tile.
  METHOD void finish(int tile) {
    lay_out();
    // The blocks of a cluster that share it meet first.
    if (a.parts > 1) return;
    sync_threads<MULTIPLIERS>();
    const int first = runner_of(tile * slices), last = runner_of((tile + 1) * slices - 1);
    if (first == last) {
      write(own_tile(tile), 0, 1, 0, 0, [&](float(&four)[4], int line, int) {
        const Line<float> from = *own(line);
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = from.at[i];
      });
    } else if (leave(tile, first, last)) {
      write(own_tile(tile), 0, 1, first, last, [&](float(&four)[4], int line, int runner) {
        load_coherent(four, &piece(runner, runner == first)[line]);
      });
    }
    // The next tile's sums take this one's place.
    clear();
    sync_threads<MULTIPLIERS>();
  }

  // Some of the columns of a tile whose parts blocks of a cluster have.
  METHOD void write_share(int tile) {
    write(own_tile(tile), part, a.parts, 0, a.parts - 1, [&](float(&four)[4], int line, int part) {
      load_of_peer(four, own(line), part * PAIR + member);
    });
  }

  // Leaves what there is of a tile beside what others leave; true for the last block that does.
  METHOD bool leave(int tile, int first, int last) {
    Line<float> *place = piece(runner, runner == first);
    for (int i = threadIdx.x; i < a.rows * (ROWS / 4); i += MULTIPLIERS) place[i] = *own(i);
    sync_threads<MULTIPLIERS>();
    if (threadIdx.x == 0) {
      memory.before = count_up(a.arrived[own_tile(tile)]);
      if (memory.before == last - first) a.arrived[own_tile(tile)] = 0;
    }
    sync_threads<MULTIPLIERS>();
    return memory.before == last - first;
  }

  // Lines that a thread asks for at a time, of so many parts each: an answer takes its time.
  static constexpr int EACH = 4, PARTS = 4;

  // Four sums of each of the lines that lie so far beyond some, out of those of all parts, in their order.
  template <class F>
  METHOD void add_up(float (&sums)[EACH][4], const int (&lines)[EACH], int beyond, int first, int last,
                     F load) {
#pragma unroll 1
    for (int part = first; part <= last; part += PARTS) {
      float more[PARTS][EACH][4];
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        if (part + p > last) break;
#pragma unroll
        for (int n = 0; n < EACH; ++n) load(more[p][n], lines[n] + beyond, part + p);
      }
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        if (part + p > last) break;
#pragma unroll
        for (int n = 0; n < EACH; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][i] += more[p][n][i];
        }
      }
    }
  }

  // Writes every `step`th column of a tile from `begin` on, four rows of W at a time, which are the same ones
  // for all that a thread writes, out of what `load` says of each part.
  template <class F> METHOD void write(int tile, int begin, int step, int first, int last, F load) {
    const u32 lines = (a.gated ? ROWS / 2 : ROWS) / 4; // of a column
    const int width = a.gated ? a.width / 2 : a.width, apart = MULTIPLIERS / lines * step;
    const int line = threadIdx.x % lines, row = (tile * lines + line) * 4;
    // A gated tile has the second half's after each box of the first one's.
    const int place = a.gated ? line / (BOX / 4) * (BOX / 2) + line % (BOX / 4) : line;
    if (row >= width) return;
    float bias[4], up_bias[4];
    load_bias(bias, row);
    if (a.gated) load_bias(up_bias, width + row);
#pragma unroll 1
    for (int column = begin + threadIdx.x / lines * step; column < a.rows; column += EACH * apart) {
      int at[EACH];
      float sums[EACH][4] = {}, up[EACH][4] = {};
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        at[n] = (column + n * apart < a.rows ? column + n * apart : column) * (ROWS / 4) + place;
      }
      add_up(sums, at, 0, first, last, load);
      if (a.gated) add_up(up, at, BOX / 4, first, last, load);
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        if (column + n * apart >= a.rows) break;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[n][j] += bias[j];
          if (a.gated) sums[n][j] = silu_fast(sums[n][j]) * (up[n][j] + up_bias[j]);
        }
        store(sums[n], (i64)(column + n * apart) * width + row);
      }
    }
  }

  METHOD void load_bias(float (&four)[4], int row) {
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = a.bias ? number(((const T *)a.bias)[row + j]) : 0.0f;
  }

  METHOD void store(const float (&four)[4], i64 at) {
    if (a.wide) {
      put_four((float *)a.out + at, four);
    } else {
      put_four((T *)a.out + at, four);
    }
  }

  METHOD void run() {
    const int begin = first_unit(runner), end = first_unit(runner + 1);
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < STAGES; ++stage) {
        init_barrier(memory.full[stage], 1);
        init_barrier(memory.empty[stage], PAIR * MULTIPLIERS / WARP);
      }
      show_barriers();
    }
    __syncthreads();
    // Nothing is sent to a block that is not there yet.
    if (PAIR > 1) arrive_at_cluster<false>();
    if (threadIdx.x < MULTIPLIERS) {
      multiply(begin, end);
    } else if (threadIdx.x == MULTIPLIERS) {
      load(begin, end);
    } else {
      wait_for_kernel_before();
      if (PAIR > 1) wait_for_cluster();
    }
    if (a.parts > 1) {
      arrive_at_cluster<true>();
      wait_for_cluster();
      if (threadIdx.x < MULTIPLIERS) write_share(begin / slices);
    }
    // No block ends while others read its sums, or what it has sent them is on its way: what they have read,
    // they have added up, and what was sent, they have waited for.
    if (PAIR * a.parts > 1) {
      arrive_at_cluster<false>();
      wait_for_cluster();
    }
  }
};

// Grid: at most as many blocks or pairs as there are units, in clusters of as many as a tile has parts;
// clusters need not all run at once. Shared memory: Memory, and nothing before it.
template <class T, int COLUMNS, int STAGES, int PAIR, int GROUPS> DEVICE void product(const Product &a) {
  SHARED_MEMORY(memory, 1024);
  Multiplier<T, COLUMNS, STAGES, PAIR, GROUPS>(a, memory).run();
}
