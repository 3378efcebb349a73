// What the kernels need of the machine, on a GPU of compute capability 8.0 or later. The CPU harness
// has the same names (harness/machine.h).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
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

// Begins to copy 16 bytes into shared memory, or zeros if not `valid`.
DEVICE void copy_async(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same of what no kernel before writes: it may begin before `wait_for_kernel_before`. Memory gives
// what lies beside it to the cache, too: it is read next.
DEVICE void copy_ahead(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
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

// Kernels of a graph may begin before the one before them has ended (programmatic dependent launch,
// from compute capability 9.0 on; nothing elsewhere). Every thread waits for it, and for what it has
// written, before it reads or writes what others do; so, in turn, all that came before it has ended.
DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may take what room there is as soon as all blocks of this one are here.
DEVICE void let_kernel_after_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
