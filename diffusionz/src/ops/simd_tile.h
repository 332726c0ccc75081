// The inner loop of the CPU's own products: a tile of up to 6 rows by one panel of columns, kept in registers over all of k.
//
// Every number of the tile is one chain of multiply-adds in the order of k, whatever the tile's place, its number of rows, the
// vector's width or the number of threads. So a row's result depends on that row alone, bit for bit: libraries choose another
// order of summation for another number of rows.
#pragma once

#include <cstdint>
#include <cstring>

namespace diffusionz {

// Columns of a panel: two vectors of the processor that this runs on.
int64_t panel_width();

constexpr int64_t kTileRowsMax = 6;
constexpr int64_t kPanelWidthMax = 32;

// c[r][j] (+)= sum over i of a[r][i] * b[i][j] for r < rows <= 6 and j < panel_width(); `accumulate` begins the chains with c's
// numbers. The strides lda, ldb and ldc are in floats.
void multiply_tile(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                   bool accumulate);

}  // namespace diffusionz
