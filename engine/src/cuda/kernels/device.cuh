// What the kernels need of the machine, on a GPU of compute capability 8.0 or later. The CPU harness
// has the same names (harness/machine.h).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define SHARED_MEMORY(name, alignment) extern __shared__ __align__(alignment) unsigned char name[]
#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__

// Two numbers as 16-bit floats, the first one in the lower half.
DEVICE u32 pack_bf16(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE u32 pack_f16(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE float float_of_f16(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// 2^x, within 2 ulp; 0 for minus infinity.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, within 1 ulp; 0 for infinity.
DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d += a b over a warp: a is 16x16, b 16x8, d 16x8 of f32, all spread over the lanes.
#define MULTIPLY(name, type)                                                                       \
  DEVICE void name(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {                             \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                    \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                  \
  }
MULTIPLY(multiply_bf16, "bf16")
MULTIPLY(multiply_f16, "f16")

DEVICE u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }

// Four 8x8 matrices of 16-bit numbers out of shared memory; lane i gives the address of row i % 8
// of matrix i / 8. Lane i gets elements 2 (i % 4) and the next of row i / 4, or of that column.
DEVICE void load_matrices(u32 (&m)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void load_matrices_transposed(u32 (&m)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// Begins to copy 16 bytes into shared memory, or zeros if not `valid`. `SETTLED`: nothing that the kernel
// before may still write.
template <bool SETTLED> DEVICE void copy_async(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Lets so many bytes come into the second cache, a multiple of 16 from a multiple of 16 on (from compute
// capability 9.0 on; nothing elsewhere).
DEVICE void fetch_ahead(const void *from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last `LEFT` commits of this thread are under way.
template <int LEFT> DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// A number, or four at a multiple of 16, that another block may have written while this kernel runs.
DEVICE float load_coherent(const float *at) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(at) : "memory");
  return x;
}

DEVICE void load_coherent(float (&four)[4], const void *at) {
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
               : "l"(at)
               : "memory");
}

// Counts up what blocks share, and says what it was. What threads have written before a barrier of their block,
// after which one of them counts, can be read by those of a block that counts later, after its next one.
DEVICE int count_up(int &counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(&counter) : "memory");
  return before;
}

// Kernels of a graph may begin before the one before them has ended (programmatic dependent launch,
// from compute capability 9.0 on; nothing elsewhere). Every thread waits for it, and for what it has
// written, before it reads or writes what others do; so, in turn, all that came before it has ended.
DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What a block does that has nothing to do. It makes room at once; the first one waits, so that when this
// kernel has ended the one before has, too.
DEVICE void end_idle() {
  if (blockIdx.x == 0) wait_for_kernel_before();
}

// The next kernel's blocks may take what room there is as soon as all blocks of this one have said so.
DEVICE void let_kernel_after_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What follows is for compute capability 9.0 alone.

// A matrix in memory that is read in boxes, as the driver describes it (CUtensorMap).
struct alignas(64) Boxes {
  u64 words[16];
};

// A barrier in shared memory: a phase ends when so many threads have arrived and all bytes that were
// expected have come.
DEVICE void init_barrier(u64 &barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count)
               : "memory");
}

// To other threads and to what copies boxes.
DEVICE void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void arrive(u64 &barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives; the phase ends when as many bytes more have come.
DEVICE void expect_bytes(u64 &barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Waits for the end of a phase: of the first one (0), the second one (1), and so on in turns.
DEVICE void wait_for(u64 &barrier, int phase) {
  u32 done = 0;
  while (!done) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
                 "selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(&barrier)), "r"(phase)
                 : "memory");
  }
}

// Begins to copy the box that begins at a row and column into shared memory, at a multiple of 1024: a
// row's 128 bytes follow each other's, their lines of 16 in an order that depends on the row. There are
// zeros where the matrix has ended. `ONCE`: it will not be read again soon.
template <bool ONCE> DEVICE void load_box(void *to, const Boxes &from, int column, int row, u64 &barrier) {
  const u64 keep = ONCE ? 0x12f0000000000000ull : 0x14f0000000000000ull;
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
               "l"(&from), "r"(column), "r"(row), "r"(shared_address(&barrier)), "l"(keep)
               : "memory");
}

// A box as the tensor cores read it, from column `k` on, a multiple of 16.
DEVICE u64 operand(const void *box, int k) {
  const u64 address = (shared_address(box) + k * 2) & 0x3ffff;
  return address >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Around a group's multiplications: sums can be read and boxes be overwritten after the end.
DEVICE void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_multiplying() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define SUMS_4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])

// d += a b over a group: a is 64x16, b 16 by eight times as many as d has rows. A warp has 16
// rows, spread over its lanes as `MULTIPLY` has them.
#define MULTIPLY_BOXES(name, type)                                                                 \
  DEVICE void name(float (&d)[2][4], u64 a, u64 b) {                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " "                   \
                 "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, 0, 0;"                               \
                 : SUMS_4(0), SUMS_4(1)                                                            \
                 : "l"(a), "l"(b));                                                                \
  }                                                                                                \
  DEVICE void name(float (&d)[4][4], u64 a, u64 b) {                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " "                   \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "                       \
                 "%16, %17, 1, 1, 1, 0, 0;"                                                        \
                 : SUMS_4(0), SUMS_4(1), SUMS_4(2), SUMS_4(3)                                      \
                 : "l"(a), "l"(b));                                                                \
  }                                                                                                \
  DEVICE void name(float (&d)[8][4], u64 a, u64 b) {                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                   \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                         \
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "              \
                 "%32, %33, 1, 1, 1, 0, 0;"                                                        \
                 : SUMS_4(0), SUMS_4(1), SUMS_4(2), SUMS_4(3), SUMS_4(4), SUMS_4(5), SUMS_4(6),    \
                   SUMS_4(7)                                                                       \
                 : "l"(a), "l"(b));                                                                \
  }
MULTIPLY_BOXES(multiply_boxes_bf16, "bf16")
MULTIPLY_BOXES(multiply_boxes_f16, "f16")

// Waits until so many threads are here, the first ones of the block.
template <int COUNT> DEVICE void sync_threads() { asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory"); }

// All threads of a cluster arrive, and then wait until all have; what they have written before can be read
// after that with `SHOW`.
template <bool SHOW> DEVICE void arrive_at_cluster() {
  if (SHOW) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
}
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// `arrive` at the same barrier of a block of the cluster. Not with `.release.cluster`: that waits for all that
// the thread has written, in every slice.
DEVICE void arrive_at_peer(u64 &own, int rank) {
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; "
               "mbarrier.arrive.shared::cluster.b64 _, [a]; }" ::"r"(shared_address(&own)),
               "r"(rank)
               : "memory");
}

// `load_box` for all blocks of the cluster whose bits are set: each gets it where this one has it, and its
// barrier is told.
DEVICE void load_box_for(int blocks, void *to, const Boxes &from, int column, int row, u64 &barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
               "l"(&from), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"((u16)blocks)
               : "memory");
}

// Four numbers of another block of the cluster, from where this one's shared memory has them.
DEVICE void load_of_peer(float (&four)[4], const void *own, int rank) {
  u32 address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
               : "r"(address)
               : "memory");
}
