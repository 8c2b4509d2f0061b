"""Conformance of strategies that spread a model over ranks: how they divide it, and what joins ranks.

Subclass the class of your axis in a test module and give it the descriptor::

    class TestAcmeTensor(TensorParallelConformance):
        entry = acme_parallel.ENTRY

`divide` is tried on models of all shapes, and models are run in its parts, whose threads stand for
ranks.  What the factory makes runs on real ranks: processes of this machine, joined by
torch.distributed before the factory is called, as the engine does it.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from core.errors import ConfigError
from core.registry import ParallelEntry, PipelineParallelEntry, TensorParallelEntry
from core.sharding import Span
from core.testing.collectives import PIPELINE_LAWS, TENSOR_LAWS, Law, judge, merge
from core.testing.divided_model import model_specs, run_divided, run_whole, save_random_weights
from core.testing.rank_processes import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.model.spec import ModelSpec
    from core.sharding import Share

Parts = TypeVar("Parts")
TOLERANCE: Final = 1e-9
"""Largest error of logits in float64."""


def _name_of(law: Law) -> str:
    return law.__name__


class ParallelConformance:
    """What strategies of all axes have in common; subclass one of the two below."""

    backend: ClassVar[str] = "gloo"
    """Of torch.distributed."""
    device: ClassVar[str] = "cpu"
    """With `cuda` each rank gets a device of its own."""
    sizes: ClassVar[tuple[int, int]] = (2, 2)
    """Ranks of a stage and stages that the laws of what joins ranks are tried on."""
    max_ranks: ClassVar[int] = 12
    """Most parts that a model is divided into."""
    settings: ClassVar[hypothesis_settings] = hypothesis_settings(
        max_examples=100, deadline=None, suppress_health_check=list(HealthCheck)
    )

    def descriptor(self) -> ParallelEntry:
        """Return the descriptor under test."""
        entry: ParallelEntry | None = getattr(self, "entry", None)
        if entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry")
        return entry

    def check(
        self, law: Callable[[ModelSpec, int, int], None], *, max_examples: int | None = None
    ) -> None:
        """Try a law on generated models, numbers of parts, and steps by which to cut."""
        count = min(self.settings.max_examples, max_examples or self.settings.max_examples)

        @hypothesis_settings(self.settings, max_examples=count)
        @given(
            model=model_specs(), size=st.integers(1, self.max_ranks), step=st.sampled_from([1, 8, 16])
        )
        def attempt(model: ModelSpec, size: int, step: int) -> None:
            law(model, size, step)

        attempt()

    def check_on_ranks(self, law: Law, laws: tuple[Law, ...]) -> None:
        """Judge one law on real ranks, which are started once for all of them."""
        factory = self.descriptor().factory
        failures = judge_on_ranks(factory, laws, self.sizes, self.device, self.backend)
        name = law.__name__
        assert name not in failures, f"{name}: {failures[name]}"

    def _check_model(self, model: ModelSpec, stages: Sequence[Sequence[Share]], what: str) -> None:
        """Compare a model that was divided with the whole one."""
        tokens = [(7 * index + 3) % model.vocab_size for index in range(9)]
        with tempfile.TemporaryDirectory() as folder:
            path = save_random_weights(model, Path(folder), seed=1)
            whole = run_whole(model, path, tokens)
            divided = run_divided(model, path, stages, tokens)
        error = (divided - whole).abs().max() / whole.abs().max()
        assert error <= TOLERANCE, f"{what}: logits differ by {float(error):.2g} of their size"


class TensorParallelConformance(ParallelConformance):
    """The tests of a way to divide layers; subclass it and set `entry`."""

    entry: ClassVar[TensorParallelEntry | None] = None

    @pytest.mark.parametrize("law", TENSOR_LAWS, ids=_name_of)
    def test_what_joins_ranks(self, law: Law) -> None:
        """The laws of `core.testing.collectives`, on real ranks."""
        self.check_on_ranks(law, TENSOR_LAWS)

    def divide(self, model: ModelSpec, size: int, step: int) -> Sequence[Share] | None:
        """Divide, or return `None` where that is refused."""
        entry = self.descriptor()
        assert isinstance(entry, TensorParallelEntry)
        return _divide(lambda: entry.divide(model, size, step), size)

    def test_one_rank_holds_everything(self) -> None:
        """A single rank is never refused."""

        def law(model: ModelSpec, _size: int, step: int) -> None:
            shares = self.divide(model, 1, step)
            assert shares is not None, "a model on a single rank is refused"
            assert list(shares) == [model.whole_share()], f"{shares} is not the whole model"

        self.check(law)

    def test_some_model_can_be_divided(self) -> None:
        """Powers of two of everything on two ranks."""

        def law(model: ModelSpec, _size: int, step: int) -> None:
            even = replace(model, num_heads=8, num_kv_heads=4, intermediate_size=64, vocab_size=256)
            assert self.divide(even, 2, step) is not None, "an even model on two ranks is refused"

        self.check(law, max_examples=5)

    def test_too_many_ranks_are_refused(self) -> None:
        """Each needs a query head at least; the error says how many ranks were asked for."""

        def law(model: ModelSpec, size: int, step: int) -> None:
            size += model.num_heads
            shares = self.divide(model, size, step)
            assert shares is None, f"{size} ranks get parts of {model.num_heads} query heads"

        self.check(law)

    def test_every_rank_gets_a_share(self) -> None:
        """In order, with the layers of the whole model, and the same at every call."""

        def law(model: ModelSpec, size: int, step: int) -> None:
            shares = self.divide(model, size, step)
            if shares is None:
                return
            assert len(shares) == size, f"{len(shares)} shares for {size} ranks"
            numbers = [share.tensor_rank for share in shares]
            assert numbers == list(range(size)), f"tensor_rank runs {numbers}"
            layers = {share.layers for share in shares}
            assert layers == {Span(0, model.num_layers)}, f"layers {layers} of {model.num_layers}"
            again = self.divide(model, size, step)
            assert again == shares, "the same question gets two answers"

        self.check(law)

    def test_everything_is_on_one_rank(self) -> None:
        """Query heads, MLP features and tokens: each exactly once, some on every rank.

        Tokens in order of rank, since logits are joined so.
        """

        def law(model: ModelSpec, size: int, step: int) -> None:
            for name, total, is_ordered in (
                ("heads", model.num_heads, False),
                ("inner", model.intermediate_size, False),
                ("vocab", model.vocab_size, True),
            ):
                spans = [getattr(share, name) for share in self.divide(model, size, step) or ()]
                if spans:
                    problem = find_gap(spans if is_ordered else sorted(spans), total)
                    assert problem is None, f"{name} {[tuple(span) for span in spans]}: {problem}"

        self.check(law)

    def test_heads_are_where_their_key_value_heads_are(self) -> None:
        """Each rank's query heads use its key-value heads, each of these equally many, in order."""

        def law(model: ModelSpec, size: int, step: int) -> None:
            group = model.num_heads // model.num_kv_heads
            for rank, share in enumerate(self.divide(model, size, step) or ()):
                what = (
                    f"rank {rank} with heads {tuple(share.heads)} and kv_heads {tuple(share.kv_heads)}"
                )
                assert share.kv_heads.size > 0, f"{what} has no key-value head"
                local_group, rest = divmod(share.heads.size, share.kv_heads.size)
                assert not rest, f"{what}: heads are no multiple of kv_heads"
                for index, head in enumerate(range(*share.heads)):
                    found = share.kv_heads.start + index // local_group
                    assert found == head // group, (
                        f"{what}: head {head} attends with key-value head {found}, but in the whole "
                        f"model with {head // group}"
                    )

        self.check(law)

    def test_cuts_fall_on_steps(self) -> None:
        """Where the MLP has a multiple of the step for every rank."""

        def law(model: ModelSpec, size: int, step: int) -> None:
            even = replace(model, intermediate_size=2 * size * step)
            for share in self.divide(even, size, step) or ():
                assert not share.inner.start % step, (
                    f"{tuple(share.inner)} of {even.intermediate_size} MLP features begins at no "
                    f"multiple of {step}, by which the weights are best cut"
                )

        self.check(law)

    def test_divided_models_equal_the_whole(self) -> None:
        """The parts of a model compute together what the model computes."""

        def law(model: ModelSpec, size: int, step: int) -> None:
            shares = self.divide(model, size, step)
            if shares is not None:
                self._check_model(model, [shares], f"{size} ranks")

        self.check(law, max_examples=15)


class PipelineParallelConformance(ParallelConformance):
    """The tests of a way to divide the layers among stages; subclass it and set `entry`."""

    entry: ClassVar[PipelineParallelEntry | None] = None
    plugin_settings: ClassVar[Any] = None
    """The third argument of `divide`."""

    @pytest.mark.parametrize("law", PIPELINE_LAWS, ids=_name_of)
    def test_what_joins_ranks(self, law: Law) -> None:
        """The laws of `core.testing.collectives`, on real ranks."""
        self.check_on_ranks(law, PIPELINE_LAWS)

    def divide(self, model: ModelSpec, size: int) -> Sequence[Span] | None:
        """Divide, or return `None` where that is refused."""
        entry = self.descriptor()
        assert isinstance(entry, PipelineParallelEntry)
        return _divide(lambda: entry.divide(model, size, self.plugin_settings), size)

    def test_one_stage_holds_all_layers(self) -> None:
        """A single stage is never refused."""

        def law(model: ModelSpec, _size: int, _step: int) -> None:
            stages = self.divide(model, 1)
            assert stages is not None, "a single stage is refused"
            assert list(stages) == [Span(0, model.num_layers)], f"{stages} are not all layers"

        self.check(law)

    def test_too_many_stages_are_refused(self) -> None:
        """Each needs a layer at least; the error says how many were asked for."""

        def law(model: ModelSpec, size: int, _step: int) -> None:
            size += model.num_layers
            stages = self.divide(model, size)
            assert stages is None, f"{size} stages get parts of {model.num_layers} layers"

        self.check(law)

    def test_every_layer_is_in_one_stage(self) -> None:
        """In order, some in every stage, and the same at every call."""

        def law(model: ModelSpec, size: int, _step: int) -> None:
            stages = self.divide(model, size)
            if stages is None:
                return
            assert len(stages) == size, f"{len(stages)} spans for {size} stages"
            problem = find_gap(stages, model.num_layers)
            assert problem is None, f"layers {[tuple(span) for span in stages]}: {problem}"
            assert self.divide(model, size) == stages, "the same question gets two answers"

        self.check(law)

    def test_divided_models_equal_the_whole(self) -> None:
        """Stage after stage computes what the model computes."""

        def law(model: ModelSpec, size: int, _step: int) -> None:
            size = min(size, model.num_layers)
            stages = self.divide(model, size)
            if stages is not None:
                shares = [[replace(model.whole_share(), layers=layers)] for layers in stages]
                self._check_model(model, shares, f"{size} stages")

        self.check(law, max_examples=10)


@functools.cache
def judge_on_ranks(
    factory: Callable[..., Any],
    laws: tuple[Law, ...],
    sizes: tuple[int, int],
    device: str,
    backend: str,
) -> dict[str, str]:
    """Start ranks, try laws on all of them, and return what went wrong by name of the law."""
    num_tensor, num_stages = sizes
    told = run_ranks(num_tensor * num_stages, judge, factory, laws, sizes, device, backend=backend)
    return merge(told)


def find_gap(spans: Sequence[Span], total: int) -> str | None:
    """Say where spans, one after the other, are not a division of 0 .. total - 1 into parts."""
    end = 0
    for span in spans:
        if span.size < 1:
            return f"{tuple(span)} is empty"
        if span.start != end:
            return f"{tuple(span)} begins at {span.start}, where {end} is next"
        end = span.stop
    return None if end == total else f"they end at {end} of {total}"


def _divide(divide: Callable[[], Parts], size: int) -> Parts | None:
    """Divide, or return `None` where that is refused with an error that says the size."""
    try:
        return divide()
    except ConfigError as error:
        told = str(error)
    except Exception as error:
        raise AssertionError(f"{error!r} is raised where ConfigError is expected") from error
    assert str(size) in told, f"the error does not say that {size} were asked for: {told}"
    return None
