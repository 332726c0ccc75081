#include "zimage/previews.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "core/device.h"

namespace diffusionz {

Previews::Previews(Task& task, int32_t image, std::vector<float> sigmas, Decode decode)
    : task_(task),
      image_(image),
      sigmas_(std::move(sigmas)),
      decode_(std::move(decode)),
      step_count_(static_cast<int32_t>(sigmas_.size()) - 1),
      count_(std::min(task.previews(), step_count_ - 1)) {}

void Previews::see(const at::Tensor& latents) {
    if (due()) {
        // What there was no memory for once is not tried again: the picture needs what is left.
        if (!task_.cancelled() && !show(latents)) count_ = 0;
        ++next_;
    }
    ++step_;
    before_ = due() ? latents : at::Tensor();
}

bool Previews::show(const at::Tensor& latents) try {
    // The flow's velocity of the last step, guidance and all, is the way that the step went over its fall of sigma; straight
    // on, the latents would be these at sigma 0: x0 = x - sigma v.
    const float sigma = sigmas_[static_cast<size_t>(step_)], fall = sigmas_[static_cast<size_t>(step_) - 1] - sigma;
    const at::Tensor end = latents + (latents - before_) * (sigma / fall);
    // Half the size: a quarter of the decoder's work and memory, which on the CPU is a good share of a small picture's time, and
    // of what encoding and sending the preview takes afterwards, which for 1024 x 1024 is more than a GPU's decoding. The price
    // are fine edges, which halved latents do not hold: for the bundled model 28-31 dB at the last step, and 38-47 of a whole
    // one. Latents are even in height and width: a transformer's patch is two.
    const at::Tensor pixels = decode_(at::avg_pool2d(end, 2));
    if (!pixels.defined()) return false;
    Preview preview;
    preview.image = image_;
    preview.preview = next_;
    preview.preview_count = count_;
    preview.step = step_;
    preview.step_count = step_count_;
    preview.height = static_cast<int32_t>(pixels.size(0));
    preview.width = static_cast<int32_t>(pixels.size(1));
    preview.rgb.reset(static_cast<uint8_t*>(std::malloc(pixels.nbytes())));
    if (!preview.rgb) throw std::bad_alloc();
    std::memcpy(preview.rgb.get(), pixels.const_data_ptr<uint8_t>(), pixels.nbytes());
    task_.show(std::move(preview));
    return true;
} catch (const std::exception& error) {
    const OutOfMemory whose = out_of_memory(error);
    if (whose == OutOfMemory::no) throw;
    if (whose == OutOfMemory::device) release_kept_memory();
    return false;
}

}  // namespace diffusionz
