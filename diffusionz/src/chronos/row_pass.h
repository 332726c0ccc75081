// Passes over rows that each stand alone, for a device that computes them as one batch of rows of one length: staged in pinned
// memory, computed by Model::forecast_rows - by a CUDA graph where rows and patches of that number came before - and fetched.
// While one pass is computed, the next can be staged and the one before it read.
#pragma once

#include <array>
#include <list>
#include <memory>
#include <vector>

#include "chronos/model.h"
#include "core/cuda_graph.h"

namespace diffusionz::chronos {

class RowPass {
public:
    // Tokens of a pass: enough to fill a GPU, few enough that the next pass's staging is not waited for.
    static constexpr int64_t kTokensMax = 25600;

    explicit RowPass(std::shared_ptr<const Model> model);
    ~RowPass();
    RowPass(const RowPass&) = delete;
    RowPass& operator=(const RowPass&) = delete;

    // Whether the rows can be one pass: each in a group of its own, and of lengths that are not too different.
    bool takes(const std::vector<Row>& rows, const std::vector<Group>& groups, int64_t output_patches) const;
    // Sends a pass on its way, on the current stream. At most two may be on it.
    void submit(const std::vector<Row>& rows, int64_t output_patches);
    // Waits for the pass that was sent first: its quantiles [rows, levels, output_patches * patch], until the second submit from
    // now.
    const float* collect();
    // Forgets passes whose call ended before they were collected.
    void abandon();

private:
    // The host's side of a pass.
    struct Slot {
        at::Tensor values, quantiles;  // flat, as long as was needed so far
        void* done = nullptr;          // an event
    };
    // The device's side of passes of one shape.
    struct Shape {
        int64_t rows, context_patches, output_patches;
        at::Tensor values;           // flat: context, then future
        at::Tensor context, future;  // views of it
        at::Tensor quantiles;
        CudaGraph graph;
        bool too_large = false;  // there was no memory to record it in
        std::thread::id ran_on{};  // its last pass outside a graph
    };
    Shape& shape(int64_t rows, int64_t context_patches, int64_t output_patches);
    const at::Tensor& compute(Shape& shape);

    std::shared_ptr<const Model> model_;
    bool graphs_;
    GraphPool pool_;
    std::list<Shape> shapes_;  // the last used first
    std::array<Slot, 2> slots_;
    int64_t sent_ = 0, collected_ = 0;
};

}  // namespace diffusionz::chronos
