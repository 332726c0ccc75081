// y = silu(weight * (x - mean) / sqrt(var + eps) + bias), mean and var over a group's channels and all pixels, channels-last.
//
// Three kernels: each channel's mean and squared distances over parts of the picture (one read; the convolution before it may have
// left them already), their merge to a factor and an addend a channel, and y (one read, one write).
//
// Numbers: a thread's sums in float32 are of distances from its first pixel, of at most kThreadPixels pixels, so nothing cancels
// where |mean| is far over std; parts are merged around their common mean (Chan, Golub and LeVeque 1979), those of a picture in
// float64. All sums in a fixed order.
// Limits: none but the grid's (65535 pictures).
// Reference: ops/group_norm.cc.

#include "kernels/group_norm.h"

#include <algorithm>

#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 256, kThreadPixels = 32, kFactorThreads = 512;

// Threads (x, y): x along the vectors of a pixel's channels, y along pixels.
dim3 block_shape(int64_t vectors) {
    const unsigned x = static_cast<unsigned>(std::min<int64_t>(vectors, kThreads));
    return dim3(x, kThreads / x);
}

template <class T>
constexpr int kFull = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const T* x, float2* moments, int64_t pixels, int channels, int part_pixels) {
    __shared__ float shared[3][kThreads * N];
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * part_pixels;
    const int count = static_cast<int>(min(static_cast<int64_t>(part_pixels), pixels - begin)), vectors = channels / N;
    const T* from = x + (blockIdx.y * pixels + begin) * channels;
    float2* to = moments + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * channels;
    for (int first = 0; first < vectors; first += blockDim.x) {
        const int vector = first + threadIdx.x;
        const int mine = vector < vectors && threadIdx.y < count ? (count - threadIdx.y + blockDim.y - 1) / blockDim.y : 0;
        float shift[N], sum[N], squares[N];
        if (mine > 0) {
            const auto numbers = load<T, N>(from, static_cast<int64_t>(threadIdx.y) * vectors + vector);
#pragma unroll
            for (int i = 0; i < N; ++i) shift[i] = to_float(numbers.values[i]), sum[i] = squares[i] = 0.0f;
        }
#pragma unroll 4
        for (int p = 1; p < mine; ++p) {
            const auto numbers = load<T, N>(from, static_cast<int64_t>(threadIdx.y + p * blockDim.y) * vectors + vector);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float distance = to_float(numbers.values[i]) - shift[i];
                sum[i] += distance;
                squares[i] += distance * distance;
            }
        }
        __syncthreads();
        const int slot = (threadIdx.y * blockDim.x + threadIdx.x) * N;
        const float inverse = 1.0f / static_cast<float>(max(mine, 1));
#pragma unroll
        for (int i = 0; i < N; ++i) {
            shared[0][slot + i] = static_cast<float>(mine);
            shared[1][slot + i] = mine > 0 ? shift[i] + sum[i] * inverse : 0.0f;
            shared[2][slot + i] = mine > 0 ? squares[i] - sum[i] * sum[i] * inverse : 0.0f;
        }
        __syncthreads();
        // A channel a thread: its rows of threads in their order.
        const int width = min(static_cast<int>(blockDim.x), vectors - first) * N, row = blockDim.x * N;
        for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < width; c += blockDim.x * blockDim.y) {
            float sums = 0.0f, square = 0.0f;
            const float origin = shared[1][c];
            for (int y = 0; y < blockDim.y; ++y) sums += shared[0][y * row + c] * (shared[1][y * row + c] - origin);
            const float offset = sums / static_cast<float>(count), mean = origin + offset;
            for (int y = 0; y < blockDim.y; ++y) {
                const float distance = shared[1][y * row + c] - origin - offset;
                square += shared[2][y * row + c] + shared[0][y * row + c] * distance * distance;
            }
            to[first * N + c] = make_float2(mean, square);
        }
    }
}

__device__ double block_sum_wide(double x, double* scratch) {
    __syncthreads();
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0.0;
    for (int i = 0; i < kFactorThreads / 32; ++i) sum += scratch[i];
    return sum;
}

// A block a group and picture.
template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    factors_kernel(const float2* moments, const T* weight, const T* bias, float2* factors, Parts parts, int tiles, int across, int channels,
                   int group_channels, double eps) {
    __shared__ double scratch[kFactorThreads / 32];
    const int64_t numbers = static_cast<int64_t>(parts.layers) * tiles * group_channels;
    const int first = blockIdx.x * group_channels;
    const float2* from = moments + static_cast<int64_t>(blockIdx.y) * parts.layers * tiles * channels + first;
    const auto visit = [&](auto&& take) {
#pragma unroll 4
        for (int64_t i = threadIdx.x; i < numbers; i += kFactorThreads) {
            const int part = static_cast<int>(i / group_channels), c = static_cast<int>(i) - part * group_channels;
            const int tile = part % tiles, row = tile / across, column = tile - row * across;
            const int64_t count = min(parts.tile_rows, parts.rows - row * parts.tile_rows) *
                                  min(parts.tile_columns, parts.columns - column * parts.tile_columns);
            take(static_cast<double>(count), from[static_cast<int64_t>(part) * channels + c]);
        }
    };
    const double total = static_cast<double>(parts.layers * parts.rows * parts.columns) * group_channels;
    double sum = 0.0;
    visit([&](double count, float2 part) { sum += count * part.x; });
    const double mean = block_sum_wide(sum, scratch) / total;
    double squares = 0.0;
    visit([&](double count, float2 part) {
        const double distance = part.x - mean;
        squares += part.y + count * distance * distance;
    });
    const double inverse = 1.0 / sqrt(block_sum_wide(squares, scratch) / total + eps);
    for (int c = first + threadIdx.x; c < first + group_channels; c += kFactorThreads) {
        const double factor = to_float(weight[c]) * inverse;
        factors[static_cast<int64_t>(blockIdx.y) * channels + c] =
            make_float2(static_cast<float>(factor), static_cast<float>(to_float(bias[c]) - mean * factor));
    }
}

template <class T, int N, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const T* x, const float2* factors, T* y, int64_t pixels, int channels) {
    const int vectors = channels / N;
    const int64_t offset = blockIdx.y * pixels * vectors;
    for (int vector = threadIdx.x; vector < vectors; vector += blockDim.x) {
        float factor[N], addend[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float2 pair = factors[static_cast<int64_t>(blockIdx.y) * channels + vector * N + i];
            factor[i] = pair.x;
            addend[i] = pair.y;
        }
        const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
#pragma unroll 4
        for (int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; p < pixels; p += step) {
            const auto numbers = load<T, N>(x, offset + p * vectors + vector);
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
            moments_kernel<T, N><<<grid, block_shape(channels / N), 0, stream>>>(
                static_cast<const T*>(x), reinterpret_cast<float2*>(moments), pixels, static_cast<int>(channels),
                static_cast<int>(parts.tile_columns));
            return cudaGetLastError();
        });
    });
}

cudaError_t group_norm_factors(Type type, const float* moments, const void* weight, const void* bias, float* factors, const Parts& parts,
                               int64_t batch, int64_t channels, int64_t groups, double eps, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(batch));
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        factors_kernel<T><<<grid, kFactorThreads, 0, stream>>>(
            reinterpret_cast<const float2*>(moments), static_cast<const T*>(weight), static_cast<const T*>(bias),
            reinterpret_cast<float2*>(factors), parts, static_cast<int>(parts.tiles()), static_cast<int>(parts.tiles_across()),
            static_cast<int>(channels), static_cast<int>(channels / groups), eps);
        return cudaGetLastError();
    });
}

cudaError_t group_norm_apply(Type type, const void* x, const float* factors, void* y, int64_t batch, int64_t pixels, int64_t channels,
                             bool silu, cudaStream_t stream) {
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return with_vectors<T>(channels, {x, y}, [&](auto numbers) {
            constexpr int N = decltype(numbers)::value;
            const dim3 block = block_shape(channels / N);
            constexpr int64_t kPixelsAThread = 8;
            const int64_t blocks = (pixels + block.y * kPixelsAThread - 1) / (block.y * kPixelsAThread);
            const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch));
            const auto kernel = silu ? apply_kernel<T, N, true> : apply_kernel<T, N, false>;
            kernel<<<grid, block, 0, stream>>>(static_cast<const T*>(x), reinterpret_cast<const float2*>(factors), static_cast<T*>(y),
                                               pixels, static_cast<int>(channels));
            return cudaGetLastError();
        });
    });
}

}  // namespace diffusionz::kernels
