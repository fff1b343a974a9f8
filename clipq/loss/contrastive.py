"""The contrastive loss of CLIP (Radford et al. 2021), over the pairs of all ranks, in memory linear in their number.

The logits of a rank, own images × texts of all ranks, are computed tile by tile and never kept. The sums of the
softmax, along rows and along columns, go on from tile to tile (the online softmax of Milakov and Gimelshein, arXiv
1805.02867), and the backward computes each tile again from the features, as FlashAttention does (Dao et al., arXiv
2205.14135) and Inf-CL for this loss (Cheng et al., arXiv 2410.17243). Inf-CL passes features round a ring of ranks;
here texts are gathered, for those take memory linear in the batch too.

A logit serves both directions: a text's softmax is over the images of all ranks, each of which has its own part of that
column, so ranks exchange two numbers for each text instead of computing it all twice.

Shape suffixes: B pairs on this rank, W ranks, N = W·B pairs, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipq.dist.gather import exchange_with_grad
from clipq.loss.tiles import TILE, matching, operands, refuse_second_derivative, tiles


def contrastive_loss(
    image_features_BD: Tensor, text_features_BD: Tensor, logit_scale: Tensor, *, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """Mean of the cross entropies image to text and text to image.

    The mean of the ranks' losses is the loss of the whole batch, and the mean of their gradients (which is what DDP
    forms) its gradient. Collective, and so is the backward.

    Args:
        image_features_BD, text_features_BD: unit-norm features of this rank's B pairs, B equal on all ranks.
        logit_scale: 0-dim tensor, the factor itself and not its logarithm.
        tile: logits in memory at a time.

    Returns:
        The loss, 0-dim, and the largest logit of this rank's images and all texts, 0-dim, without gradient. They are
        fp32, and so is the arithmetic whatever autocast says (bf16 logits cost accuracy and save nothing); fp64 where
        the features are.
    """
    with torch.autocast(image_features_BD.device.type, enabled=False):
        x_BD, text_WBD, first = operands(image_features_BD, text_features_BD, logit_scale)
        W, B, _ = text_WBD.shape
        own_B, peak_B, rest_B, peak_N, rest_N = _LogSums.apply(  # pyright: ignore[reportGeneralTypeIssues]
            x_BD, text_WBD.flatten(0, 1), first, tile
        )
        # A good pair's own logit is the peak: subtracted first, it leaves a small loss with all its digits.
        image_to_text_B = peak_B - own_B + rest_B
        of_texts_W2B = exchange_with_grad(torch.stack((peak_N.view(W, B), rest_N.view(W, B)), dim=1))
        text_to_image_B = (of_texts_W2B[:, 0] - own_B + of_texts_W2B[:, 1]).logsumexp(0)
        return (image_to_text_B + text_to_image_B).mean() / 2, peak_B.amax()


class _LogSums(torch.autograd.Function):
    """Along rows and columns of x @ y.T: the largest element, and log Σ exp(element - largest).

    The logarithm of a sum of exponentials is the one plus the other; its gradient is in the second, for the first
    enters nothing without it.
    """

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, y_ND: Tensor, first: int, limit: int) -> tuple[Tensor, ...]:
        """Returns the elements (i, first + i), [B]; peaks and rests of the rows, [B], and of the columns, [N]."""
        B, N = len(x_BD), len(y_ND)
        own_B = x_BD.new_empty(B)
        peak_B, peak_N = x_BD.new_full((B,), -torch.inf), x_BD.new_full((N,), -torch.inf)
        sum_B, sum_N = torch.zeros_like(peak_B), torch.zeros_like(peak_N)
        for rows, columns in tiles(B, N, limit):
            tile = x_BD[rows] @ y_ND[columns].T
            elements, at = matching(tile, rows, columns, first)
            own_B[at] = elements
            _add(tile, peak_B[rows], sum_B[rows], dim=1)
            _add(tile, peak_N[columns], sum_N[columns], dim=0)
        ctx.save_for_backward(x_BD, y_ND, peak_B, sum_B, peak_N, sum_N)
        ctx.first, ctx.limit = first, limit
        ctx.mark_non_differentiable(peak_B, peak_N)
        return own_B, peak_B, sum_B.log(), peak_N, sum_N.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        refuse_second_derivative()
        x_BD, y_ND, peak_B, sum_B, peak_N, sum_N = ctx.saved_tensors
        grad_own_B, _, grad_B, _, grad_N = grads
        weight_B, weight_N = grad_B / sum_B, grad_N / sum_N
        grad_x_BD, grad_y_ND = torch.zeros_like(x_BD), torch.zeros_like(y_ND)
        with torch.autocast(x_BD.device.type, enabled=False):
            for rows, columns in tiles(len(x_BD), len(y_ND), ctx.limit):
                tile = x_BD[rows] @ y_ND[columns].T
                grad = (tile - peak_B[rows, None]).exp_().mul_(weight_B[rows, None])
                grad.addcmul_(tile.sub_(peak_N[columns]).exp_(), weight_N[columns])
                elements, at = matching(grad, rows, columns, ctx.first)
                elements.add_(grad_own_B[at])
                grad_x_BD[rows].addmm_(grad, y_ND[columns])
                grad_y_ND[columns].addmm_(grad.T, x_BD[rows])
        return grad_x_BD, grad_y_ND, None, None


def _add(tile: Tensor, peak: Tensor, total: Tensor, dim: int) -> None:
    """Takes a tile into the peaks and sums of its rows or columns, in place; NaN goes into both."""
    new = torch.maximum(peak, tile.amax(dim))
    total.mul_((peak - new).exp_()).add_((tile - new.unsqueeze(dim)).exp_().sum(dim))
    peak.copy_(new)
