// y = silu(weight * (x - mean) / sqrt(var + eps) + bias), mean and var over a group's channels and all pixels, channels-last.
//
// Three kernels: each channel's mean and squared distances over parts of the picture (one read; the convolution before it may have
// left them already), their merge to a factor and an addend a channel, and y (one read, one write).
//
// Numbers: a thread's sums in float32 are of distances from its first pixel, of at most kThreadPixels pixels, so nothing cancels
// where |mean| is far over std; a block's threads are merged around their common mean (Chan, Golub and LeVeque 1979), the parts of a
// picture in float64. All sums in a fixed order.
// Limits: none but the grid's (65535 pictures).
// Reference: ops/group_norm.cc.

#include "kernels/group_norm.h"

#include <algorithm>

#include "kernels/launch.cuh"
#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 256, kThreadPixels = 32, kFactorThreads = 512;

// How a block's threads lie: `across` along the vectors of a pixel's channels, `down` along pixels.
struct Layout {
    int across, down;
    explicit Layout(int64_t vectors) : across(static_cast<int>(std::min<int64_t>(vectors, kThreads))), down(kThreads / across) {}
};

template <class T>
constexpr int kFull = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const T* x, float2* moments, int64_t pixels, int channels, int part_pixels, Layout layout) {
    wait_for_the_kernel_before();
    start_the_kernel_after();
    const int column = threadIdx.x % layout.across, row = threadIdx.x / layout.across;
    __shared__ float shared[3][kThreads * N];
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * part_pixels;
    const int count = static_cast<int>(min(static_cast<int64_t>(part_pixels), pixels - begin)), vectors = channels / N;
    const T* from = x + (blockIdx.y * pixels + begin) * channels;
    float2* to = moments + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * channels;
    for (int first = 0; first < vectors; first += layout.across) {
        const int vector = first + column;
        const int mine = vector < vectors && row < count ? (count - row + layout.down - 1) / layout.down : 0;
        float shift[N], sum[N], squares[N];
        if (mine > 0) {
            const auto numbers = load<T, N>(from, static_cast<int64_t>(row) * vectors + vector);
#pragma unroll
            for (int i = 0; i < N; ++i) shift[i] = to_float(numbers.values[i]), sum[i] = squares[i] = 0.0f;
        }
#pragma unroll 4
        for (int p = 1; p < mine; ++p) {
            const auto numbers = load<T, N>(from, static_cast<int64_t>(row + p * layout.down) * vectors + vector);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float distance = to_float(numbers.values[i]) - shift[i];
                sum[i] += distance;
                squares[i] += distance * distance;
            }
        }
        __syncthreads();
        const int slot = threadIdx.x * N;
        const float inverse = 1.0f / static_cast<float>(max(mine, 1));
#pragma unroll
        for (int i = 0; i < N; ++i) {
            shared[0][slot + i] = static_cast<float>(mine);
            shared[1][slot + i] = mine > 0 ? shift[i] + sum[i] * inverse : 0.0f;
            shared[2][slot + i] = mine > 0 ? squares[i] - sum[i] * sum[i] * inverse : 0.0f;
        }
        __syncthreads();
        // A channel a thread: its rows of threads in their order.
        const int width = min(layout.across, vectors - first) * N, stride = layout.across * N;
        for (int c = threadIdx.x; c < width; c += blockDim.x) {
            float sums = 0.0f, square = 0.0f;
            const float origin = shared[1][c];
            for (int y = 0; y < layout.down; ++y) sums += shared[0][y * stride + c] * (shared[1][y * stride + c] - origin);
            const float offset = sums / static_cast<float>(count), mean = origin + offset;
            for (int y = 0; y < layout.down; ++y) {
                const float distance = shared[1][y * stride + c] - origin - offset;
                square += shared[2][y * stride + c] + shared[0][y * stride + c] * distance * distance;
            }
            to[first * N + c] = make_float2(mean, square);
        }
    }
}

// A block a group and picture. One pass: in float64 E[x^2] - E[x]^2 of numbers that were float32 keeps the digits that they have.
template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    factors_kernel(const float2* moments, const T* weight, const T* bias, float2* factors, Parts parts, int count, int tiles, int across,
                   int channels, int group_channels, double eps) {
    wait_for_the_kernel_before();
    start_the_kernel_after();
    __shared__ double scratch[2][kFactorThreads / 32];
    const int first = blockIdx.x * group_channels;
    const float2* from = moments + static_cast<int64_t>(blockIdx.y) * count * channels + first;
    const bool even = parts.rows % parts.tile_rows == 0 && parts.columns % parts.tile_columns == 0;
    double pixels = static_cast<double>(parts.tile_rows * parts.tile_columns), sum = 0.0, squares = 0.0;
    // Neighbouring threads take a group's channels in a part, then the next parts.
    const int lanes = min(group_channels, kFactorThreads), step = kFactorThreads / lanes;
    for (int c = threadIdx.x % lanes; c < group_channels && threadIdx.x < lanes * step; c += lanes) {
#pragma unroll 8
        for (int part = threadIdx.x / lanes; part < count; part += step) {
            const float2 moment = from[static_cast<int64_t>(part) * channels + c];
            if (!even) {
                const int tile = part % tiles, row = tile / across, column = tile - row * across;
                pixels = static_cast<double>(min(parts.tile_rows, parts.rows - row * parts.tile_rows) *
                                             min(parts.tile_columns, parts.columns - column * parts.tile_columns));
            }
            const double mean = moment.x;
            sum += pixels * mean;
            squares += moment.y + pixels * mean * mean;
        }
    }
    sum = block_sum(sum, scratch[0]);
    squares = block_sum(squares, scratch[1]);
    const double total = static_cast<double>(parts.layers * parts.rows * parts.columns) * group_channels, mean = sum / total;
    const double variance = squares / total - mean * mean;
    const double inverse = 1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + eps);  // what is not a number stays that
    for (int c = first + threadIdx.x; c < first + group_channels; c += kFactorThreads) {
        const double factor = to_float(weight[c]) * inverse;
        factors[static_cast<int64_t>(blockIdx.y) * channels + c] =
            make_float2(static_cast<float>(factor), static_cast<float>(to_float(bias[c]) - mean * factor));
    }
}

template <class T, int N, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const T* x, const float2* factors, T* y, int64_t pixels, int channels, Layout layout) {
    wait_for_the_kernel_before();
    start_the_kernel_after();
    const int vectors = channels / N, column = threadIdx.x % layout.across, row = threadIdx.x / layout.across;
    const int64_t offset = blockIdx.y * pixels * vectors;
    for (int vector = column; vector < vectors; vector += layout.across) {
        float factor[N], addend[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float2 pair = factors[static_cast<int64_t>(blockIdx.y) * channels + vector * N + i];
            factor[i] = pair.x;
            addend[i] = pair.y;
        }
        // From the end to the beginning: of x the second-level cache still has the end, of y it shall have the beginning.
        const int64_t step = static_cast<int64_t>(gridDim.x) * layout.down;
#pragma unroll 4
        for (int64_t p = pixels - 1 - static_cast<int64_t>(blockIdx.x) * layout.down - row; p >= 0; p -= step) {
            const auto numbers = load_once<T, N>(x, offset + p * vectors + vector);
            float results[N];
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float value = to_float(numbers.values[i]) * factor[i] + addend[i];
                results[i] = kSilu ? __fdividef(value, 1.0f + __expf(-value)) : value;
            }
            store(y, offset + p * vectors + vector, results);
        }
    }
}

// Calls f with the numbers of a vector.
template <class T, class F>
cudaError_t with_vectors(int64_t channels, std::initializer_list<const void*> pointers, F&& f) {
    if (tiles<T>(channels, pointers, {})) return f(std::integral_constant<int, kFull<T>>());
    return f(std::integral_constant<int, 1>());
}

}  // namespace

Parts group_norm_parts(int64_t pixels, int64_t channels) {
    // As if by the widest vectors of 16-bit numbers; others take more pixels a thread, or fewer.
    const int64_t part = std::max<int64_t>(1, kThreads * 8 / channels) * kThreadPixels;
    return {1, pixels, 1, std::min(part, pixels), 1};
}

cudaError_t group_norm_moments(Type type, const void* x, float* moments, int64_t batch, int64_t pixels, int64_t channels,
                               cudaStream_t stream) {
    const Parts parts = group_norm_parts(pixels, channels);
    const dim3 grid(static_cast<unsigned>(parts.count()), static_cast<unsigned>(batch));
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return with_vectors<T>(channels, {x}, [&](auto numbers) {
            constexpr int N = decltype(numbers)::value;
            const Layout layout(channels / N);
            return launch(moments_kernel<T, N>, grid, layout.across * layout.down, 0, stream, /*overlapped=*/true,
                          static_cast<const T*>(x), reinterpret_cast<float2*>(moments), pixels, static_cast<int>(channels),
                          static_cast<int>(parts.tile_columns), layout);
        });
    });
}

cudaError_t group_norm_factors(Type type, const float* moments, const void* weight, const void* bias, float* factors, const Parts& parts,
                               int64_t batch, int64_t channels, int64_t groups, double eps, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(batch));
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return launch(
            factors_kernel<T>, grid, kFactorThreads, 0, stream, /*overlapped=*/true, reinterpret_cast<const float2*>(moments), static_cast<const T*>(weight), static_cast<const T*>(bias),
            reinterpret_cast<float2*>(factors), parts, static_cast<int>(parts.count()), static_cast<int>(parts.tiles()), static_cast<int>(parts.tiles_across()),
            static_cast<int>(channels), static_cast<int>(channels / groups), eps);
    });
}

cudaError_t group_norm_apply(Type type, const void* x, const float* factors, void* y, int64_t batch, int64_t pixels, int64_t channels,
                             bool silu, cudaStream_t stream) {
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return with_vectors<T>(channels, {x, y}, [&](auto numbers) {
            constexpr int N = decltype(numbers)::value;
            const Layout layout(channels / N);
            constexpr int64_t kPixelsAThread = 8;
            const int64_t pixels_a_block = layout.down * kPixelsAThread;
            const dim3 grid(static_cast<unsigned>((pixels + pixels_a_block - 1) / pixels_a_block), static_cast<unsigned>(batch));
            return launch(silu ? apply_kernel<T, N, true> : apply_kernel<T, N, false>, grid, layout.across * layout.down, 0, stream,
                          /*overlapped=*/true, static_cast<const T*>(x), reinterpret_cast<const float2*>(factors), static_cast<T*>(y),
                          pixels, static_cast<int>(channels), layout);
        });
    });
}

}  // namespace diffusionz::kernels
