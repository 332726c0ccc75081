// Between latents [batch, channels, height, width] and tokens [batch, rows, columns, patch, patch, channels], and the sampler's
// step:
//
//   patchify     token[r, c, i, j, k] = latent[k, r * patch + i, c * patch + j]
//   unpatchify   the other way
//   euler_step   latent += delta * v,  v = p + guidance (p - n) at the latent's place in the tokens  (Ho and Salimans 2022)
//
// A thread a number, in the order of what is written. A megabyte at 1024 x 1024 pixels: the scattered reads hit the second-level
// cache.
//
// Numbers: float32; what euler_step rounds are the same operations in the same order as ATen's, so the bits agree. delta is read
// on the device: one captured step serves them all. Reference: ops/patchify.cc.

#include "kernels/patchify.h"
#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 256;

template <class Index>
struct Shape {
    Index channels, rows, columns, patch;

    // Where in the tokens the latents' number `at` is.
    __device__ Index token_of_latent(Index at) const {
        const Index width = columns * patch, height = rows * patch;
        const Index x = at % width, y = at / width % height, plane = at / width / height;
        const Index token = (plane / channels * rows + y / patch) * columns + x / patch;
        return ((token * patch + y % patch) * patch + x % patch) * channels + plane % channels;
    }
    __device__ Index latent_of_token(Index at) const {
        const Index channel = at % channels, place = at / channels % (patch * patch), token = at / channels / (patch * patch);
        const Index column = token % columns, row = token / columns % rows, image = token / columns / rows;
        const Index y = row * patch + place / patch, x = column * patch + place % patch;
        return ((image * channels + channel) * rows * patch + y) * columns * patch + x;
    }
};

template <class T, class Index>
__global__ void __launch_bounds__(kThreads) patchify_kernel(const float* latents, T* tokens, Shape<Index> shape, Index count) {
    between_kernels();
    const Index at = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
    if (at < count) tokens[at] = from_float<T>(latents[shape.latent_of_token(at)]);
}

template <class T, class Index>
__global__ void __launch_bounds__(kThreads) unpatchify_kernel(const T* tokens, float* latents, Shape<Index> shape, Index count) {
    between_kernels();
    const Index at = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
    if (at < count) latents[at] = to_float(tokens[shape.token_of_latent(at)]);
}

template <class T, class Index>
__global__ void __launch_bounds__(kThreads)
    euler_step_kernel(float* latents, const T* prediction, const T* negative, float guidance, const float* delta,
                      Shape<Index> shape, Index count) {
    between_kernels();
    const Index at = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= count) return;
    const Index from = shape.token_of_latent(at);
    float velocity = to_float(prediction[from]);
    // The functions with a rounding each keep the compiler from fusing a product and a sum.
    if (negative) velocity = __fadd_rn(velocity, __fmul_rn(velocity - to_float(negative[from]), guidance));
    latents[at] = __fadd_rn(latents[at], __fmul_rn(velocity, *delta));
}

// Calls start(shape, count, blocks) with indices of 32 bits where they reach, of 64 elsewhere.
template <class Start>
cudaError_t with_indices(const Patches& of, Start&& start) {
    const int64_t count = of.batch * of.channels * of.rows * of.columns * of.patch * of.patch;
    const int64_t blocks = (count + kThreads - 1) / kThreads;
    if (count == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorNotSupported;
    const auto with = [&](auto zero) {
        using Index = decltype(zero);
        return start(Shape<Index>{static_cast<Index>(of.channels), static_cast<Index>(of.rows), static_cast<Index>(of.columns),
                                  static_cast<Index>(of.patch)},
                     static_cast<Index>(count), dim3(static_cast<unsigned>(blocks)));
    };
    return count <= INT32_MAX ? with(uint32_t{0}) : with(uint64_t{0});
}

}  // namespace

cudaError_t patchify(Type type, const float* latents, void* tokens, Patches of, cudaStream_t stream) {
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return with_indices(of, [&](auto shape, auto count, dim3 blocks) {
            return launch(patchify_kernel<T, decltype(count)>, blocks, kThreads, 0, stream, /*overlapped=*/true, latents,
                          static_cast<T*>(tokens), shape, count);
        });
    });
}

cudaError_t unpatchify(Type type, const void* tokens, float* latents, Patches of, cudaStream_t stream) {
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return with_indices(of, [&](auto shape, auto count, dim3 blocks) {
            return launch(unpatchify_kernel<T, decltype(count)>, blocks, kThreads, 0, stream, /*overlapped=*/true,
                          static_cast<const T*>(tokens), latents, shape, count);
        });
    });
}

cudaError_t euler_step(Type type, float* latents, const void* prediction, const void* negative, float guidance,
                       const float* delta, Patches of, cudaStream_t stream) {
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return with_indices(of, [&](auto shape, auto count, dim3 blocks) {
            return launch(euler_step_kernel<T, decltype(count)>, blocks, kThreads, 0, stream, /*overlapped=*/true, latents,
                          static_cast<const T*>(prediction), static_cast<const T*>(negative), guidance, delta, shape, count);
        });
    });
}

}  // namespace diffusionz::kernels
