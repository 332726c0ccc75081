#include "ops/simd_tile.h"

namespace diffusionz {
namespace {

template <int Rows, int Bytes>
[[gnu::always_inline]] inline void tile_of(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                           int64_t k, bool accumulate) {
    typedef float V __attribute__((vector_size(Bytes), aligned(4), may_alias));
    constexpr int64_t kLanes = Bytes / 4;
    V sum[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        sum[r][0] = accumulate ? *reinterpret_cast<const V*>(c + r * ldc) : V{};
        sum[r][1] = accumulate ? *reinterpret_cast<const V*>(c + r * ldc + kLanes) : V{};
    }
    for (int64_t i = 0; i < k; ++i) {
        const V left = *reinterpret_cast<const V*>(b + i * ldb), right = *reinterpret_cast<const V*>(b + i * ldb + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const V factor = a[r * lda + i] - V{};  // in every lane
            sum[r][0] += factor * left;
            sum[r][1] += factor * right;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        *reinterpret_cast<V*>(c + r * ldc) = sum[r][0];
        *reinterpret_cast<V*>(c + r * ldc + kLanes) = sum[r][1];
    }
}

template <int Bytes>
[[gnu::always_inline]] inline void tile_of_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                                int64_t ldc, int64_t k, bool accumulate) {
    switch (rows) {
        case 6:
            return tile_of<6, Bytes>(a, lda, b, ldb, c, ldc, k, accumulate);
        case 5:
            return tile_of<5, Bytes>(a, lda, b, ldb, c, ldc, k, accumulate);
        case 4:
            return tile_of<4, Bytes>(a, lda, b, ldb, c, ldc, k, accumulate);
        case 3:
            return tile_of<3, Bytes>(a, lda, b, ldb, c, ldc, k, accumulate);
        case 2:
            return tile_of<2, Bytes>(a, lda, b, ldb, c, ldc, k, accumulate);
        default:
            return tile_of<1, Bytes>(a, lda, b, ldb, c, ldc, k, accumulate);
    }
}

struct Kernel {
    int64_t width;
    void (*multiply)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool);
};

void multiply_128(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                  bool accumulate) {
    tile_of_rows<16>(rows, a, lda, b, ldb, c, ldc, k, accumulate);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
__attribute__((target("avx2,fma"))) void multiply_256(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb,
                                                      float* c, int64_t ldc, int64_t k, bool accumulate) {
    tile_of_rows<32>(rows, a, lda, b, ldb, c, ldc, k, accumulate);
}
__attribute__((target("avx512f,fma"))) void multiply_512(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb,
                                                         float* c, int64_t ldc, int64_t k, bool accumulate) {
    tile_of_rows<64>(rows, a, lda, b, ldb, c, ldc, k, accumulate);
}
Kernel pick() {
    if (__builtin_cpu_supports("avx512f")) return {32, multiply_512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {16, multiply_256};
    return {8, multiply_128};
}
#else
Kernel pick() { return {8, multiply_128}; }
#endif

const Kernel& kernel() {
    static const Kernel picked = pick();
    return picked;
}

}  // namespace

int64_t panel_width() { return kernel().width; }

void multiply_tile(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                   bool accumulate) {
    kernel().multiply(rows, a, lda, b, ldb, c, ldc, k, accumulate);
}

}  // namespace diffusionz
