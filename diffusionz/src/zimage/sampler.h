// Walks latents from noise to image: Euler steps of the flow that the transformer predicts.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "core/cuda_graph.h"
#include "core/task.h"
#include "zimage/transformer.h"

namespace diffusionz {

class Sampler {
public:
    // What a picture is drawn after. `negative` is undefined without guidance.
    struct Captions {
        at::Tensor positive, negative;  // [1, padded tokens, dim], from refine_caption
    };
    // Classifier-free guidance: p + scale (p - n).
    struct Guidance {
        double scale = 0;
        double normalization = 0;  // > 0 bounds the guided prediction's norm to this multiple of p's
        double truncation = 1;     // no guidance once the time, 1 - sigma, exceeds it
    };
    // Corrections, and a name for the buffers that they stand in ("" for none).
    struct Lora {
        const LoraPairs* pairs = nullptr;
        std::string name;
    };

    // `trace` sees the first evaluation of all; graphs must then be off.
    Sampler(const Transformer& transformer, const WorkStream& stream, GraphCache& graphs, Watch trace)
        : transformer_(transformer), stream_(stream), graphs_(graphs), trace_(std::move(trace)) {}

    // latents float32 [1, channels, height, width] at sigmas[0] to those at sigmas.back(); times are the transformer's, one a
    // step. Returns within one step of a cancel, with E_CANCELLED. `watch` may be empty; it sees the latents at the start and
    // after each step.
    at::Tensor run(at::Tensor latents, const std::vector<float>& sigmas, const std::vector<float>& times,
                   const Captions& captions, const Guidance& guidance, const Lora& lora, Task& task,
                   const std::function<void(const at::Tensor&)>& watch);

private:
    Transformer::Positions positions(const at::Tensor& latents, const at::Tensor& caption);
    // A step as a function of tensors: latents, the step's modulation (blocks, final scale), the fall of sigma, the captions.
    GraphCache::Function step(const Transformer::Positions& positive, const Transformer::Positions& negative, bool guided,
                              const Guidance& guidance, const Lora& lora);

    const Transformer& transformer_;
    const WorkStream& stream_;
    GraphCache& graphs_;
    Watch trace_;
    // By latent height, width and caption tokens.
    std::map<std::tuple<int64_t, int64_t, int64_t>, Transformer::Positions> positions_;
};

}  // namespace diffusionz
