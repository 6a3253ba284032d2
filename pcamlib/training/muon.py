"""Muon: every matrix of weights moves by the orthogonal matrix nearest to its momentum; the rest by AdamW.

Keller Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon). `torch.optim.Muon` takes 2-D weights only and
no others beside them; here a convolution's kernel counts as the matrix (outputs, the rest), and one optimiser holds
all weights, so that a checkpoint does too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steepest at 0; singular values end between 0.7 and 1.2


def orthogonal(matrix: torch.Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> torch.Tensor:
    """About U V^T where the matrix is U S V^T, by a quintic Newton-Schulz iteration.

    Args:
        matrix: (M, N).
        dtype: of the products; bfloat16 is enough.
        steps: of the iteration.

    Returns:
        (M, N) of `dtype`; singular values roughly in 0.7 to 1.2. A matrix of zeros stays zero.
    """
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for `matrices`, AdamW for `others`.

    Args:
        matrices: weights of two or more dimensions.
        others: biases, gains, the classifier's last layer.
        lr: of the matrices, whose update has a spectral norm near 1.
        other_lr: of the others, at the same point of the schedule.
        momentum: of Muon.
        weight_decay: of the matrices, times the learning rate (Loshchilov & Hutter 2019).
        dtype: of the iteration's products.
    """

    def __init__(
        self,
        matrices: Iterable[torch.Tensor],
        others: Iterable[torch.Tensor],
        *,
        lr: float,
        other_lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        groups = [
            {"params": list(matrices), "share": 1.0, "momentum": momentum, "weight_decay": weight_decay},
            {"params": list(others), "share": other_lr / lr, "betas": (0.9, 0.999), "eps": 1e-8},
        ]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        matrices, others = self.param_groups
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                self._muon(parameter, parameter.grad, matrices)
        for parameter in others["params"]:
            if parameter.grad is not None:
                self._adam(parameter, parameter.grad, others)

    def _muon(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(group["momentum"]).add_(grad)
        ahead = torch.add(grad, momentum, alpha=group["momentum"]).flatten(1)
        update = orthogonal(ahead, self._dtype).reshape(parameter.shape)
        rate = group["lr"] * math.sqrt(max(1.0, ahead.shape[0] / ahead.shape[1]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _adam(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state, (first, second), rate = self.state[parameter], group["betas"], group["lr"] * group["share"]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        state["mean"].lerp_(grad, 1 - first)
        state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
        count = state["step"].item()
        spread = (state["square"] / (1 - second**count)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], spread, value=-rate / (1 - first**count))
