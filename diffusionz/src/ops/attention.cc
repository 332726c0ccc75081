// On GPUs in 16 bits, all on strided views of whatever product q, k and v are parts of, with results that lie as the caller wants
// them, and grouped queries read their keys in place:
//   kernels/attention_sm90.cu on Hopper in bfloat16, heads of 128, where its tiles fill their waves
//   (DIFFUSIONZ_DISABLE_KERNELS=attention_sm90 leaves those to cuDNN);
//   cuDNN's fused attention on Hopper and Blackwell, heads up to 128 wide (on an H100, 30 heads of 128: 4128 tokens 0.46 ms where
//   flash attention 2 takes 0.77; 1056 tokens 55 and 87 us);
//   flash attention elsewhere, heads up to 256 wide;
//   wider heads (a VAE's single head of 512, which no fused kernel takes but one, 4.5 ms at 16384 tokens) as two products around
//   kernels/softmax_rows.cu, logits in float32, some thousand queries at once.
// Elsewhere, and with DIFFUSIONZ_DISABLE_KERNELS=attention, the reference: at::scaled_dot_product_attention.

#include "ops/attention.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>

#include "ops/cuda.h"
#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/attention_sm90.h"
#include "kernels/softmax_rows.h"
#endif

namespace diffusionz {
namespace {

#ifdef DIFFUSIONZ_WITH_CUDA

constexpr int64_t kCudnnHeadDimMax = 128, kFlashHeadDimMax = 256;
// cuDNN has no causal kernel for single queries.
constexpr int64_t kCudnnTokensMin = 16;

bool has_cudnn_attention(const at::Tensor& x) {
    const int major = compute_capability(x) / 10;
    return major == 9 || major == 10;
}

at::Tensor wide_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    constexpr int64_t kLogits = int64_t{1} << 26;  // 256 MB of them at once
    const int64_t tokens = q.size(1), keys = k.size(1), repeats = q.size(2) / k.size(2);
    const int64_t rows = std::min(tokens, std::max<int64_t>(kLogits / keys, 128));
    const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.size(3))));
    at::Tensor y = at::empty({q.size(0), tokens, q.size(2), q.size(3)}, q.options());
    for (int64_t batch = 0; batch < q.size(0); ++batch) {
        for (int64_t head = 0; head < q.size(2); ++head) {
            const auto part = [batch](const at::Tensor& x, int64_t h) { return x.select(0, batch).select(1, h); };
            const at::Tensor keys_across = part(k, head / repeats).t(), values = part(v, head / repeats);
            for (int64_t first = 0; first < tokens; first += rows) {
                const int64_t count = std::min(rows, tokens - first);
                const at::Tensor logits = at::mm(part(q, head).narrow(0, first, count), keys_across, at::kFloat);
                const at::Tensor weights = at::empty({count, keys}, q.options());
                check_launch("softmax_rows",
                             kernels::softmax_rows(kernel_type(q.scalar_type()), logits.const_data_ptr<float>(),
                                                   weights.mutable_data_ptr(), count, keys, scale, current_stream(q)));
                at::Tensor to = part(y, head).narrow(0, first, count);
                at::mm_out(to, weights, values);
            }
        }
    }
    return y.flatten(2);
}

// Whether our own kernel is faster than cuDNN's: by how full its tiles' waves are. On an H100, 30 heads, in us: 1056 tokens 48
// and 56, 1088 (0.64 of two waves) 45 and 55, 2304 129 and 150, 3072 236 and 244.
bool attention_sm90_pays(const at::Tensor& q) {
    constexpr int64_t kTile = 192, kTokensMin = 1024;
    constexpr double kUsedMin = 0.6;
    if (kernel_disabled("attention_sm90") || q.size(1) < kTokensMin) return false;
    const int64_t processors = device_attribute(q, cudaDevAttrMultiProcessorCount), of_tiles = q.size(0) * q.size(2);
    const int64_t tiles = of_tiles * ((q.size(1) + kTile - 1) / kTile), waves = (tiles + processors - 1) / processors;
    return static_cast<double>(of_tiles * q.size(1)) > kUsedMin * static_cast<double>(waves * processors * kTile);
}

// Undefined where no kernel takes these.
at::Tensor cuda_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
    const at::ScalarType dtype = q.scalar_type();
    const int64_t width = q.size(3);
    if (kernel_disabled("attention") || !q.is_cuda()) return {};
    if ((dtype != at::kHalf && dtype != at::kBFloat16) || width % 8 != 0) return {};
    if (!causal && attention_sm90_pays(q)) {
        if (const at::Tensor y = attention_sm90(q, k, v); y.defined()) return y;
    }
    if (causal && q.size(1) != k.size(1)) return {};  // libraries align such a mask differently
    if (width > kFlashHeadDimMax) return causal ? at::Tensor() : wide_attention(q, k, v);
    const auto heads_first = [](const at::Tensor& x) { return x.transpose(1, 2); };
    if (width <= kCudnnHeadDimMax && q.size(1) >= kCudnnTokensMin && has_cudnn_attention(q)) {
        return std::get<0>(at::_scaled_dot_product_cudnn_attention(heads_first(q), heads_first(k), heads_first(v), {},
                                                                   /*compute_log_sumexp=*/false, 0.0, causal, false))
            .transpose(1, 2)
            .flatten(2);
    }
    return std::get<0>(
               at::_scaled_dot_product_flash_attention(heads_first(q), heads_first(k), heads_first(v), 0.0, causal, false))
        .transpose(1, 2)
        .flatten(2);
}

#endif

}  // namespace

at::Tensor attention_sm90([[maybe_unused]] const at::Tensor& q, [[maybe_unused]] const at::Tensor& k,
                          [[maybe_unused]] const at::Tensor& v) {
#ifdef DIFFUSIONZ_WITH_CUDA
    constexpr int64_t kWidth = 128;
    if (!q.is_cuda() || q.scalar_type() != at::kBFloat16 || q.size(3) != kWidth || compute_capability(q) != 90) return {};
    for (const at::Tensor& x : {q, k, v}) {
        const bool apart = x.stride(1) % 8 == 0 && x.stride(0) % 8 == 0;  // by multiples of 16 bytes
        if (x.stride(3) != 1 || x.stride(2) != kWidth || !apart || reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 != 0)
            return {};
    }
    const at::Tensor y = at::empty({q.size(0), q.size(1), q.size(2) * kWidth}, q.options());
    kernels::AttentionSm90 call;
    call.q = rows_of(q), call.k = rows_of(k), call.v = rows_of(v);
    call.y = y.mutable_data_ptr();
    call.batch = q.size(0), call.queries = q.size(1), call.keys = k.size(1), call.heads = q.size(2), call.kv_heads = k.size(2);
    call.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kWidth)));
    if (launched("attention_sm90",
                 kernels::attention_sm90(call, device_attribute(q, cudaDevAttrMultiProcessorCount), current_stream(q))))
        return y;
#endif
    return {};
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (const at::Tensor y = cuda_attention(q, k, v, causal); y.defined()) return y;
#endif
    const int64_t repeats = q.size(2) / k.size(2);
    // ATen's fused attention takes [batch, heads, tokens, head_dim] as strided views.
    const auto heads_first = [](const at::Tensor& x, int64_t times) {
        return (times == 1 ? x : x.repeat_interleave(times, 2)).transpose(1, 2);
    };
    const at::Tensor y =
        at::scaled_dot_product_attention(heads_first(q, 1), heads_first(k, repeats), heads_first(v, repeats), {}, 0.0, causal);
    return y.transpose(1, 2).flatten(2);
}

}  // namespace diffusionz
