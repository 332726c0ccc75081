"""chronos-forecasting's side: forecasts of rows, embeddings, and every layer's output."""

import pathlib
import warnings

import numpy
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from chronos.chronos2 import Chronos2Model, Chronos2Pipeline
    from chronos.chronos2.dataset import left_pad_and_cat_2D
    from chronos.chronos2.model import Chronos2Output
    from chronos.utils import interpolate_quantiles

UNROLLED_LEVELS = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])  # the default of upstream's predict


def scale_in_float64(norm, x, loc_scale=None):
    """InstanceNorm.forward with the mean and the deviation in float64. Upstream's are off by roundings of the level."""
    wide = x.double()
    if loc_scale is None:
        loc = torch.nan_to_num(wide.nanmean(dim=-1, keepdim=True), nan=0.0).float()
        scale = torch.nan_to_num((wide - loc).square().nanmean(dim=-1, keepdim=True).sqrt(), nan=1.0).float()
        loc_scale = loc, torch.where(scale == 0, norm.eps, scale)
    scaled = ((wide - loc_scale[0]) / loc_scale[1]).float()
    return (torch.arcsinh(scaled) if norm.use_arcsinh else scaled), loc_scale


class WithoutRegister(Chronos2Model):
    """Upstream's forward asserts that there is a register token, though the rest of the model does without one."""

    def forward(self, context, group_ids, future_covariates, num_output_patches):
        encoded, loc_scale, *_ = self.encode(
            context=context, group_ids=group_ids, future_covariates=future_covariates,
            num_output_patches=num_output_patches,
        )  # fmt: skip
        head = self.output_patch_embedding(encoded[0][:, -num_output_patches:])
        by_level = head.unflatten(-1, (self.num_quantiles, -1)).transpose(1, 2).flatten(2)
        flat = self.instance_norm.inverse(by_level.flatten(1), loc_scale)
        return Chronos2Output(quantile_preds=flat.unflatten(1, (self.num_quantiles, -1)))


def load_pipeline(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> Chronos2Pipeline:
    """The reference, read from the files that the engine reads."""
    model = Chronos2Model.from_pretrained(folder, dtype=dtype).eval()
    if not model.chronos_config.use_reg_token:
        model.__class__ = WithoutRegister
    return Chronos2Pipeline(model=model)


def batch_of(pipe, request):
    """(context [rows, length] padded on the left, group ids) as upstream's dataset makes them."""
    length = request.context_length or pipe.model_context_length
    rows = [torch.from_numpy(row[-length:])[None] for row in request.rows]
    groups = request.group_ids if request.group_ids is not None else range(len(rows))
    # Upstream multiplies the ids when it unrolls: any number is fine as long as it is small.
    _, groups = numpy.unique(numpy.asarray(groups), return_inverse=True)
    return left_pad_and_cat_2D(rows), torch.from_numpy(groups)


@torch.no_grad()
def forecast_rows(pipe, request):
    """[rows, the model's levels, horizon]: what upstream computes for every row, covariates too."""
    context, groups = batch_of(pipe, request)
    future = request.future
    if future is None:
        future = numpy.full((len(request.rows), request.horizon), numpy.nan, numpy.float32)
    (forecast,) = pipe._predict_batch(
        context=context,
        group_ids=groups,
        future_covariates=torch.from_numpy(future),
        unrolled_quantiles_tensor=UNROLLED_LEVELS,
        prediction_length=request.horizon,
        max_output_patches=pipe.max_output_patches,
        target_idx_ranges=[(0, len(request.rows))],
    )
    return forecast


def forecast(pipe, request):
    """([targets, levels, horizon] by the rule of upstream's predict_quantiles, the mean of each target's history)."""
    rows = forecast_rows(pipe, request)
    _, (loc, _) = pipe.model.instance_norm(batch_of(pipe, request)[0])
    targets = [kind == 0 for kind in request.row_kinds or [0] * len(request.rows)]
    rows, loc = rows[targets], loc[targets, 0]
    if request.levels is None:
        return rows, loc
    if set(request.levels) <= set(pipe.quantiles):
        return rows[:, [pipe.quantiles.index(level) for level in request.levels]], loc
    return interpolate_quantiles(list(request.levels), pipe.quantiles, rows.transpose(1, 2)).transpose(1, 2), loc


@torch.no_grad()
def embed(pipe, request):
    """([rows, tokens, width], which tokens are not of an empty patch [rows, tokens], loc [rows], scale [rows])."""
    context, groups = batch_of(pipe, request)
    encoded, (loc, scale), *_ = pipe.model.encode(context=context, group_ids=groups)
    _, observed, _ = pipe.model._prepare_patched_context(context)
    others = torch.ones(len(observed), encoded[0].shape[1] - observed.shape[1], dtype=torch.bool)
    return encoded[0], torch.cat([observed, others], dim=1), loc[:, 0], scale[:, 0]


@torch.no_grad()
def layers(pipe, request):
    """Every stage of one pass over the request's rows, by name, each [rows, tokens, ...]: "features" (the patches of
    context and future), "embedding", "block 0".., "norm", "head" (the model's levels by the patch's steps), and "loc"
    and "scale" [rows]."""
    model, kept = pipe.model, {}

    def keep(name, tensor):
        # The patch embedding is called twice: for the context and for the future.
        kept[name] = torch.cat([kept[name], tensor], dim=1) if name in kept else tensor

    blocks = model.encoder.block
    hooks = [
        model.input_patch_embedding.register_forward_pre_hook(lambda _, given: keep("features", given[0])),
        blocks[0].register_forward_pre_hook(lambda _, given: keep("embedding", given[0])),
        model.encoder.final_layer_norm.register_forward_hook(lambda _, given, made: keep("norm", made)),
        model.output_patch_embedding.register_forward_hook(lambda _, given, made: keep("head", made)),
    ]
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda _, given, made, i=i: keep(f"block {i}", made.hidden_states)))
    forecast_rows(pipe, request)
    for hook in hooks:
        hook.remove()
    _, (loc, scale) = model.instance_norm(batch_of(pipe, request)[0])
    return kept | {"loc": loc[:, 0], "scale": scale[:, 0]}
