"""A residual transformer block whose weight products are all plain `nn.Linear`; patch dropout on the device.

    x_BLD ─ ln_1 ─ attn.in_proj ─ attention ─ (ln_inner) ─ attn.out_proj ─ (ln_attn) ─ (ls_1) ─ + ─┐
    ┌──────────────────────────────────────────────────────────────────────────────────────────────┘
    └────── ln_2 ─ mlp.c_fc ─ mlp.act ─ (mlp.ln) ─ mlp.c_proj ─ (ls_2) ─ + ─ x_BLD

`Block.pairs()` names the linear layers with what feeds them, for whoever fuses the two (`clipq.lowp.block`).

Shapes: B batch, L tokens, D width, H heads, E head width (D = H·E), K tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU
from torch import Tensor, nn


class Pair(NamedTuple):
    """A linear layer with the only module that feeds it; names are relative to the block."""

    producer: str
    linear: str
    kind: Literal["layer_norm", "gelu", "quick_gelu", "other"]


class Attention(nn.Module):
    """Multi-head self-attention with a fused query-key-value projection.

    Args:
        in_proj: D -> 3D, the rows of query, key and value stacked in this order.
        out_proj: D -> D.
        heads: number of heads; divides D.
        causal: a mask given to `forward` is known to be the plain causal one: SDPA may choose a flash kernel.
        ln_q, ln_k: norms over E of queries and keys (Henry et al., https://arxiv.org/abs/2010.04245).
        ln_inner: norm over D before `out_proj` (Sub-LN, https://arxiv.org/abs/2210.06423).
        logit_scale: (H, 1, 1) log of the scale of cosine attention (Swin V2, https://arxiv.org/abs/2111.09883);
            None for scaled dot products.
        head_scale: (H, 1, 1) gain of each head (NormFormer, https://arxiv.org/abs/2110.09456), or None.
    """

    logit_scale: nn.Parameter | None
    head_scale: nn.Parameter | None

    def __init__(
        self,
        in_proj: nn.Linear,
        out_proj: nn.Linear,
        heads: int,
        *,
        causal: bool = False,
        ln_q: nn.Module | None = None,
        ln_k: nn.Module | None = None,
        ln_inner: nn.Module | None = None,
        logit_scale: nn.Parameter | None = None,
        head_scale: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.in_proj = in_proj
        self.out_proj = out_proj
        self.heads = heads
        self.causal = causal
        self.ln_q = ln_q or nn.Identity()
        self.ln_k = ln_k or nn.Identity()
        self.ln_inner = ln_inner or nn.Identity()
        self.register_parameter("logit_scale", logit_scale)
        self.register_parameter("head_scale", head_scale)

    def forward(self, x_BLD: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `attn_mask` as in `attend`."""
        return self.out_proj(self.attend(*self.in_proj(x_BLD).chunk(3, -1), attn_mask=attn_mask))

    def attend(self, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """What lies between the two projections.

        Args:
            q_BLD, k_BLD, v_BLD: (B, L, D), queries, keys and values.
            attn_mask: additive, or boolean where True hides a key; (L, L), (B, H, L, L) or (B·H, L, L).
                A causal block takes its presence for the causal mask, and does not read it.

        Returns:
            (B, L, D).
        """
        q_BLHE, k_BLHE, v_BLHE = (t.unflatten(-1, (self.heads, -1)) for t in (q_BLD, k_BLD, v_BLD))
        q_BLHE, k_BLHE, scale = self._scaled(q_BLHE, k_BLHE)
        causal = self.causal and attn_mask is not None
        x_BHLE = F.scaled_dot_product_attention(
            q_BLHE.transpose(1, 2),
            k_BLHE.transpose(1, 2),
            v_BLHE.transpose(1, 2),
            attn_mask=None if causal or attn_mask is None else self._additive(attn_mask, q_BLHE),
            is_causal=causal,
            scale=scale,
        )
        if self.head_scale is not None:
            x_BHLE = x_BHLE * self.head_scale
        return self.ln_inner(x_BHLE.transpose(1, 2).flatten(-2))

    def _scaled(self, q_BLHE: Tensor, k_BLHE: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Queries and keys as they enter the product, and its scale (None: E^-½)."""
        if self.logit_scale is None:
            return self.ln_q(q_BLHE), self.ln_k(k_BLHE), None
        dtype = q_BLHE.dtype
        gain_H1 = self.logit_scale.clamp(max=math.log(100.0)).exp().flatten(1)
        q_BLHE = (F.normalize(q_BLHE, dim=-1) * gain_H1).to(dtype)
        return q_BLHE, F.normalize(k_BLHE, dim=-1).to(dtype), 1.0

    def _additive(self, attn_mask: Tensor, q_BLHE: Tensor) -> Tensor:
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=q_BLHE.dtype)
            attn_mask = zeros.masked_fill(attn_mask, -math.inf)
        if attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        return attn_mask.to(q_BLHE.dtype)


class Mlp(nn.Module):
    """Two linear layers with an activation, and a norm after it where the model has one (NormFormer)."""

    def __init__(self, c_fc: nn.Linear, act: nn.Module, c_proj: nn.Linear, *, ln: nn.Module | None = None) -> None:
        super().__init__()
        self.c_fc = c_fc
        self.act = act
        self.ln = ln or nn.Identity()
        self.c_proj = c_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.ln(self.act(self.c_fc(x))))


def _kind(producer: nn.Module) -> Literal["layer_norm", "gelu", "quick_gelu", "other"]:
    """By the very class: a subclass may compute something else."""
    if type(producer) in (nn.LayerNorm, LayerNorm, LayerNormFp32):
        return "layer_norm"
    if type(producer) is QuickGELU:
        return "quick_gelu"
    return "gelu" if type(producer) is nn.GELU and producer.approximate == "none" else "other"


class Block(nn.Module):
    """A pre-norm residual block that stands in for OpenCLIP's: same call signature, same function.

    Args:
        ln_1, ln_2: norms over D before attention and MLP.
        ln_attn: norm over D of the attention branch (NormFormer), or None.
        ls_1, ls_2: layer scale of the two branches, or None.

    Attributes:
        fused: None, or what computes the block in place of the modules' own forwards: a function of the block, its
            input and the mask (`clipq.lowp.block` sets it).
    """

    fused: Callable[[Block, Tensor, Tensor | None], Tensor] | None

    def __init__(
        self,
        *,
        ln_1: nn.Module,
        attn: Attention,
        ln_2: nn.Module,
        mlp: Mlp,
        ls_1: nn.Module | None = None,
        ls_2: nn.Module | None = None,
        ln_attn: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.ln_1 = ln_1
        self.attn = attn
        self.ln_attn = ln_attn or nn.Identity()
        self.ls_1 = ls_1 or nn.Identity()
        self.ln_2 = ln_2
        self.mlp = mlp
        self.ls_2 = ls_2 or nn.Identity()
        self.fused = None

    def pairs(self) -> list[Pair]:
        """The linear layers that can be fused with what feeds them.

        `attn.out_proj` is missing where the attention kernel feeds it.
        """
        fed = {"ln_1": "attn.in_proj", "ln_2": "mlp.c_fc"}
        fed["mlp.act" if isinstance(self.mlp.ln, nn.Identity) else "mlp.ln"] = "mlp.c_proj"
        if not isinstance(self.attn.ln_inner, nn.Identity):
            fed["attn.ln_inner"] = "attn.out_proj"
        return [Pair(producer, linear, _kind(self.get_submodule(producer))) for producer, linear in fed.items()]

    def linears(self) -> list[str]:
        """Names of all linear layers, in the order of the forward."""
        return ["attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]

    def get_weight_dtype(self) -> torch.dtype:
        """Read by OpenCLIP's towers to cast their embeddings."""
        # of a gain or a bias: FSDP may hold matrices in autocast's type
        return next((p.dtype for p in self.parameters() if p.ndim < 2), self.mlp.c_fc.weight.dtype)

    def forward(
        self,
        x_BLD: Tensor,
        k_x: None = None,
        v_x: None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """`k_x` and `v_x` hold the places of OpenCLIP's cross-attention inputs, which its towers leave None.

        Args:
            x_BLD: (B, L, D).
            attn_mask: see `Attention.forward`.

        Returns:
            (B, L, D).

        Raises:
            NotImplementedError: for cross-attention.
        """
        if k_x is not None or v_x is not None:
            raise NotImplementedError("clipq's Block is self-attention only: k_x and v_x must be None")
        if self.fused is not None:
            return self.fused(self, x_BLD, attn_mask)
        x_BLD = x_BLD + self.ls_1(self.ln_attn(self.attn(self.ln_1(x_BLD), attn_mask)))
        return x_BLD + self.ls_2(self.mlp(self.ln_2(x_BLD)))


class PatchDropout(nn.Module):
    """Keeps a random subset of each image's patch tokens in training (FLIP, https://arxiv.org/abs/2212.00794).

    Draws on the device of its input with that device's default generator. Each image keeps its first (class)
    token and max(1, ⌊(L-1)·(1-prob)⌋) others, each subset of that size being equally likely. The order of the
    kept tokens is arbitrary: they carry their position embeddings already, and a transformer does not see it.
    """

    def __init__(self, prob: float) -> None:
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"patch dropout of {prob}: expected a share in [0, 1)")
        self.prob = prob

    def kept(self, patches: int) -> int:
        """How many of an image's patches are left in training."""
        return max(1, int(patches * (1 - self.prob)))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, 1 + K, D) in training, the input itself otherwise."""
        if not self.training or self.prob == 0:
            return x_BLD
        class_B1D, patches_BLD = x_BLD[:, :1], x_BLD[:, 1:]
        batch, patches, width = patches_BLD.shape
        keep = self.kept(patches)
        draw_BL = torch.rand(batch, patches, device=x_BLD.device)
        index_BK = draw_BL.topk(keep, dim=-1, sorted=False).indices
        kept_BKD = patches_BLD.gather(1, index_BK[..., None].expand(-1, -1, width))
        return torch.cat((class_B1D, kept_BKD), dim=1)

    def extra_repr(self) -> str:
        return f"prob={self.prob}"
