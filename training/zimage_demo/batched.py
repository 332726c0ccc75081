"""Qwen3's and the Z-Image transformer's forward pass for whole batches, on the weights of the original modules.

The classes of transformers and diffusers work on lists and complex numbers and compile badly. These functions compute
the same from the same parameters (`python batched.py` compares the two), with one compiled function per kind of block.
All captions of a batch are padded to the same multiple of 32 tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from models import CAPTION_MULTIPLE, TEXT, TRANSFORMER

Tensor = torch.Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(x.float(), (x.shape[-1],), eps=eps) * weight.float()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs (Z-Image's rope): x [b, s, h, d], cos and sin [s, 1, d/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first half against the second (Qwen's rope)."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def image_block(
    x: Tensor, cos: Tensor, sin: Tensor, mod: Tensor | None, weights: tuple[Tensor, ...], heads: int, eps: float
) -> Tensor:
    """A ZImageTransformerBlock: x [b, s, d]; `mod` [b, 4 d] holds scales and gates, None for captions' blocks."""
    q_w, k_w, v_w, o_w, q_n, k_n, w1, w2, w3, an1, fn1, an2, fn2 = weights
    if mod is not None:
        scale_a, gate_a, scale_f, gate_f = mod.unsqueeze(1).chunk(4, -1)
        gate_a, gate_f, scale_a, scale_f = gate_a.tanh(), gate_f.tanh(), 1 + scale_a, 1 + scale_f
    else:
        scale_a = gate_a = scale_f = gate_f = 1.0
    h = rms(x, an1, eps) * scale_a
    q, k, v = linear(h, torch.cat((q_w, k_w, v_w))).unflatten(-1, (3, heads, -1)).unbind(2)
    q, k = rotate_pairs(rms(q, q_n, 1e-5), cos, sin), rotate_pairs(rms(k, k_n, 1e-5), cos, sin)
    x = x + gate_a * rms(linear(attend(q, k, v), o_w), an2, eps)
    h = rms(x, fn1, eps) * scale_f
    first, third = linear(h, torch.cat((w1, w3))).chunk(2, -1)
    return x + gate_f * rms(linear(F.silu(first) * third, w2), fn2, eps)


def text_block(
    x: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor, ...], heads: int, kv_heads: int, eps: float
) -> Tensor:
    """A Qwen3 decoder layer: x [b, s, d]."""
    q_w, k_w, v_w, o_w, q_n, k_n, gate, up, down, n1, n2 = weights
    h = rms(x, n1, eps)
    q, k, v = (linear(h, w).unflatten(-1, (n, -1)) for w, n in ((q_w, heads), (k_w, kv_heads), (v_w, kv_heads)))
    q, k = rotate_halves(rms(q, q_n, eps), cos, sin), rotate_halves(rms(k, k_n, eps), cos, sin)
    k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
    x = x + linear(attend(q, k, v, causal=True), o_w)
    h = rms(x, n2, eps)
    return x + linear(F.silu(linear(h, gate)) * linear(h, up), down)


def image_weights(block) -> tuple[Tensor, ...]:
    a, f = block.attention, block.feed_forward
    modules = (a.to_q, a.to_k, a.to_v, a.to_out[0], a.norm_q, a.norm_k, f.w1, f.w2, f.w3)
    norms = (block.attention_norm1, block.ffn_norm1, block.attention_norm2, block.ffn_norm2)
    return tuple(m.weight for m in modules + norms)


def text_weights(layer) -> tuple[Tensor, ...]:
    a, f = layer.self_attn, layer.mlp
    modules = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, a.q_norm, a.k_norm, f.gate_proj, f.up_proj, f.down_proj)
    return tuple(m.weight for m in (*modules, layer.input_layernorm, layer.post_attention_layernorm))


class Batched:
    """Runs text encoder and transformer together; `dtype` is the precision of the activations."""

    def __init__(self, text, flow, device: torch.device, dtype: torch.dtype = torch.bfloat16, compiled: bool = True):
        self.text, self.flow, self.dtype, self.device = text, flow, dtype, device
        # One compilation for each batch shape, with and without gradients; all layers share them.
        torch._dynamo.config.recompile_limit = 64
        self.image_block = torch.compile(image_block, dynamic=False) if compiled else image_block
        self.text_block = torch.compile(text_block, dynamic=False) if compiled else text_block
        self.ropes: dict[int, tuple[Tensor, ...]] = {}

    def rope(self, length: int) -> tuple[Tensor, ...]:
        """Cosines and sines for captions of `length` tokens: text encoder, image tokens, caption tokens."""
        if length not in self.ropes:
            dim = TEXT["head_dim"]
            inv = TEXT["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            text = torch.outer(torch.arange(length, dtype=torch.float64), inv)
            side = 16
            grid = torch.cartesian_prod(torch.tensor([length + 1]), torch.arange(side), torch.arange(side))
            captions = torch.zeros(length, 3, dtype=torch.long)
            captions[:, 0] = torch.arange(1, length + 1)
            angles = [text]
            for ids in (grid, captions):
                parts = []
                for axis, dim in enumerate(TRANSFORMER["axes_dims"]):
                    inv = TRANSFORMER["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                    parts.append(torch.outer(ids[:, axis].double(), inv))
                angles.append(torch.cat(parts, 1))
            self.ropes[length] = tuple(
                f(a).float().unsqueeze(1).to(self.device) for a in angles for f in (torch.cos, torch.sin)
            )
        return self.ropes[length]

    def encode(self, ids: Tensor) -> Tensor:
        """Features [b, s, d] of token ids [b, s]; causal, so what follows a caption's end does not matter."""
        cos, sin = self.rope(ids.shape[1])[:2]
        x = F.embedding(ids, self.text.embed_tokens.weight).to(self.dtype)
        for layer in self.text.layers[:-1]:  # the last layer's output is never read
            x = self.text_block(
                x,
                cos,
                sin,
                text_weights(layer),
                TEXT["num_attention_heads"],
                TEXT["num_key_value_heads"],
                TEXT["rms_norm_eps"],
            )
        return x

    def caption(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Refined caption tokens [b, s, dim]; positions from each caption's length on hold the pad token."""
        flow, eps = self.flow, TRANSFORMER["norm_eps"]
        norm, project = flow.cap_embedder
        x = linear(rms(self.encode(ids), norm.weight, eps), project.weight, project.bias)
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        x = torch.where(padding[..., None], flow.cap_pad_token.to(x.dtype), x)
        cos, sin = self.rope(ids.shape[1])[4:]
        for block in flow.context_refiner:
            x = self.image_block(x, cos, sin, None, image_weights(block), TRANSFORMER["n_heads"], eps)
        return x

    def velocity(self, x: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
        """dx/dsigma [b, 16, 32, 32] (float32) of latents at noise level sigma [b], as the scheduler takes it."""
        flow, eps, heads = self.flow, TRANSFORMER["norm_eps"], TRANSFORMER["n_heads"]
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        args = ((1 - sigma) * TRANSFORMER["t_scale"])[:, None].float() * freqs
        first, _, second = flow.t_embedder.mlp
        t = linear(torch.cat((args.cos(), args.sin()), -1), first.weight, first.bias)
        t = linear(F.silu(t), second.weight, second.bias).to(self.dtype)

        b, c, side, _ = x.shape
        tokens = x.view(b, c, side // 2, 2, side // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 4 * c)
        embed = flow.all_x_embedder["2-1"]
        h = linear(tokens.to(self.dtype), embed.weight, embed.bias)
        _, _, cos, sin, cap_cos, cap_sin = self.rope(caption.shape[1])
        for block in flow.noise_refiner:
            mod = linear(t, block.adaLN_modulation[0].weight, block.adaLN_modulation[0].bias)
            h = self.image_block(h, cos, sin, mod, image_weights(block), heads, eps)
        h = torch.cat((h, caption), 1)
        cos, sin = torch.cat((cos, cap_cos)), torch.cat((sin, cap_sin))
        for block in flow.layers:
            mod = linear(t, block.adaLN_modulation[0].weight, block.adaLN_modulation[0].bias)
            h = self.image_block(h, cos, sin, mod, image_weights(block), heads, eps)
        last = flow.all_final_layer["2-1"]
        scale = 1 + linear(F.silu(t), last.adaLN_modulation[1].weight, last.adaLN_modulation[1].bias)
        h = h[:, : tokens.shape[1]]
        h = F.layer_norm(h.float(), (h.shape[-1],), eps=1e-6) * scale.unsqueeze(1).float()
        out = F.linear(h, last.linear.weight, last.linear.bias)
        out = out.view(b, side // 2, side // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, side, side)
        return -out


def check_parity() -> None:
    """Compare with the original classes on random weights and captions; raises if they differ."""
    from models import text_encoder, transformer

    torch.manual_seed(0)
    text, flow = text_encoder().eval(), transformer().eval()
    with torch.no_grad():
        for p in [*text.parameters(), *flow.parameters()]:
            p.add_(torch.randn_like(p) * 0.05)
    fast = Batched(text, flow, torch.device("cpu"), torch.float32, compiled=False)
    for width in (32, 64):
        lengths = torch.tensor([width - 11, width])
        ids = torch.randint(0, TEXT["vocab_size"], (2, width))
        latents, sigma = torch.randn(2, 16, 32, 32), torch.tensor([0.9, 0.3])
        with torch.no_grad():
            mask = (torch.arange(512) < lengths[:, None]).long()
            padded = F.pad(ids, (0, 512 - width), value=7) * mask
            features = text(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
            features = [f[:n] for f, n in zip(features, lengths, strict=True)]
            expected = -torch.stack(
                flow(list(latents.unsqueeze(2).unbind(0)), 1 - sigma, features, return_dict=False)[0]
            ).squeeze(2)
            found = fast.velocity(latents, sigma, fast.caption(ids, lengths))
        error = float((found - expected).norm() / expected.norm())
        print(f"captions of {width} tokens (multiple of {CAPTION_MULTIPLE}): relative difference {error:.2e}")
        if error > 1e-4:
            raise SystemExit("the batched forward pass differs from the original classes")


if __name__ == "__main__":
    check_parity()
