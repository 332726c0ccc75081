// torch.ops.diffusionz: the operations that a pass of Chronos-2 consists of.
#include <torch/library.h>

#include "ops/few_rows_linear.h"
#include "ops/residual_norm.h"
#include "ops/row_attention.h"
#include "ops/segment_attention.h"
#include "ops/series_quantiles.h"
#include "ops/series_tokens.h"

namespace diffusionz {
namespace {

using Optional = std::optional<at::Tensor>;

at::Tensor tensor_of(const Optional& x) { return x.value_or(at::Tensor()); }

TORCH_LIBRARY_FRAGMENT(diffusionz, m) {
    m.def("row_attention",
          [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads, const at::Tensor& valid,
             const at::Tensor& cos, const at::Tensor& sin) { return row_attention(q, k, v, heads, valid, cos, sin); });
    // `segments` int64 [n, 4] on the host; products in the dtype of `like`.
    m.def("segment_attention", [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads,
                                  const at::Tensor& segments, const at::Tensor& like) {
        std::vector<Segment> list;
        for (int64_t i = 0; i < segments.size(0); ++i) {
            const int64_t* row = segments.const_data_ptr<int64_t>() + 4 * i;
            list.push_back({row[0], row[1], row[2], row[3]});
        }
        return segment_attention(q, k, v, heads, list, like.scalar_type());
    });
    m.def("residual_norm", [](at::Tensor x, const Optional& a, const Optional& b, bool keep, double eps, const at::Tensor& like) {
        return residual_norm(x, tensor_of(a), tensor_of(b), keep, eps, like.scalar_type());
    });
    // Of a stream that is x: norm(x) W^T.
    m.def("few_rows_product", [](const at::Tensor& x, const at::Tensor& weight, bool relu, double eps) {
        return FewRows(x.clone(), eps, weight.scalar_type()).product(weight, relu);
    });
    // What a layer does to a stream that is x: the sum after each product, then norm(x) W^T of the last.
    m.def("few_rows_layer", [](const at::Tensor& x, const at::Tensor& mixed, const at::Tensor& out, const at::Tensor& own,
                               const at::Tensor& up, const at::Tensor& down, double eps) {
        FewRows stream(x.clone(), eps, out.scalar_type());
        stream.add(mixed, out);
        const at::Tensor first = stream.numbers().clone();
        stream.add_own(own);
        const at::Tensor second = stream.numbers().clone();
        stream.add(stream.product(up, true), down);
        return std::vector<at::Tensor>{first, second, stream.numbers(), stream.product(up)};
    });
    m.def("takes_few_rows", [](const at::Tensor& weight) { return FewRows::takes(weight); });
    m.def("series_tokens", [](const at::Tensor& context, const at::Tensor& future, int64_t patch, bool register_token,
                              bool arcsinh, double time_encoding_scale, const at::Tensor& like) {
        const SeriesTokens tokens =
            series_tokens({patch, register_token, arcsinh, time_encoding_scale}, context, future, like.scalar_type());
        return std::make_tuple(tokens.features, tokens.valid, tokens.loc, tokens.scale);
    });
    m.def("series_weight",
          [](const at::Tensor& weight, const at::Tensor& bias, const Optional& register_embedding, const at::Tensor& like) {
              return series_weight(weight, bias, tensor_of(register_embedding), like.scalar_type());
          });
    m.def("series_quantiles", [](const at::Tensor& z, const at::Tensor& loc, const at::Tensor& scale, bool arcsinh) {
        return series_quantiles(z, loc, scale, arcsinh);
    });
}

}  // namespace
}  // namespace diffusionz
