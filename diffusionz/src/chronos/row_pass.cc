#include "chronos/row_pass.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "core/device.h"
#include "core/error.h"
#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

namespace diffusionz::chronos {
namespace {

constexpr size_t kShapesMax = 24;
// Of a pass's tokens, those that only fill up rows to the longest.
constexpr int64_t kFillingMin = 4096;
constexpr double kFillingShare = 0.25;

// Rows are filled up to these numbers, so that few graphs serve all.
int64_t row_bucket(int64_t rows) {
    if (rows <= 2) return rows;
    const int64_t unit = rows <= 4 ? 4 : rows <= 64 ? 8 : 32;
    return (rows + unit - 1) / unit * unit;
}

int64_t patches_of(int64_t steps, int64_t patch) { return (steps + patch - 1) / patch; }

#ifdef DIFFUSIONZ_WITH_CUDA
void check_cuda(cudaError_t error) {
    if (error != cudaSuccess) fail(DIFFUSIONZ_E_DEVICE, "CUDA: ", cudaGetErrorString(error));
}
#endif

// Both without gaps, of one size; does not wait where one is on a CUDA device.
void transfer(const at::Tensor& to, const at::Tensor& from) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (to.is_cuda() || from.is_cuda()) {
        const auto device = (to.is_cuda() ? to : from).device().index();
        check_cuda(cudaMemcpyAsync(to.mutable_data_ptr(), from.const_data_ptr(), to.nbytes(), cudaMemcpyDefault,
                                   c10::cuda::getCurrentCUDAStream(device)));
        return;
    }
#endif
    to.flatten().copy_(from.flatten());
}

// The first `count` numbers of a buffer that grows.
at::Tensor reserve(at::Tensor& buffer, int64_t count, bool pinned) {
    if (!buffer.defined() || buffer.numel() < count)
        buffer = at::empty({count}, at::TensorOptions().dtype(at::kFloat).pinned_memory(pinned));
    return buffer.narrow(0, 0, count);
}

}  // namespace

RowPass::RowPass(std::shared_ptr<const Model> model)
    : model_(std::move(model)), graphs_(model_->placement().device.is_cuda() && !kernel_disabled("graphs")) {}

RowPass::~RowPass() {
#ifdef DIFFUSIONZ_WITH_CUDA
    for (const Slot& slot : slots_) {
        if (slot.done) cudaEventDestroy(static_cast<cudaEvent_t>(slot.done));
    }
#endif
}

bool RowPass::takes(const std::vector<Row>& rows, const std::vector<Group>& groups, int64_t output_patches) const {
    if (!model_->computes_rows() || groups.size() != rows.size()) return false;
    const ModelConfig& config = model_->config();
    int64_t needed = 0, longest = 0;
    for (const Row& row : rows) {
        const int64_t tokens = token_count_max(config, row.context_length, output_patches);
        needed += tokens;
        longest = std::max(longest, tokens);
    }
    const int64_t computed = row_bucket(std::ssize(rows)) * longest;
    return computed <= 2 * kTokensMax &&
           computed - needed <= std::max(kFillingMin, static_cast<int64_t>(kFillingShare * static_cast<double>(needed)));
}

RowPass::Shape& RowPass::shape(int64_t rows, int64_t context_patches, int64_t output_patches) {
    const auto found = std::find_if(shapes_.begin(), shapes_.end(), [&](const Shape& known) {
        return known.rows == rows && known.context_patches == context_patches && known.output_patches == output_patches;
    });
    if (found != shapes_.end()) {
        shapes_.splice(shapes_.begin(), shapes_, found);
        return shapes_.front();
    }
    if (shapes_.size() == kShapesMax) shapes_.pop_back();
    const auto options = at::TensorOptions().dtype(at::kFloat).device(model_->placement().device);
    const int64_t patch = model_->config().patch;
    const at::Tensor values = at::empty({rows * (context_patches + output_patches) * patch}, options);
    const auto part = [&](int64_t begin, int64_t patches) {
        return values.narrow(0, rows * begin * patch, rows * patches * patch).view({rows, patches * patch});
    };
    shapes_.push_front(
        {rows, context_patches, output_patches, values, part(0, context_patches), part(context_patches, output_patches), {}, {}});
    return shapes_.front();
}

// A shape's first pass runs as it is written: libraries allocate at their first call, and what comes once is not worth a graph.
const at::Tensor& RowPass::compute(Shape& shape) {
    const auto work = [&] { shape.quantiles = model_->forecast_rows(shape.context, shape.future); };
    if (!shape.graph.captured() && graphs_ && shape.quantiles.defined() && !shape.too_large) {
        // LibTorch refuses a pool whose last graph is gone.
        if (std::none_of(shapes_.begin(), shapes_.end(), [](const Shape& other) { return other.graph.captured(); }))
            pool_ = GraphPool();
        try {
            shape.graph.capture(model_->placement().device, work, shape.ran_on, pool_);
        } catch (const c10::OutOfMemoryError&) {
            shape.too_large = true;
            release_kept_memory();
        }
    }
    if (shape.graph.captured()) {
        shape.graph.replay();
    } else {
        work();
        shape.ran_on = std::this_thread::get_id();
    }
    return shape.quantiles;
}

void RowPass::submit(const std::vector<Row>& rows, int64_t output_patches) {
    const int64_t patch = model_->config().patch, count = row_bucket(std::ssize(rows));
    int64_t context_patches = 1;
    for (const Row& row : rows) context_patches = std::max(context_patches, patches_of(row.context_length, patch));
    Shape& shape = this->shape(count, context_patches, output_patches);
    Slot& slot = slots_[static_cast<size_t>(sent_ % std::ssize(slots_))];
    const bool pinned = model_->placement().device.is_cuda();
    const at::Tensor values = reserve(slot.values, shape.values.numel(), pinned);
    const int64_t steps = context_patches * patch, horizon = output_patches * patch;
    float *context = values.mutable_data_ptr<float>(), *future = context + count * steps;
    at::parallel_for(0, count, 32, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Row row = i < std::ssize(rows) ? rows[static_cast<size_t>(i)] : Row{nullptr, 0, nullptr, 0};
            float* out = std::fill_n(context + i * steps, steps - row.context_length, NAN);
            std::copy_n(row.context, row.context_length, out);
            const int64_t known = row.future ? std::min(row.future_length, horizon) : 0;
            std::fill_n(std::copy_n(row.future, known, future + i * horizon), horizon - known, NAN);
        }
    });
    transfer(shape.values, values);
    const at::Tensor& quantiles = compute(shape);
    transfer(reserve(slot.quantiles, quantiles.numel(), pinned), quantiles.flatten());
#ifdef DIFFUSIONZ_WITH_CUDA
    if (pinned) {
        if (!slot.done) {
            cudaEvent_t event = nullptr;
            check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
            slot.done = event;
        }
        check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(slot.done),
                                   c10::cuda::getCurrentCUDAStream(model_->placement().device.index())));
    }
#endif
    ++sent_;
}

const float* RowPass::collect() {
    const Slot& slot = slots_[static_cast<size_t>(collected_++ % std::ssize(slots_))];
#ifdef DIFFUSIONZ_WITH_CUDA
    if (slot.done) check_cuda(cudaEventSynchronize(static_cast<cudaEvent_t>(slot.done)));
#endif
    return slot.quantiles.const_data_ptr<float>();
}

void RowPass::abandon() {
    while (collected_ < sent_) collect();
}

}  // namespace diffusionz::chronos
