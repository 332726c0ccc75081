// Hopper's asynchronous pieces: warpgroup matrix products, the tensor memory accelerator, barriers in shared memory, clusters.
//
// Only what gemm_sm90.cu, attention_sm90.cu, conv2d.cu and few_rows_linear.cu use; instructions of compute capability 9.0a. Reference: PTX ISA 8.0 and later, "Asynchronous Warpgroup
// Level Matrix Instructions" and "Data Movement and Conversion Instructions: Tensor copy".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace diffusionz::kernels {

// --- Products ------------------------------------------------------------------------------------------------------
// Wgmma<T, N>::run: d[64, N] = (accumulate ? d : 0) + A[64, 32 bytes] B[N, 32 bytes]^T by the four warps of a warpgroup, from two
// descriptors of shared memory. A thread holds, of each 8 columns i, d[4 i + 0, 1] in row 16 warp + lane / 4, columns
// 8 i + 2 (lane % 4) + {0, 1}, and d[4 i + 2, 3] eight rows below.
template <class T, int N>
struct Wgmma;

#define DIFFUSIONZ_REGISTERS_32                                                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "                                                     \
    "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "                                           \
    "%28, %29, %30, %31"
#define DIFFUSIONZ_REGISTERS_40 DIFFUSIONZ_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define DIFFUSIONZ_REGISTERS_48 DIFFUSIONZ_REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define DIFFUSIONZ_REGISTERS_64                                                                                        \
    DIFFUSIONZ_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DIFFUSIONZ_REGISTERS_80                                                                                        \
    DIFFUSIONZ_REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define DIFFUSIONZ_REGISTERS_88 DIFFUSIONZ_REGISTERS_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define DIFFUSIONZ_REGISTERS_96 DIFFUSIONZ_REGISTERS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define DIFFUSIONZ_OPERANDS_8(i)                                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define DIFFUSIONZ_OPERANDS_32                                                                                         \
    DIFFUSIONZ_OPERANDS_8(0), DIFFUSIONZ_OPERANDS_8(8), DIFFUSIONZ_OPERANDS_8(16), DIFFUSIONZ_OPERANDS_8(24)
#define DIFFUSIONZ_OPERANDS_40 DIFFUSIONZ_OPERANDS_32, DIFFUSIONZ_OPERANDS_8(32)
#define DIFFUSIONZ_OPERANDS_48 DIFFUSIONZ_OPERANDS_40, DIFFUSIONZ_OPERANDS_8(40)
#define DIFFUSIONZ_OPERANDS_64 DIFFUSIONZ_OPERANDS_48, DIFFUSIONZ_OPERANDS_8(48), DIFFUSIONZ_OPERANDS_8(56)
#define DIFFUSIONZ_OPERANDS_80 DIFFUSIONZ_OPERANDS_64, DIFFUSIONZ_OPERANDS_8(64), DIFFUSIONZ_OPERANDS_8(72)
#define DIFFUSIONZ_OPERANDS_88 DIFFUSIONZ_OPERANDS_80, DIFFUSIONZ_OPERANDS_8(80)
#define DIFFUSIONZ_OPERANDS_96 DIFFUSIONZ_OPERANDS_88, DIFFUSIONZ_OPERANDS_8(88)

// `count` numbers of d; a, b, p: the operands behind them. Only 16-bit factors say how they lie.
#define DIFFUSIONZ_WGMMA(T, N, count, types, a, b, p, majors)                                                         \
    template <>                                                                                                       \
    struct Wgmma<T, N> {                                                                                              \
        static __device__ __forceinline__ void run(float (&d)[count], uint64_t a_tile, uint64_t b_tile, int accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N types " {" \
                         DIFFUSIONZ_REGISTERS_##count "}, " a ", " b ", p, 1, 1" majors ";\n}\n"                      \
                         : DIFFUSIONZ_OPERANDS_##count                                                                \
                         : "l"(a_tile), "l"(b_tile), "r"(accumulate));                                                \
        }                                                                                                             \
    }
DIFFUSIONZ_WGMMA(__half, 64, 32, "k16.f32.f16.f16", "%32", "%33", "%34", ", 0, 0");
DIFFUSIONZ_WGMMA(__nv_bfloat16, 64, 32, "k16.f32.bf16.bf16", "%32", "%33", "%34", ", 0, 0");
DIFFUSIONZ_WGMMA(__nv_bfloat16, 80, 40, "k16.f32.bf16.bf16", "%40", "%41", "%42", ", 0, 0");
DIFFUSIONZ_WGMMA(__nv_bfloat16, 160, 80, "k16.f32.bf16.bf16", "%80", "%81", "%82", ", 0, 0");
DIFFUSIONZ_WGMMA(__nv_bfloat16, 176, 88, "k16.f32.bf16.bf16", "%88", "%89", "%90", ", 0, 0");
DIFFUSIONZ_WGMMA(__nv_bfloat16, 192, 96, "k16.f32.bf16.bf16", "%96", "%97", "%98", ", 0, 0");
DIFFUSIONZ_WGMMA(__nv_fp8_e4m3, 160, 80, "k32.f32.e4m3.e4m3", "%80", "%81", "%82", "");
DIFFUSIONZ_WGMMA(__nv_fp8_e4m3, 176, 88, "k32.f32.e4m3.e4m3", "%88", "%89", "%90", "");
DIFFUSIONZ_WGMMA(__nv_fp8_e4m3, 192, 96, "k32.f32.e4m3.e4m3", "%96", "%97", "%98", "");

// d[64, 128] = (accumulate ? d : 0) + A[64, 16] B[16, 128]: A from registers, as a warp's 16 rows of mma.m16n8k16 lie; B's rows lie one
// after another.
__device__ __forceinline__ void wgmma_from_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b_tile, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" DIFFUSIONZ_REGISTERS_64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
        : DIFFUSIONZ_OPERANDS_64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(accumulate));
}

#undef DIFFUSIONZ_WGMMA
#undef DIFFUSIONZ_OPERANDS_96
#undef DIFFUSIONZ_OPERANDS_88
#undef DIFFUSIONZ_OPERANDS_80
#undef DIFFUSIONZ_OPERANDS_64
#undef DIFFUSIONZ_OPERANDS_48
#undef DIFFUSIONZ_OPERANDS_40
#undef DIFFUSIONZ_OPERANDS_32
#undef DIFFUSIONZ_OPERANDS_8
#undef DIFFUSIONZ_REGISTERS_96
#undef DIFFUSIONZ_REGISTERS_88
#undef DIFFUSIONZ_REGISTERS_80
#undef DIFFUSIONZ_REGISTERS_64
#undef DIFFUSIONZ_REGISTERS_48
#undef DIFFUSIONZ_REGISTERS_40
#undef DIFFUSIONZ_REGISTERS_32

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until at most N groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

// Of a factor whose rows of 128 bytes lie one after another in the 128-byte swizzle, from a multiple of 1024: groups of 8 rows are
// 1024 bytes apart. The next 32 bytes along the rows are 2 further.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// The same for a factor whose columns wgmma's depth runs along: boxes of 64 columns, rows of 128 bytes, boxes `box_bytes` apart.
// 16 rows further is 128 further.
__device__ __forceinline__ uint64_t wgmma_descriptor_across(uint32_t address, uint32_t box_bytes) {
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{box_bytes >> 4} << 16 | (address & 0x3ffff) >> 4;
}
// Keeps the compiler from moving what reads or writes x across products under way.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- Barriers in shared memory -------------------------------------------------------------------------------------
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}
// After all are initialised, before the other block of the cluster or a copy signals one.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
// Arrives, and says how many bytes the phase waits for.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// The threads where `mine` holds arrive at this barrier of the cluster's block `block`. Ordered as within a block: enough for reads
// by the tensor cores, which are complete when they were waited for; a release to the cluster is a memory fence, and halves the
// speed of a pipeline that issues one a step.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t block, bool mine) {
    asm volatile(
        "{\n.reg .pred p;\n.reg .b32 remote;\n"
        "setp.ne.b32 p, %2, 0;\n"
        "@p mapa.shared::cluster.u32 remote, %0, %1;\n"
        "@p mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(block), "r"(static_cast<int>(mine))
        : "memory");
}
// One arrival at a barrier of this block.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// Until the phase of this parity is complete; of a fresh barrier the one before the first (parity 1) is.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

// Of some warps of the block, which are `threads` threads; ids 1 to 15.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// --- Tensor memory accelerator ---------------------------------------------------------------------------------------
// A box of the matrix that `map` describes from (row, column) to shared memory; its bytes complete on `barrier`. kToBoth: to the
// same place in both blocks of a cluster of two, with a completion on each one's barrier.
template <bool kToBoth>
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row) {
    if constexpr (kToBoth)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
            "[%2], %5;\n" ::"r"(to),
            "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(static_cast<uint16_t>(3))
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(to),
            "l"(map), "r"(barrier), "r"(column), "r"(row)
            : "memory");
}
// The same of a matrix of four dimensions, from (block, 0, 0, column).
template <bool kToBoth>
__device__ __forceinline__ void tma_load_interleaved(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int block) {
    if constexpr (kToBoth)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
            "[%1, {%3, %5, %5, %4}], [%2], %6;\n" ::"r"(to),
            "l"(map), "r"(barrier), "r"(column), "r"(block), "r"(0), "h"(static_cast<uint16_t>(3))
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
            "[%1, {%3, %5, %5, %4}], [%2];\n" ::"r"(to),
            "l"(map), "r"(barrier), "r"(column), "r"(block), "r"(0)
            : "memory");
}
// The same of three dimensions.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, int matrix) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(matrix)
        : "memory");
}
// From shared memory to the matrix, as a group of its own.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(map), "r"(from),
                 "r"(column), "r"(row)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int column, int row, int matrix) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];\n" ::"l"(map), "r"(from),
                 "r"(column), "r"(row), "r"(matrix)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// Until at most N of this thread's stores still read shared memory.
template <int N>
__device__ __forceinline__ void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
}
// Before a barrier behind which another thread hands what this one wrote to shared memory to a copy.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// 8x8 matrices of 16-bit numbers from a warp's registers to the columns of shared memory; lane l gives the address of column l % 8
// of matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t to, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(to), "r"(a), "r"(b) : "memory");
}

// The same to rows: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// --- Blocks ----------------------------------------------------------------------------------------------------------
// A warpgroup's share of the register file, a thread.
template <int N>
__device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
}

// A place in a ring of kStages buffers and the parity of its current round.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace diffusionz::kernels
