"""What runs a layer: five callables, in the plainest form or in the best fused one that all parts have.

A fused form spans parts that do not know one another, so each offers its side as an optional Protocol
of `core.interfaces`, and this file puts them together.  Where a part objects, the plain form stands in,
and its reasons are kept for whoever wants to know what holds a step back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from core.interfaces import SupportsGate, SupportsNorm, SupportsResidual, SupportsRotary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from core.model.layers import Build, DecoderLayer, StepContext


class LayerSlots(NamedTuple):
    """The five callables of one layer, filled once.

    `stream` is opaque to the loop: plain slots pass a tensor [T, hidden], a chain of fused slots may
    pass more, if all its members agree.  Between `attend` and `out` of the last layer the loop selects
    tokens, so there it is a tensor, and so is what `attend` returns.
    """

    qkv: Callable[[Any], Any]
    """(stream) -> what `attend` takes."""
    attend: Callable[[Any, StepContext], Any]
    """(qkv, context) -> what `out` takes."""
    out: Callable[[Any, Any], Any]
    """(attended, stream) -> stream."""
    up: Callable[[Any], Any]
    """(stream) -> what `down` takes."""
    down: Callable[[Any, Any], Any]
    """(inner, stream) -> stream."""


@dataclass(frozen=True, slots=True)
class SlotForm:
    """How a slot was filled."""

    slot: str
    form: str
    """What is fused, such as `norm + linear`, or `plain`."""
    objections: tuple[str, ...] = ()
    """Why it is not fused."""

    @property
    def is_fused(self) -> bool:
        """Whether it is more than the plain form."""
        return not self.objections


def compose_layer(layer: DecoderLayer, build: Build) -> tuple[LayerSlots, tuple[SlotForm, ...]]:
    """Fill the slots of a layer with the best forms that its parts have."""
    filled = (
        _compose_qkv(layer, build),
        _compose_attend(layer, build),
        _compose_out(layer, build),
        _compose_up(layer, build),
        _compose_down(layer, build),
    )
    return LayerSlots(*(call for call, _ in filled)), tuple(form for _, form in filled)


def _compose_qkv(layer: DecoderLayer, build: Build) -> tuple[Callable[..., Any], SlotForm]:
    linear: object = layer.qkv_proj
    norm = layer.input_norm
    if not isinstance(linear, SupportsNorm):
        return layer.qkv, _plain("qkv", [_lacks(linear, "forward_norm")])
    objections = linear.norm_objections(build.spec.norm_style)
    if objections:
        return layer.qkv, _plain("qkv", objections)

    def qkv(stream: torch.Tensor) -> torch.Tensor:
        return linear.forward_norm(stream, norm.weight, norm.eps)

    return qkv, SlotForm("qkv", "norm + linear")


def _compose_attend(layer: DecoderLayer, build: Build) -> tuple[Callable[..., Any], SlotForm]:
    attention, spec = build.attention, layer.attention_spec
    if not isinstance(attention, SupportsRotary):
        return layer.attend, _plain("attend", [_lacks(attention, "forward_rotary")])
    if build.spec.qk_norm:
        return layer.attend, _plain("attend", ["queries and keys are normalized before the rotation"])
    key = layer.rope
    objections = attention.rotary_objections(spec, build.spec.ropes[key].rotary_dim)
    if objections:
        return layer.attend, _plain("attend", objections)

    def attend(qkv: torch.Tensor, context: StepContext) -> torch.Tensor:
        table = context.tables[key]
        return attention.forward_rotary(qkv, table.cos, table.sin, spec, context.meta)

    return attend, SlotForm("attend", "rotary + KV write + attention")


def _compose_out(layer: DecoderLayer, build: Build) -> tuple[Callable[..., Any], SlotForm]:
    linear: object = layer.out_proj
    objections = _residual_objections(linear, build)
    if objections or not isinstance(linear, SupportsResidual):
        return layer.out, _plain("out", objections)
    return linear.forward_residual, SlotForm("out", "linear + residual")


def _compose_up(layer: DecoderLayer, build: Build) -> tuple[Callable[..., Any], SlotForm]:
    linear: object = layer.gate_up_proj
    norm = layer.mlp_norm
    if not isinstance(linear, SupportsGate):
        return layer.up, _plain("up", [_lacks(linear, "forward_gate")])
    objections = linear.gate_objections(build.spec.norm_style, build.spec.activation)
    if objections:
        return layer.up, _plain("up", objections)

    def up(stream: torch.Tensor) -> torch.Tensor:
        return linear.forward_gate(stream, norm.weight, norm.eps)

    return up, SlotForm("up", "norm + linear + activation + gate")


def _compose_down(layer: DecoderLayer, build: Build) -> tuple[Callable[..., Any], SlotForm]:
    linear: object = layer.down_proj
    objections = _residual_objections(linear, build)
    if objections or not isinstance(linear, SupportsResidual):
        return layer.down, _plain("down", objections)
    return linear.forward_residual, SlotForm("down", "linear + residual")


def _residual_objections(linear: object, build: Build) -> list[str]:
    objections = []
    if not build.is_whole:
        objections.append("ranks sum up their parts before they join the stream")
    if build.spec.post_norms:
        objections.append("a norm lies between the layer and the stream")
    if not isinstance(linear, SupportsResidual):
        return [*objections, _lacks(linear, "forward_residual")]
    return [*objections, *linear.residual_objections()]


def _plain(slot: str, objections: Iterable[str]) -> SlotForm:
    return SlotForm(slot, "plain", tuple(objections))


def _lacks(part: object, method: str) -> str:
    return f"{type(part).__name__} has no {method}"
