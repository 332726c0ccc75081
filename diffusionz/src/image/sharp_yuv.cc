#include "image/sharp_yuv.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "ops/vector_math.h"

// The method, its constants and its roundings are those of libwebp's SharpYUV: luma and chroma are corrected, up to four times,
// by what the picture that a decoder would show lacks in linear light. libwebp's own is scalar code, takes more look-ups and
// knows one thread: it took longer than the encoder behind it. The samples here equal those of libwebp 1.2, strip by strip.
namespace diffusionz {
namespace {

// Strips are converted apart, each with rows of its neighbours around it, more than the filters reach: the samples depend on the
// strips, which are fixed, not on the threads.
constexpr int32_t kStripRows = 128, kOverlapRows = 8;
constexpr unsigned kThreadsMax = 8;
constexpr int kIterations = 4;
constexpr int32_t kLevels = 1024;  // of a sample while it is worked on: 8 bits and 2 more
constexpr int32_t kChannels = 3;   // red, green, blue
constexpr int32_t kPixels = 4;     // of a cell, the pixels that share chroma: upper left, upper right, lower left, lower right

// ITU-R BT.709's transfer function. Linear light has 16 bits.
struct Gamma {
    int32_t linear[kLevels];
    int32_t level[513];  // at every 128th linear value: the level in the low 16 bits, the way to the next above

    Gamma() {
        const double a = 0.09929682680944, threshold = 0.018053968510807, scale = 65536.0;
        for (int32_t i = 0; i < kLevels; ++i) {
            const double g = i / double{kLevels};
            linear[i] =
                static_cast<int32_t>((g <= threshold * 4.5 ? g / 4.5 : std::pow((g + a) / (1 + a), 1 / 0.45)) * scale + 0.5);
        }
        const auto at = [&](int32_t i) {
            const double g = std::min(i, 512) / 512.0;
            return static_cast<int32_t>((g <= threshold ? 4.5 * g : (1 + a) * std::pow(g, 0.45) - a) * scale + 0.5) >> 6;
        };
        for (int32_t i = 0; i <= 512; ++i) level[i] = at(i) | (at(i + 1) - at(i)) << 16;
    }
};

[[gnu::always_inline]] inline int32_t gray(int32_t r, int32_t g, int32_t b) {
    const auto u = [](int32_t x) { return static_cast<uint32_t>(x); };
    return static_cast<int32_t>((13933 * u(r) + 46871 * u(g) + 4732 * u(b) + 32768) >> 16);
}

[[gnu::always_inline]] inline int32_t clip(int32_t x) { return std::clamp(x, 0, kLevels - 1); }

// A row of cells: luma as kPixels arrays of `cells`, chroma (red, green and blue less their gray) as kChannels arrays of
// `cells` + 2, whose ends repeat their neighbours. The targets have no such ends.
struct Row {
    int32_t *luma, *luma_target, *chroma, *chroma_target;
};

// Kept scalar: gathers are slow on some processors, and what GCC emits in their stead is slower than plain loads everywhere.
template <int kShift>
[[gnu::noinline]] void look_up(const int32_t* __restrict table, const int32_t* x, ptrdiff_t count, int32_t* to) {
    for (ptrdiff_t i = 0; i < count; ++i) {
        to[i] = table[static_cast<uint32_t>(x[i]) >> kShift];
        __asm__ volatile("");  // no compiler vectorises across it
    }
}

// Each of `count` linear values to its level.
[[gnu::always_inline]] inline void to_levels(const Gamma& gamma, int32_t* __restrict x, ptrdiff_t count,
                                             int32_t* __restrict entry) {
    look_up<7>(gamma.level, x, count, entry);
    for (ptrdiff_t i = 0; i < count; ++i) x[i] = (entry[i] & 0xffff) + (((entry[i] >> 16) * (x[i] & 127) + 64) >> 7);
}

// What is shown of `linear`, kChannels by kPixels arrays of `cells`: its luma and its chroma. Overwrites `linear`.
[[gnu::always_inline]] inline void measure(const Gamma& gamma, int32_t* __restrict linear, ptrdiff_t cells,
                                           int32_t* __restrict luma, int32_t* __restrict chroma) {
    const ptrdiff_t channel = kPixels * cells;
    for (ptrdiff_t i = 0; i < channel; ++i) luma[i] = gray(linear[i], linear[channel + i], linear[2 * channel + i]);
    for (int32_t c = 0; c < kChannels; ++c) {
        const int32_t* __restrict p = linear + c * channel;
        int32_t* __restrict mean = chroma + c * cells;
        for (ptrdiff_t i = 0; i < cells; ++i) mean[i] = (p[i] + p[cells + i] + p[2 * cells + i] + p[3 * cells + i] + 2) >> 2;
    }
    to_levels(gamma, luma, channel, linear);
    to_levels(gamma, chroma, kChannels * cells, linear);
    for (ptrdiff_t i = 0; i < cells; ++i) {
        const int32_t r = chroma[i], g = chroma[cells + i], b = chroma[2 * cells + i], w = gray(r, g, b);
        chroma[i] = r - w;
        chroma[cells + i] = g - w;
        chroma[2 * cells + i] = b - w;
    }
}

DIFFUSIONZ_VECTORIZED void start_row(const Gamma& gamma, const uint8_t* __restrict upper, const uint8_t* __restrict lower,
                                     int32_t width, const Row& row, int32_t* __restrict scratch) {
    const ptrdiff_t cells = (width + 1) / 2, channel = kPixels * cells;
    const auto split = [&](const uint8_t* __restrict rgb, ptrdiff_t first) {
        int32_t* __restrict r = scratch + first * cells;
        int32_t* __restrict g = r + channel;
        int32_t* __restrict b = g + channel;
        for (ptrdiff_t i = 0; i < width / 2; ++i) {
            r[i] = rgb[6 * i] * 4;
            g[i] = rgb[6 * i + 1] * 4;
            b[i] = rgb[6 * i + 2] * 4;
            r[cells + i] = rgb[6 * i + 3] * 4;
            g[cells + i] = rgb[6 * i + 4] * 4;
            b[cells + i] = rgb[6 * i + 5] * 4;
        }
        if (width % 2) {
            r[cells - 1] = r[2 * cells - 1] = rgb[3 * width - 3] * 4;
            g[cells - 1] = g[2 * cells - 1] = rgb[3 * width - 2] * 4;
            b[cells - 1] = b[2 * cells - 1] = rgb[3 * width - 1] * 4;
        }
    };
    split(upper, 0);
    split(lower, 2);
    for (ptrdiff_t i = 0; i < channel; ++i) row.luma[i] = gray(scratch[i], scratch[channel + i], scratch[2 * channel + i]);
    look_up<0>(gamma.linear, scratch, kChannels * channel, scratch);
    measure(gamma, scratch, cells, row.luma_target, row.chroma_target);
}

// Shows the row as a decoder would and corrects it by what is missing. Returns the sum of luma's corrections.
DIFFUSIONZ_VECTORIZED int32_t refine_row(const Gamma& gamma, const Row& row, const int32_t* above, const int32_t* below,
                                         ptrdiff_t cells, int32_t* __restrict scratch) {
    const ptrdiff_t channel = kPixels * cells, padded = cells + 2;
    int32_t* __restrict luma = row.luma;
    for (int32_t c = 0; c < kChannels; ++c) {
        const int32_t* here = row.chroma + c * padded + 1;
        const int32_t* up = above + c * padded + 1;
        const int32_t* down = below + c * padded + 1;
        int32_t* __restrict to = scratch + c * channel;
        for (ptrdiff_t i = 0; i < cells; ++i) {
            const auto show = [&](const int32_t* other, ptrdiff_t side, ptrdiff_t pixel) {
                const int32_t chroma = (here[i] * 9 + (here[i + side] + other[i]) * 3 + other[i + side] + 8) >> 4;
                to[pixel * cells + i] = clip(luma[pixel * cells + i] + chroma);
            };
            show(up, -1, 0);
            show(up, 1, 1);
            show(down, -1, 2);
            show(down, 1, 3);
        }
    }
    look_up<0>(gamma.linear, scratch, kChannels * channel, scratch);
    int32_t* __restrict shown = scratch + kChannels * channel;
    int32_t* __restrict shown_chroma = shown + channel;
    measure(gamma, scratch, cells, shown, shown_chroma);
    int32_t sum = 0;
    for (ptrdiff_t i = 0; i < channel; ++i) {
        const int32_t missing = row.luma_target[i] - shown[i];
        luma[i] = clip(luma[i] + missing);
        sum += std::abs(missing);
    }
    for (int32_t c = 0; c < kChannels; ++c) {
        int32_t* __restrict chroma = row.chroma + c * padded + 1;
        for (ptrdiff_t i = 0; i < cells; ++i) chroma[i] += row.chroma_target[c * cells + i] - shown_chroma[c * cells + i];
        chroma[-1] = chroma[0];
        chroma[cells] = chroma[cells - 1];
    }
    return sum;
}

// libwebp's matrix from red, green and blue of 10 bits.
DIFFUSIONZ_VECTORIZED void store_luma(const int32_t* __restrict left, const int32_t* __restrict right,
                                      const int32_t* __restrict chroma, ptrdiff_t cells, int32_t width, uint8_t* __restrict to) {
    const int32_t *r = chroma + 1, *g = r + cells + 2, *b = g + cells + 2;
    const auto luma = [&](ptrdiff_t i, int32_t w) {
        return static_cast<uint8_t>(
            std::clamp((16839 * (r[i] + w) + 33059 * (g[i] + w) + 6420 * (b[i] + w) + (16 << 18) + (1 << 17)) >> 18, 0, 255));
    };
    for (ptrdiff_t i = 0; i < width / 2; ++i) {
        to[2 * i] = luma(i, left[i]);
        to[2 * i + 1] = luma(i, right[i]);
    }
    if (width % 2) to[width - 1] = luma(cells - 1, left[cells - 1]);
}

DIFFUSIONZ_VECTORIZED void store_chroma(const int32_t* __restrict chroma, ptrdiff_t cells, uint8_t* __restrict u,
                                        uint8_t* __restrict v) {
    const int32_t *r = chroma + 1, *g = r + cells + 2, *b = g + cells + 2;
    const auto sample = [](int32_t sum) {
        return static_cast<uint8_t>(std::clamp((sum + (128 << 18) + (1 << 17)) >> 18, 0, 255));
    };
    for (ptrdiff_t i = 0; i < cells; ++i) {
        u[i] = sample(-9719 * r[i] - 19081 * g[i] + 28800 * b[i]);
        v[i] = sample(28800 * r[i] - 24116 * g[i] - 4684 * b[i]);
    }
}

void convert_strip(const Gamma& gamma, const uint8_t* rgb, int32_t width, int32_t height, int32_t begin, const YuvPlanes& to) {
    const int32_t end = std::min(begin + kStripRows, height);
    const int32_t from = std::max(begin - kOverlapRows, 0), until = std::min(end + kOverlapRows, height);
    const ptrdiff_t cells = (width + 1) / 2, rows = (until - from + 1) / 2;
    const ptrdiff_t luma = kPixels * cells, chroma = kChannels * (cells + 2), row_size = 2 * luma + chroma + kChannels * cells;
    const std::unique_ptr<int32_t[]> memory(new int32_t[rows * row_size + (kChannels + 1) * luma + kChannels * cells]);
    int32_t* const scratch = memory.get() + rows * row_size;
    const auto row = [&](ptrdiff_t i) {
        int32_t* const base = memory.get() + i * row_size;
        return Row{base, base + luma, base + 2 * luma, base + 2 * luma + chroma};
    };
    for (ptrdiff_t i = 0; i < rows; ++i) {
        const auto source = [&](ptrdiff_t y) { return rgb + std::min<ptrdiff_t>(from + y, height - 1) * 3 * width; };
        const Row r = row(i);
        start_row(gamma, source(2 * i), source(2 * i + 1), width, r, scratch);
        for (int32_t c = 0; c < kChannels; ++c) {
            int32_t* const plane = r.chroma + c * (cells + 2) + 1;
            std::copy_n(r.chroma_target + c * cells, cells, plane);
            plane[-1] = plane[0];
            plane[cells] = plane[cells - 1];
        }
    }
    int64_t last = INT64_MAX;
    for (int k = 0; k < kIterations; ++k) {
        int64_t sum = 0;
        for (ptrdiff_t i = 0; i < rows; ++i)
            sum += refine_row(gamma, row(i), row(std::max<ptrdiff_t>(i - 1, 0)).chroma, row(std::min(i + 1, rows - 1)).chroma,
                              cells, scratch);
        if (k > 0 && (sum < 3 * luma * rows || sum > last)) break;
        last = sum;
    }
    for (int32_t y = begin; y < end; ++y) {
        const Row r = row((y - from) / 2);
        const int32_t* const left = r.luma + (y % 2) * 2 * cells;
        store_luma(left, left + cells, r.chroma, cells, width, to.y + y * to.y_stride);
        if (y % 2 == 0) store_chroma(r.chroma, cells, to.u + y / 2 * to.uv_stride, to.v + y / 2 * to.uv_stride);
    }
}

}  // namespace

void sharp_yuv(const uint8_t* rgb, int32_t width, int32_t height, const YuvPlanes& to) {
    static const Gamma gamma;
    const int32_t strips = (height + kStripRows - 1) / kStripRows;
    std::atomic<int32_t> next{0};
    const auto work = [&] {
        for (int32_t i = next++; i < strips; i = next++) convert_strip(gamma, rgb, width, height, i * kStripRows, to);
    };
    const auto threads =
        std::min<size_t>(std::clamp(std::thread::hardware_concurrency(), 1u, kThreadsMax), static_cast<size_t>(strips));
    std::vector<std::future<void>> others;
    for (size_t i = 1; i < threads; ++i) others.push_back(std::async(std::launch::async, work));
    work();
    for (auto& other : others) other.get();
}

}  // namespace diffusionz
