"""How much errors of weights cost: the Hessian of a layer's output error, and what GPTQ needs of it."""

from __future__ import annotations

from typing import Final

import torch

from core.errors import CheckpointError

TOKENS_AT_ONCE: Final = 4096
MAX_DAMPINGS: Final = 4
"""How often damping is raised tenfold before a Hessian is given up."""


def find_hessian(inputs: torch.Tensor) -> torch.Tensor:
    """Compute 2 XᵀX / T: the same solution as of 2 XᵀX, without sums that grow with the text.

    :param inputs: [T, inputs] floating.
    :return: [inputs, inputs] float32, or float64 of float64 inputs.
    """
    num_tokens, num_inputs = inputs.shape
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    hessian = torch.zeros((num_inputs, num_inputs), dtype=dtype, device=inputs.device)
    for chunk in inputs.split(TOKENS_AT_ONCE):
        x = chunk.to(dtype)
        hessian.addmm_(x.T, x, alpha=2 / max(num_tokens, 1))
    return hessian


def invert(hessian: torch.Tensor, damp_percent: float, name: str) -> torch.Tensor:
    """Decompose the inverse of a damped Hessian: H⁻¹ = UᵀU.

    Inputs that are always zero tell nothing; they get the mean of the diagonal, so that they neither
    disturb the others nor are disturbed.  With H = R Rᵀ, R upper triangular, U is the inverse of R, and
    R is the Cholesky factor of H with both orders reversed: the inverse of H itself is not needed.

    :param hessian: [inputs, inputs]; left as it is.
    :param damp_percent: added to the diagonal, as a share of its mean.
    :param name: of the layer, for the message.
    :return: U, upper triangular.
    :raises CheckpointError: the Hessian holds NaN, or no damping makes it positive definite.
    """
    diagonal = hessian.diagonal().flip(0)
    is_dead = diagonal == 0
    mean = diagonal.new_ones(()) if is_dead.all() else diagonal[~is_dead].mean()
    for attempt in range(MAX_DAMPINGS):
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(mean.where(is_dead, mean * damp_percent * 10**attempt))
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0 and lower.isfinite().all():
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            upper: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return upper
    raise CheckpointError(
        f"the Hessian of {name} is not positive definite with a damping of {damp_percent} x "
        f"10^{MAX_DAMPINGS - 1} of its diagonal; look for inputs of the layer that are not finite, or "
        f"raise --damp-percent"
    )


def find_order(hessian: torch.Tensor) -> torch.Tensor:
    """Order inputs by how much their errors cost, most first: [inputs] int64."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)
