"""AdamW."""

from __future__ import annotations

from dataclasses import replace

import torch

from .adam import Adam


class AdamW(Adam, torch.optim.AdamW):
    r"""Adam with decoupled weight decay; a drop-in for :class:`torch.optim.AdamW`.

    As :class:`fusedopt.Adam`, after :math:`\theta_{t-1} \leftarrow (1 - \gamma \lambda)
    \theta_{t-1}`.

    Args:
        params: Parameters, named parameters, or groups of them. State tensors have a parameter's
            shape and dtype.
        lr (float | Tensor): Learning rate :math:`\gamma`. Default: 1e-3.
        betas (tuple): Decay of the two moving averages. Default: (0.9, 0.999).
        eps (float): Added to the root. Default: 1e-8.
        weight_decay (float): Decay :math:`\lambda`. Default: 1e-2.
        amsgrad (bool): Keeps the largest second moment. Default: False.
        maximize (bool): Ascends instead of descending. Default: False.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        capturable (bool): Allows capture in a CUDA graph. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4, max_grad_norm=1.0)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
    arXiv:1711.05101.
    """

    _rule = replace(Adam._rule, plain=torch.optim.AdamW, always_decouples=True)
