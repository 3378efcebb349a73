// A GPU as far as the kernels need one, on the CPU: the threads of a block are coroutines on one
// thread, run in turns between barriers; blocks run one after the other. It is strict where a GPU is
// lenient: all threads of a warp or block must reach the same barrier, shared memory starts as NaN,
// an asynchronous copy arrives no earlier than the kernel waits for it, and none begins before the
// kernel waits for the one before it, unless it may be made ahead of that. With `WATCHED` it also knows who
// has seen what of whom: races.h.

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define DEVICE static inline
#define METHOD inline
#define SHARED_MEMORY(name, alignment) unsigned char *name = machine::shared[machine::current->rank]

struct dim3 {
  unsigned x, y, z;
};

namespace machine {

constexpr int LANES = 32, MOST_THREADS = 2304, STACK = 256 << 10, MOST_SHARED = 227 << 10;
constexpr int MOST_BLOCKS = 8;  // of a cluster
constexpr int MOST_COPIES = 64; // of a thread, that are under way

#ifdef WATCHED
// What the current thread has done is seen by those who `acquire` the same later.
void release(const void *what, u64 phase = 0);
void acquire(const void *what, u64 phase = 0);
void reads(const void *from, size_t bytes);
void writes(const void *to, size_t bytes);
void begin_launch();
void begin_cluster();
#else
inline void release(const void *, u64 = 0) {}
inline void acquire(const void *, u64 = 0) {}
inline void reads(const void *, size_t) {}
inline void writes(const void *, size_t) {}
inline void begin_launch() {}
inline void begin_cluster() {}
#endif

inline int unseen;

// While there is one, what is read and written is the machine's own.
struct Unseen {
  Unseen() { add(1); }
  ~Unseen() { add(-1); }
  // The compiler moves nothing across it.
  static void add(int by) {
    asm volatile("" ::: "memory");
    unseen += by;
    asm volatile("" ::: "memory");
  }
};

struct Barrier {
  int arrived = 0;
  u64 generation = 0;
};

struct Copy {
  void *to;
  const void *from;
  bool valid;
  int group;
};

struct Thread {
  jmp_buf state;
  ucontext_t context;
  dim3 index, block;
  int rank; // of the block in its cluster
  bool started, done, waited;
  bool polls; // for the end of a barrier's phase
  const Barrier *waits_at;
  u64 generation;
  u64 arrived_in; // the generation of the cluster's barrier
  int turn; // which of its warp's two boards it writes to next
  int groups;
  bool shown; // barriers that it has made
  Copy copies[MOST_COPIES];
  int copied; // how many of these
};

// What the lanes of a warp show each other.
struct Warp {
  Barrier barrier;
  alignas(16) unsigned char board[2][LANES][64];
};

inline Thread threads[MOST_THREADS];
inline Warp warps[MOST_THREADS / LANES];
inline Barrier block_barriers[MOST_BLOCKS], part_barriers[MOST_BLOCKS], cluster_barrier;
inline Thread *current;
inline int count, of_block; // threads
inline u64 changes; // of barriers whose phases are waited for
inline jmp_buf scheduler;
alignas(1024) inline unsigned char shared[MOST_BLOCKS][MOST_SHARED / 1024 * 1024];
inline void (*kernel)(const void *);
inline const void *arguments;
inline char *stacks;

[[noreturn]] inline void fail(const char *what) {
  std::fprintf(stderr, "kernel harness: %s\n", what);
  std::abort();
}

__attribute__((noinline)) inline void yield() {
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

// `SHOWS`: what threads have written before can be read by all after it.
template <bool SHOWS = true> __attribute__((noinline)) void wait(Barrier &barrier, int expected) {
  const u64 generation = barrier.generation;
  if (SHOWS) release(&barrier, generation);
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    current->waits_at = &barrier;
    current->generation = generation;
    yield();
  }
  if (SHOWS) acquire(&barrier, generation);
}

inline int lane() { return current->index.x % LANES; }
inline Warp &warp() { return warps[(current->rank * of_block + current->index.x) / LANES]; }

// Shows `value` to the warp; gives what all lanes show.
template <class V> const unsigned char (*show(const V &value))[64] {
  static_assert(sizeof(V) <= 64);
  Warp &own = warp();
  auto *board = own.board[current->turn];
  current->turn ^= 1;
  std::memcpy(board[lane()], &value, sizeof(V));
  wait<false>(own.barrier, LANES);
  return board;
}

template <class V> V seen(const unsigned char (*board)[64], int lane) {
  V value;
  std::memcpy(&value, board[lane], sizeof(V));
  return value;
}

inline void enter() {
  kernel(arguments);
  if (current->copied > 0) fail("a thread ended before its copies arrived");
  if (!current->waited) fail("a thread never waited for the kernel before");
  current->done = true;
  _longjmp(scheduler, 1);
}

inline void resume(Thread &thread, int index) {
  current = &thread;
  if (_setjmp(scheduler) != 0) {
    current = nullptr;
    return;
  }
  if (thread.started) _longjmp(thread.state, 1);
  thread.started = true;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stacks + (size_t)index * STACK;
  thread.context.uc_stack.ss_size = STACK;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
  setcontext(&thread.context);
}

// Runs the blocks of a cluster, whose first one is `block`.
inline void run_cluster(dim3 block) {
  std::memset(shared, 0xff, sizeof(shared));
  for (int i = 0; i < count; ++i) {
    threads[i].index = {(unsigned)(i % of_block), 0, 0};
    threads[i].rank = i / of_block;
    threads[i].block = {block.x + i / of_block, block.y, 0};
    threads[i].started = threads[i].done = threads[i].waited = threads[i].polls = false;
    threads[i].waits_at = nullptr;
    threads[i].turn = threads[i].groups = threads[i].copied = 0;
    threads[i].shown = false;
  }
  begin_cluster();
  for (auto &warp : warps) warp.barrier.arrived = 0;
  for (auto &barrier : block_barriers) barrier.arrived = 0;
  for (auto &barrier : part_barriers) barrier.arrived = 0;
  cluster_barrier.arrived = 0;
  for (int left = count; left > 0;) {
    bool moved = false;
    const u64 before = changes;
    for (int i = 0; i < count; ++i) {
      Thread &thread = threads[i];
      if (thread.done) continue;
      if (thread.waits_at && thread.waits_at->generation == thread.generation) continue;
      thread.waits_at = nullptr;
      thread.polls = false;
      resume(thread, i);
      moved |= !thread.polls || changes > before;
      left -= thread.done;
    }
    if (!moved) fail("threads wait at different barriers");
  }
}

} // namespace machine

#define threadIdx (machine::current->index)
#define blockIdx (machine::current->block)
inline dim3 blockDim, gridDim;

inline void __syncthreads() {
  machine::wait(machine::block_barriers[machine::current->rank], machine::of_block);
}
inline void __syncwarp() { machine::wait(machine::warp().barrier, machine::LANES); }

template <class V> V __shfl_xor_sync(u32, V value, int mask) {
  const int from = machine::lane() ^ mask;
  return machine::seen<V>(machine::show(value), from);
}

template <class V> V __shfl_up_sync(u32, V value, int by) {
  const int from = machine::lane() - by;
  return machine::seen<V>(machine::show(value), from < 0 ? machine::lane() : from);
}

template <class V> V __shfl_sync(u32, V value, int from) {
  return machine::seen<V>(machine::show(value), from);
}

using std::max;
using std::min;

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline u32 bf16_of(float x) {
  const u32 bits = bits_of(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline u32 f16_of(float x) {
  const _Float16 half = (_Float16)x;
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline u32 pack_bf16(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline u32 pack_f16(float low, float high) { return f16_of(low) | f16_of(high) << 16; }

inline float float_of_f16(u16 bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return (float)half;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

// The layouts of PTX ISA 9.0, 9.7.14: "Matrix Fragments for mma.m16n8k16 with floating point type".
struct Fragments {
  u32 a[4], b[2];
};

template <float (*NUMBER)(u16)>
void multiply_fragments(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const int lane = machine::lane();
  const auto *board = machine::show(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto half = [](u32 pair, int k) { return NUMBER((u16)(k % 2 ? pair >> 16 : pair)); };
  const Fragments *rows[4], *columns[2][4];
  for (int i = 0; i < 4; ++i) {
    rows[i] = (const Fragments *)board[lane / 4 * 4 + i];
    for (int j = 0; j < 2; ++j) columns[j][i] = (const Fragments *)board[(lane % 4 * 2 + j) * 4 + i];
  }
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2; // row lane / 4, or the one eight below
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float x = half(rows[k % 8 / 2]->a[lower + k / 8 * 2], k);
      sum += x * half(columns[i % 2][k % 8 / 2]->b[k / 8], k);
    }
    d[i] += sum;
  }
}

inline float float_of_bf16(u16 bits) { return __int_as_float((int)((u32)bits << 16)); }

inline void multiply_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_fragments<float_of_bf16>(d, a, b0, b1);
}
inline void multiply_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_fragments<float_of_f16>(d, a, b0, b1);
}

template <bool TRANSPOSED> void load_eights(u32 (&m)[4], const void *row) {
  if ((uintptr_t)row % 16 != 0) machine::fail("a matrix row is not aligned");
  const auto *board = machine::show(row);
  const int lane = machine::lane();
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int c) -> u32 {
      return machine::seen<const u16 *>(board, i * 8 + r)[c];
    };
    const int across = lane / 4, along = lane % 4 * 2;
    m[i] = TRANSPOSED ? element(along, across) | element(along + 1, across) << 16
                      : element(across, along) | element(across, along + 1) << 16;
  }
}

inline void load_matrices(u32 (&m)[4], const void *row) { load_eights<false>(m, row); }
inline void load_matrices_transposed(u32 (&m)[4], const void *row) { load_eights<true>(m, row); }

template <bool SETTLED> void copy_async(void *to, const void *from, bool valid) {
  if ((uintptr_t)to % 16 != 0 || (uintptr_t)from % 16 != 0) machine::fail("a copy is not aligned");
  if (!SETTLED && !machine::current->waited) machine::fail("a copy of what the kernel before may write");
  machine::Thread &own = *machine::current;
  if (own.copied == machine::MOST_COPIES) machine::fail("more copies are under way than the harness keeps");
  own.copies[own.copied++] = {to, from, valid, own.groups};
  if (valid) machine::reads(from, 16);
  machine::writes(to, 16);
}

inline void fetch_ahead(const void *from, int bytes) {
  if ((uintptr_t)from % 16 != 0 || bytes <= 0 || bytes % 16 != 0) {
    machine::fail("what is fetched is not aligned");
  }
  machine::Unseen unseen;
  volatile unsigned char last = ((const unsigned char *)from)[bytes - 1];
  (void)last;
}

inline void commit_copies() { ++machine::current->groups; }

template <int LEFT> void wait_for_copies() {
  machine::Thread &own = *machine::current;
  const int arrived = own.groups - LEFT;
  int left = 0;
  for (int i = 0; i < own.copied; ++i) {
    const machine::Copy copy = own.copies[i];
    if (copy.group >= arrived) {
      own.copies[left++] = copy;
      continue;
    }
    if (copy.valid) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
    machine::writes(copy.to, 16);
  }
  own.copied = left;
}

// As the driver would describe it; see boxes.rs.
struct alignas(64) Boxes {
  const unsigned char *from;
  u64 columns, rows, stride; // of two bytes each
  u64 box_rows;
  u64 unused[11];
};

// A barrier in its 64 bits.
struct PhaseBarrier {
  int bytes;
  u16 expected, phase_and_pending; // the phase's number is odd: the highest bit

  static PhaseBarrier of(const u64 &bits) {
    machine::Unseen unseen;
    PhaseBarrier barrier;
    std::memcpy(&barrier, &bits, 8);
    return barrier;
  }
  bool phase() const { return phase_and_pending >> 15; }
  void change(u64 &bits, int arriving, int more) {
    machine::reads(&bits, 8);
    machine::release(&bits, phase());
    machine::Unseen unseen;
    ++machine::changes;
    bytes += more;
    if (arriving > (phase_and_pending & 0x7fff)) machine::fail("too many arrive at a barrier");
    phase_and_pending -= arriving;
    if ((phase_and_pending & 0x7fff) == 0 && bytes == 0) {
      phase_and_pending = (u16)((!phase() << 15) | expected);
    }
    std::memcpy(&bits, this, 8);
  }
};

inline void init_barrier(u64 &barrier, int count) {
  const PhaseBarrier made = {0, (u16)count, (u16)count};
  std::memcpy(&barrier, &made, 8);
}
inline void show_barriers() { machine::current->shown = true; }
inline void arrive(u64 &barrier) { PhaseBarrier::of(barrier).change(barrier, 1, 0); }
inline void expect_bytes(u64 &barrier, int bytes) { PhaseBarrier::of(barrier).change(barrier, 1, bytes); }
inline void wait_for(u64 &barrier, int phase) {
  while (PhaseBarrier::of(barrier).phase() == (phase != 0)) {
    machine::current->polls = true;
    machine::yield();
  }
  machine::reads(&barrier, 8);
  machine::acquire(&barrier, phase != 0);
}

inline u32 shared_address(const void *at) { return (u32)(uintptr_t)at; }

// Where column `c` of row `r` of a box lies.
inline unsigned char *in_box(unsigned char *box, int r, int c) {
  return box + r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2;
}

// Of weights they may be made ahead.
template <bool ONCE> void load_box(void *to, const Boxes &from, int column, int row, u64 &barrier) {
  if ((uintptr_t)to % 1024 != 0) machine::fail("a box is not aligned");
  if (!ONCE && !machine::current->waited) machine::fail("a box of what the kernel before may write");
  for (int r = 0; r < (int)from.box_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const u64 at = (u64)(row + r) * from.stride + column + c;
      const bool there = row + r < (int)from.rows && column + c < (int)from.columns;
      u16 element = 0;
      if (there) std::memcpy(&element, from.from + at * 2, 2);
      std::memcpy(in_box((unsigned char *)to, r, c), &element, 2);
    }
  }
  PhaseBarrier::of(barrier).change(barrier, 0, -(int)from.box_rows * 128);
}

inline u64 operand(const void *box, int k) { return (u64)(uintptr_t)box + k * 2; }
inline void begin_multiplying() {}
inline void end_multiplying() {}

// A warp does, for all of its lanes.
inline void read_operand(u64 operand, int first, int rows) {
  unsigned char *box = (unsigned char *)(operand - operand % 128);
  for (int row = first; row < first + rows; ++row) {
    for (int k = 0; k < 16; k += 8) machine::reads(in_box(box, row, (int)(operand % 128 / 2) + k), 16);
  }
}

// Of the layout "Matrix Fragments for wgmma.mma_async.m64nNk16" (PTX ISA 9.0, 9.7.15).
template <float (*NUMBER)(u16), int EIGHTS> void multiply_group(float (&d)[EIGHTS][4], u64 a, u64 b) {
  const int lane = machine::lane(), first = threadIdx.x % 128 / 32 * 16;
  if (lane == 0) {
    read_operand(a, first, 16);
    read_operand(b, 0, EIGHTS * 8);
  }
  machine::Unseen unseen;
  const auto at = [](u64 operand, int row, int k) {
    u16 bits;
    const u64 inside = operand % 128 / 2;
    std::memcpy(&bits, in_box((unsigned char *)(operand - operand % 128), row, (int)inside + k), 2);
    return NUMBER(bits);
  };
  for (int j = 0; j < EIGHTS; ++j) {
    for (int i = 0; i < 4; ++i) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) {
        sum += at(a, first + lane / 4 + i / 2 * 8, k) * at(b, j * 8 + lane % 4 * 2 + i % 2, k);
      }
      d[j][i] += sum;
    }
  }
}
template <int EIGHTS> void multiply_boxes_bf16(float (&d)[EIGHTS][4], u64 a, u64 b) {
  multiply_group<float_of_bf16>(d, a, b);
}
template <int EIGHTS> void multiply_boxes_f16(float (&d)[EIGHTS][4], u64 a, u64 b) {
  multiply_group<float_of_f16>(d, a, b);
}

template <int COUNT> void sync_threads() {
  machine::wait(machine::part_barriers[machine::current->rank], COUNT);
}

template <bool SHOW> void arrive_at_cluster() {
  machine::Barrier &barrier = machine::cluster_barrier;
  machine::current->arrived_in = barrier.generation;
  if (SHOW || machine::current->shown) machine::release(&barrier, barrier.generation);
  machine::current->shown = false;
  if (++barrier.arrived == machine::count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}
inline void wait_for_cluster() {
  const u64 generation = machine::current->arrived_in;
  if (machine::cluster_barrier.generation == generation) {
    machine::current->waits_at = &machine::cluster_barrier;
    machine::current->generation = generation;
    machine::yield();
  }
  machine::acquire(&machine::cluster_barrier, generation);
}
template <class V> V &of_peer(V &own, int rank) {
  return *(V *)((const char *)&own + (machine::shared[rank] - machine::shared[machine::current->rank]));
}
inline void arrive_at_peer(u64 &own, int rank) { arrive(of_peer(own, rank)); }
inline void load_box_for(int blocks, void *to, const Boxes &from, int column, int row, u64 &barrier) {
  for (int rank = 0; rank < machine::MOST_BLOCKS; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    load_box<false>(&of_peer(*(char *)to, rank), from, column, row, of_peer(barrier, rank));
  }
}
inline void load_of_peer(float (&four)[4], const void *own, int rank) {
  std::memcpy(four, &of_peer(*(const char *)own, rank), 16);
}

inline float load_coherent(const float *at) { return *at; }
inline void load_coherent(float (&four)[4], const void *at) { std::memcpy(four, at, 16); }
inline int count_up(int &counter) {
  machine::release(&counter);
  machine::acquire(&counter);
  machine::Unseen unseen;
  return counter++;
}

inline void wait_for_kernel_before() {
  machine::current->waited = true;
  machine::acquire(nullptr);
}
inline void let_kernel_after_begin() {}
inline void end_idle() { wait_for_kernel_before(); }

namespace machine {

inline void launch(void (*function)(const void *), const void *args, dim3 grid, unsigned block,
                   unsigned cluster) {
  if (block % LANES != 0 || block * cluster > MOST_THREADS) fail("blocks are whole warps");
  if (cluster > MOST_BLOCKS || grid.x % cluster != 0) fail("clusters are whole");
  if (!stacks) stacks = (char *)std::malloc((size_t)MOST_THREADS * STACK);
  kernel = function;
  arguments = args;
  of_block = (int)block;
  count = (int)(block * cluster);
  blockDim = {block, 1, 1};
  gridDim = grid;
  begin_launch();
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster) run_cluster({x, y, 0});
  }
}

} // namespace machine
