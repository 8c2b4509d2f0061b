"""Rounding weights one input at a time, so that later inputs make up for the errors of earlier ones.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
arXiv:2210.17323.  For inputs X, [T, inputs], a change D of the weights changes the outputs by
sum d (XᵀX) dᵀ over the rows d of D: a quadratic form with the Hessian H = 2 XᵀX.  Once an input has
been rounded, the best change of the remaining ones is known; all steps together are a Cholesky
decomposition of the inverse of H.  What weights are rounded to is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS_AT_ONCE: Final = 4096
MAX_DAMPINGS: Final = 4
"""How often damping is raised tenfold before a Hessian is given up."""
BLOCK_SIZE: Final = 128
"""Inputs after which the errors of a block reach all later inputs, in one product."""

RoundInput = Callable[[int, torch.Tensor], torch.Tensor]
"""Rounds the weights of one input, whose index is given, and keeps what is to be stored of them.

It is called for each input in order, with [n, N]: in the first row the weights of that input, in the
others those of later inputs of the block, as they are by now.  It returns what the stored weights
stand for: [N], in the same dtype.
"""


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


def round_inputs(
    rest: torch.Tensor, upper: torch.Tensor, round_input: RoundInput, group_size: int | None = None
) -> None:
    """Round a matrix, one input after the other.

    When the first input of a group is rounded, what errors of earlier groups do to the group is all
    in `rest`, or in what `round_input` is given if the group ends in the same block.

    :param rest: [N, inputs] floating; changes: what is left of it is to be rounded.
    :param upper: see `invert`; in the dtype and order of `rest`.
    :param round_input: see `RoundInput`.
    :param group_size: inputs that share what is chosen when the first of them is rounded; `None` where
        nothing is chosen on the way.  Divides the inputs.
    """
    num_inputs = rest.shape[1]
    for block in _blocks(num_inputs, group_size or num_inputs):
        errors = _round_block(rest, upper, round_input, block)
        rest[:, block.stop :] -= errors.T @ upper[block, block.stop :]


def _round_block(
    rest: torch.Tensor, upper: torch.Tensor, round_input: RoundInput, block: slice
) -> torch.Tensor:
    """Round a block of inputs one by one.

    :return: [block, N]: errors in units of U's diagonal, by which later inputs are to change.
    """
    later = rest[:, block].T.contiguous()  # inputs first: each is read and changed at once
    upper = upper[block, block]
    errors = torch.empty_like(later)
    for index, weights in enumerate(later):
        rounded = round_input(block.start + index, later[index:])
        errors[index] = (weights - rounded) / upper[index, index]
        later[index + 1 :].addr_(upper[index, index + 1 :], errors[index], alpha=-1)
    return errors


def _blocks(num_inputs: int, group_size: int) -> Iterator[slice]:
    """Cut inputs into blocks: whole groups, or whole parts of one.

    Then all weights of a group have their final values when its scale is chosen.
    """
    step = BLOCK_SIZE
    if group_size <= BLOCK_SIZE:
        step = BLOCK_SIZE // group_size * group_size
    elif group_size < num_inputs:
        step = next(size for size in range(BLOCK_SIZE, 0, -1) if group_size % size == 0)
    for start in range(0, num_inputs, step):
        yield slice(start, min(start + step, num_inputs))
