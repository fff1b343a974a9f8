"""The pairwise sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343), over the pairs of all ranks.

Each image with each text is a yes-or-no question, so nothing is summed over a row before the loss: tiles as in
`contrastive.py` give the same memory, linear in the batch, without partial sums between ranks.

Shape suffixes: B pairs on this rank, W ranks, N = W·B pairs, D features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipq.loss.tiles import TILE, matching, operands, refuse_second_derivative, tiles


def sigmoid_loss(
    image_features_BD: Tensor, text_features_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """Sum over all texts of -log sigmoid(±logit), + for an image's own text, as a mean over images.

    The mean of the ranks' losses and gradients is that of the whole batch. Collective, and so is the backward.

    Args:
        image_features_BD, text_features_BD: unit-norm features of this rank's B pairs, B equal on all ranks.
        logit_scale: 0-dim tensor, the factor itself and not its logarithm.
        logit_bias: 0-dim tensor, added to each logit.
        tile: logits in memory at a time.

    Returns:
        The loss, 0-dim, and the largest logit of this rank's images and all texts, 0-dim, without gradient; types as of
        `contrastive_loss`.
    """
    with torch.autocast(image_features_BD.device.type, enabled=False):
        x_BD, text_WBD, first = operands(image_features_BD, text_features_BD, logit_scale)
        loss_B, peak_B = _Losses.apply(  # pyright: ignore[reportGeneralTypeIssues]
            x_BD, text_WBD.flatten(0, 1), logit_bias.to(x_BD.dtype), first, tile
        )
        return loss_B.mean(), peak_B.amax()


class _Losses(torch.autograd.Function):
    """Σ over j of softplus(∓(x_i · y_j + bias)), - where j = first + i, and the largest logit of each row i."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, y_ND: Tensor, bias: Tensor, first: int, limit: int) -> tuple[Tensor, Tensor]:
        loss_B, peak_B = x_BD.new_zeros(len(x_BD)), x_BD.new_full((len(x_BD),), -torch.inf)
        for rows, columns in tiles(len(x_BD), len(y_ND), limit):
            tile = (x_BD[rows] @ y_ND[columns].T).add_(bias)
            peak_B[rows] = torch.maximum(peak_B[rows], tile.amax(1))
            matching(tile, rows, columns, first)[0].neg_()
            loss_B[rows] += F.softplus(tile, threshold=40).sum(1)  # the usual 20 would cost digits in fp64
        ctx.save_for_backward(x_BD, y_ND, bias)
        ctx.first, ctx.limit = first, limit
        ctx.mark_non_differentiable(peak_B)
        return loss_B, peak_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        refuse_second_derivative()
        x_BD, y_ND, bias = ctx.saved_tensors
        grad_x_BD, grad_y_ND, grad_bias_B = torch.zeros_like(x_BD), torch.zeros_like(y_ND), torch.zeros_like(grads[0])
        with torch.autocast(x_BD.device.type, enabled=False):
            for rows, columns in tiles(len(x_BD), len(y_ND), ctx.limit):
                grad = (x_BD[rows] @ y_ND[columns].T).add_(bias)
                own = matching(grad, rows, columns, ctx.first)[0].neg_()
                grad.sigmoid_()
                own.neg_()
                grad.mul_(grads[0][rows, None])
                grad_x_BD[rows].addmm_(grad, y_ND[columns])
                grad_y_ND[columns].addmm_(grad.T, x_BD[rows])
                grad_bias_B[rows] += grad.sum(1)
        return grad_x_BD, grad_y_ND, grad_bias_B.sum().view_as(bias), None, None
