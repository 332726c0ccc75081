// Previews of one picture while it is drawn.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "core/task.h"

namespace diffusionz {

class Previews {
public:
    // latents [1, channels, h, w] to pixels uint8 [height, width, 3] on the host; an undefined tensor where they do not fit.
    using Decode = std::function<at::Tensor(const at::Tensor& latents)>;

    // As many as `task` wants of picture `image`, which walks down `sigmas`.
    Previews(Task& task, int32_t image, std::vector<float> sigmas, Decode decode);

    int32_t count() const { return count_; }

    // The latents at the start, and after each step, when the device has come to them. Shows a preview where one is due. The
    // latents are only read.
    void see(const at::Tensor& latents);

private:
    // The steps done when preview `index` (from 0) is due.
    int32_t step_of(int32_t index) const { return (index + 1) * step_count_ / (count_ + 1); }
    bool due() const { return next_ < count_ && step_ == step_of(next_); }
    // False where there is no memory for it.
    bool show(const at::Tensor& latents);

    Task& task_;
    int32_t image_;
    std::vector<float> sigmas_;
    Decode decode_;
    int32_t step_count_, count_;
    int32_t step_ = 0, next_ = 0;  // steps done, and the preview that comes next
    at::Tensor before_;            // the latents a step earlier, where a preview is due after it
};

}  // namespace diffusionz
