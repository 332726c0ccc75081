// y = silu(weight * (x - mean) / sqrt(var + eps) + bias), mean and var over a group's channels and all pixels.
//
// Why our own on the CPU: ATen's channels-last GroupNorm takes twice the time of its NCHW one, and SiLU is one more pass over
// memory. Here it is one read for the statistics, one read and one write for the rest; on the GPU, kernels/group_norm.cu, the
// first read falls away after our own convolutions. Numbers: statistics in float32 over a block of pixels that stays in the
// first-level cache, around the block's own mean, merged in float64 (Chan, Golub and LeVeque 1979); E[x^2] - E[x]^2 would lose
// its digits where |mean| is far over std. Reference: at::group_norm and at::silu (DIFFUSIONZ_DISABLE_KERNELS=group_norm).

#include "ops/group_norm.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "ops/cuda.h"
#include "ops/disabled.h"
#include "ops/vector_math.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/group_norm.h"
#endif

namespace diffusionz {
namespace {

constexpr int64_t kBlockPixels = 64;

// Sums over `pixels` rows of x [pixels, channels]: each channel's sum, and its squared distances from the block's mean of that
// channel.
DIFFUSIONZ_VECTORIZED void block_statistics(const float* x, int64_t pixels, int64_t channels, float* sum, float* squares) {
    for (int64_t c = 0; c < channels; ++c) sum[c] = squares[c] = 0.0f;
    for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < channels; ++c) sum[c] += x[p * channels + c];
    }
    const float inverse = 1.0f / static_cast<float>(pixels);
    for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < channels; ++c) {
            const float distance = x[p * channels + c] - sum[c] * inverse;
            squares[c] += distance * distance;
        }
    }
}

DIFFUSIONZ_VECTORIZED void apply(const float* x, float* y, int64_t pixels, int64_t channels, const float* scale,
                                 const float* shift) {
    for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < channels; ++c) y[p * channels + c] = x[p * channels + c] * scale[c] + shift[c];
    }
}

DIFFUSIONZ_VECTORIZED void apply_silu(const float* x, float* y, int64_t pixels, int64_t channels, const float* scale,
                                      const float* shift) {
    for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < channels; ++c) {
            const float value = x[p * channels + c] * scale[c] + shift[c];
            y[p * channels + c] = value / (1.0f + exp_approx(-value));
        }
    }
}

// Count, mean and summed squared distances of a set of numbers.
struct Moments {
    double count = 0, mean = 0, squares = 0;
    void merge(double other_count, double other_mean, double other_squares) {
        if (other_count == 0) return;
        const double total = count + other_count, distance = other_mean - mean;
        squares += other_squares + distance * distance * count * other_count / total;
        mean += distance * other_count / total;
        count = total;
    }
};

// One image, x and y [pixels, channels].
void normalize_image(const float* x, float* y, int64_t pixels, int64_t channels, const float* weight, const float* bias,
                     int64_t groups, double eps, bool silu) {
    const int64_t blocks = (pixels + kBlockPixels - 1) / kBlockPixels, group_channels = channels / groups;
    // A task merges its own blocks, and the tasks are merged in their order: the result does not depend on which thread was
    // first.
    const int64_t tasks = std::min<int64_t>(blocks, at::get_num_threads());
    const int64_t task_blocks = (blocks + tasks - 1) / tasks;
    std::vector<Moments> moments(static_cast<size_t>(tasks * groups));
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> sum(static_cast<size_t>(channels)), squares(static_cast<size_t>(channels));
        for (int64_t task = begin; task < end; ++task) {
            for (int64_t block = task * task_blocks; block < std::min(blocks, (task + 1) * task_blocks); ++block) {
                const int64_t first = block * kBlockPixels, count = std::min(kBlockPixels, pixels - first);
                block_statistics(x + first * channels, count, channels, sum.data(), squares.data());
                for (int64_t c = 0; c < channels; ++c) {
                    moments[static_cast<size_t>(task * groups + c / group_channels)].merge(
                        static_cast<double>(count), static_cast<double>(sum[static_cast<size_t>(c)]) / static_cast<double>(count),
                        squares[static_cast<size_t>(c)]);
                }
            }
        }
    });
    std::vector<float> scale(static_cast<size_t>(channels)), shift(static_cast<size_t>(channels));
    for (int64_t group = 0; group < groups; ++group) {
        Moments total;
        for (int64_t task = 0; task < tasks; ++task) {
            const Moments& part = moments[static_cast<size_t>(task * groups + group)];
            total.merge(part.count, part.mean, part.squares);
        }
        const double inverse = 1.0 / std::sqrt(total.squares / total.count + eps);
        for (int64_t c = group * group_channels; c < (group + 1) * group_channels; ++c) {
            scale[static_cast<size_t>(c)] = static_cast<float>(weight[c] * inverse);
            shift[static_cast<size_t>(c)] = static_cast<float>(bias[c] - total.mean * inverse * weight[c]);
        }
    }
    at::parallel_for(0, pixels, kBlockPixels, [&](int64_t begin, int64_t end) {
        (silu ? apply_silu : apply)(x + begin * channels, y + begin * channels, end - begin, channels, scale.data(),
                                    shift.data());
    });
}

void apply_on_gpu([[maybe_unused]] const at::Tensor& x, [[maybe_unused]] const at::Tensor& factors,
                  [[maybe_unused]] const at::Tensor& y, [[maybe_unused]] bool silu) {
#ifdef DIFFUSIONZ_WITH_CUDA
    check_launch("group_norm", kernels::group_norm_apply(kernel_type(x.scalar_type()), x.const_data_ptr(),
                                                         factors.const_data_ptr<float>(), y.mutable_data_ptr(), x.size(0),
                                                         x.size(2) * x.size(3), x.size(1), silu, current_stream(x)));
#endif
}

}  // namespace

bool group_norm_kernel_takes([[maybe_unused]] const at::Tensor& x) {
#ifdef DIFFUSIONZ_WITH_CUDA
    return x.is_cuda() && has_kernel_type(x.scalar_type()) && !kernel_disabled("group_norm");
#else
    return false;
#endif
}

at::Tensor group_norm_factors(const at::Tensor& x, [[maybe_unused]] const at::Tensor& weight,
                              [[maybe_unused]] const at::Tensor& bias, [[maybe_unused]] int64_t groups,
                              [[maybe_unused]] double eps, [[maybe_unused]] const ChannelMoments& moments) {
    at::Tensor factors = at::empty({x.size(0), x.size(1), 2}, x.options().dtype(at::kFloat));
#ifdef DIFFUSIONZ_WITH_CUDA
    const kernels::Type type = kernel_type(x.scalar_type());
    const cudaStream_t stream = current_stream(x);
    const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    at::Tensor values = moments.values;
    kernels::Parts parts{moments.rows, moments.columns, moments.tile_rows, moments.tile_columns, moments.layers};
    if (!values.defined()) {
        parts = kernels::group_norm_parts(pixels, channels);
        values = at::empty({batch, parts.count(), channels, 2}, factors.options());
        check_launch("group_norm", kernels::group_norm_moments(type, x.const_data_ptr(), values.mutable_data_ptr<float>(), batch,
                                                               pixels, channels, stream));
    }
    check_launch("group_norm",
                 kernels::group_norm_factors(type, values.const_data_ptr<float>(), weight.const_data_ptr(), bias.const_data_ptr(),
                                             factors.mutable_data_ptr<float>(), parts, batch, channels, groups, eps, stream));
#endif
    return factors;
}

at::Tensor group_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps,
                      bool silu, const ChannelMoments& moments) {
    const bool on_gpu = group_norm_kernel_takes(x);
    if (!on_gpu && (!x.is_cpu() || x.scalar_type() != at::kFloat || kernel_disabled("group_norm"))) {
        at::Tensor y = at::group_norm(x, groups, weight, bias, eps);
        return silu ? at::silu_(y) : y;
    }
    const at::Tensor in = x.contiguous(at::MemoryFormat::ChannelsLast);
    at::Tensor out = at::empty_like(in);
    if (on_gpu) {
        apply_on_gpu(in, group_norm_factors(in, weight, bias, groups, eps, moments), out, silu);
        return out;
    }
    const int64_t channels = in.size(1), pixels = in.size(2) * in.size(3);
    for (int64_t image = 0; image < in.size(0); ++image) {
        normalize_image(in.const_data_ptr<float>() + image * pixels * channels,
                        out.mutable_data_ptr<float>() + image * pixels * channels, pixels, channels,
                        weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), groups, eps, silu);
    }
    return out;
}

}  // namespace diffusionz
