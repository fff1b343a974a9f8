"""The contrastive loss of CLIP (Radford et al. 2021), over the pairs of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipq.dist.gather import all_gather_with_grad


def contrastive_loss(image_features_BD: Tensor, text_features_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of the cross entropies image to text and text to image.

    Each rank computes the logits of its own B rows against the W·B columns of all ranks, so that memory is B × W·B and
    not (W·B)². The mean of the ranks' losses is the loss of the whole batch, and the mean of their gradients (which is
    what DDP forms) its gradient.

    Args:
        image_features_BD, text_features_BD: unit-norm features of this rank's B pairs, B equal on all ranks.
        logit_scale: 0-dim tensor, the factor itself and not its logarithm.

    Returns:
        0-dim fp32 tensor. The arithmetic is fp32 whatever autocast says: bf16 logits cost accuracy and save nothing.
    """
    with torch.autocast(image_features_BD.device.type, enabled=False):
        pair_2BD = torch.stack((image_features_BD.float(), text_features_BD.float()))
        all_W2BD = all_gather_with_grad(pair_2BD)
        all_image, all_text = all_W2BD.unbind(1)
        logits_image = logit_scale.float() * pair_2BD[0] @ all_text.flatten(0, 1).T
        logits_text = logit_scale.float() * pair_2BD[1] @ all_image.flatten(0, 1).T
        B = image_features_BD.shape[0]
        first = dist.get_rank() * B if all_W2BD.shape[0] > 1 else 0
        labels = torch.arange(first, first + B, device=logits_image.device)
        return (F.cross_entropy(logits_image, labels) + F.cross_entropy(logits_text, labels)) / 2
