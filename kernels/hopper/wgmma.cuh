// SPDX-License-Identifier: Apache-2.0
// wgmma of 64 x N x 16: D += A B with float32 D in registers, 16-bit B in shared memory, 16-bit A in either.
#pragma once

#include "ptx.cuh"

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of accumulators across the surrounding asm statements.
template <int COUNT>
__device__ inline void keep_in_order(float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

template <typename T, int N>
struct Wgmma;

// The instruction's register list and the numbers of the operands that follow it depend on N, hence macros.
#define FUSEDMLA_ACC4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define FUSEDMLA_ACC_4 FUSEDMLA_ACC4(0)
#define FUSEDMLA_ACC_8 FUSEDMLA_ACC_4, FUSEDMLA_ACC4(4)
#define FUSEDMLA_ACC_12 FUSEDMLA_ACC_8, FUSEDMLA_ACC4(8)
#define FUSEDMLA_ACC_16 FUSEDMLA_ACC_12, FUSEDMLA_ACC4(12)
#define FUSEDMLA_ACC_32                                                                                \
    FUSEDMLA_ACC_16, FUSEDMLA_ACC4(16), FUSEDMLA_ACC4(20), FUSEDMLA_ACC4(24), FUSEDMLA_ACC4(28)

#define FUSEDMLA_REGS4 "%0, %1, %2, %3"
#define FUSEDMLA_REGS8 FUSEDMLA_REGS4 ", %4, %5, %6, %7"
#define FUSEDMLA_REGS12 FUSEDMLA_REGS8 ", %8, %9, %10, %11"
#define FUSEDMLA_REGS16 FUSEDMLA_REGS12 ", %12, %13, %14, %15"
#define FUSEDMLA_REGS32                                                                                              \
    FUSEDMLA_REGS16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// R: registers of D; O0..O5: "%R" to "%R+5".
#define FUSEDMLA_WGMMA(T, PTX_TYPE, N, R, O0, O1, O2, O3, O4, O5)                                                     \
    template <>                                                                                                      \
    struct Wgmma<T, N> {                                                                                             \
        /* Both operands by descriptor; TRANSPOSE_A: A is stored with m contiguous. */                               \
        template <bool TRANSPOSE_A>                                                                                  \
        static __device__ inline void shared(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {               \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O2 ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {" FUSEDMLA_REGS##R "}, " O0  \
                         ", " O1 ", p, 1, 1, " O3 ", 0;\n}\n"                                                        \
                         : FUSEDMLA_ACC_##R                                                                                       \
                         : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSE_A)));                             \
        }                                                                                                            \
        /* A from registers: rows g and g + 8, columns 2j and 2j + 8 of lane 4g + j, as for mma.m16n8k16. */         \
        static __device__ inline void registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O5 ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {" FUSEDMLA_REGS##R           \
                         "}, {" O0 ", " O1 ", " O2 ", " O3 "}, " O4 ", p, 1, 1, 0;\n}\n"                             \
                         : FUSEDMLA_ACC_##R                                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));                \
        }                                                                                                            \
    };

#define FUSEDMLA_WGMMA_BOTH(N, R, O0, O1, O2, O3, O4, O5)      \
    FUSEDMLA_WGMMA(bf16, "bf16", N, R, O0, O1, O2, O3, O4, O5)   \
    FUSEDMLA_WGMMA(fp16, "f16", N, R, O0, O1, O2, O3, O4, O5)

FUSEDMLA_WGMMA_BOTH(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
FUSEDMLA_WGMMA_BOTH(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
FUSEDMLA_WGMMA_BOTH(24, 12, "%12", "%13", "%14", "%15", "%16", "%17")
FUSEDMLA_WGMMA_BOTH(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
FUSEDMLA_WGMMA_BOTH(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")

#define FUSEDMLA_ACC16(i) FUSEDMLA_ACC4(i), FUSEDMLA_ACC4((i) + 4), FUSEDMLA_ACC4((i) + 8), FUSEDMLA_ACC4((i) + 12)
#define FUSEDMLA_ACC64 FUSEDMLA_ACC16(0), FUSEDMLA_ACC16(16), FUSEDMLA_ACC16(32), FUSEDMLA_ACC16(48)

#define FUSEDMLA_REGS64                                                                               \
    FUSEDMLA_REGS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// D[64, 128] += A[64, 16] B[16, 128]; A in registers, B with its columns contiguous, in two blocks of 64.
#define FUSEDMLA_WGMMA_128(T, PTX_TYPE)                                                                             \
    __device__ inline void wgmma_128(float (&d)[64], const uint32_t (&a)[4], uint64_t b, T) {                          \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." PTX_TYPE "." PTX_TYPE                            \
                     " {" FUSEDMLA_REGS64 "}, "                                                                    \
                     "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                        \
                     : FUSEDMLA_ACC64                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
    }

FUSEDMLA_WGMMA_128(bf16, "bf16")
FUSEDMLA_WGMMA_128(fp16, "f16")

// ---- 8-bit operands ----

// D[64, 128] (+)= A[64, 32] B[32, 128], both operands in shared memory with k contiguous.
__device__ inline void wgmma_e4m3_128(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" FUSEDMLA_REGS64 "}, %64, %65, p, 1, 1;\n}\n"
                 : FUSEDMLA_ACC64
                 : "l"(a), "l"(b), "r"(int(accumulate)));
}
// D[64, 32] (+)= A[64, 32] B[32, 32], A in registers.
__device__ inline void wgmma_e4m3_32(float (&d)[16], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {" FUSEDMLA_REGS16
                 "}, {%16, %17, %18, %19}, %20, p, 1, 1;\n}\n"
                 : FUSEDMLA_ACC_16
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}
