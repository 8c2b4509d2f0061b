"""Logits -> tokens, batched, all on the device.

Order of the stages: allowed, banned and biased tokens; `min_tokens`; penalties; temperature; min-p;
top-k; top-p; draw.  No stage reads a value back to the host, and no shape depends on data, so a step
can be captured in a CUDA graph.  A stage runs when a row of the step wants it, which the host knows
from flags; for the other rows its parameters are neutral and it gives back the very same bits, so
that what a request draws never depends on what shares its batch.
"""

from __future__ import annotations

import enum
import functools
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from core.counter_rng import exponentials
from core.step import BAD_LOGITS

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from core.request import SamplingParams
    from core.step import RowEntry

__all__ = [
    "INT_COLUMNS",
    "REAL_COLUMNS",
    "LogprobTensors",
    "RowParams",
    "SampleRows",
    "Sampled",
    "SamplingState",
    "Stage",
    "TorchSampler",
    "gather_logprobs",
]

# Elements of [N, V] that are worked on at once: bounds the workspace, and on a CPU keeps it in cache.
_CHUNK_ELEMENTS: Final = {"cpu": 2**17}
_CHUNK_ELEMENTS_DEFAULT: Final = 2**22
_WORKSPACE_BYTES: Final = 64  # per element of a chunk, at the peak
_TINY: Final = 1e-30  # nothing divides by less
_MASS_SCALE: Final = 2.0**40  # with it 2^22 weights of at most 1 can be summed in int64
_DIGIT_BITS: Final = 10
_DIGITS: Final = (20, 10, 0)  # shifts of the digits of a float32 in [0, 1], whose bits are below 2^30


class Stage(enum.IntFlag):
    """What a row asks of a step, beyond taking the likeliest token."""

    BIAS = enum.auto()
    MIN_TOKENS = enum.auto()
    PENALTIES = enum.auto()
    RANDOM = enum.auto()
    MIN_P = enum.auto()
    TOP_K = enum.auto()
    TOP_P = enum.auto()
    LOGPROBS = enum.auto()


_CAPTURED_STAGES: Final = Stage.RANDOM | Stage.MIN_P | Stage.TOP_K | Stage.TOP_P
"""Those whose parameters lie in tables that never move."""


@dataclass(frozen=True, slots=True)
class SampleRows:
    """The N rows of a step that draw a token."""

    rows: torch.Tensor
    """[N] int64, rows of the persistent state."""
    positions: torch.Tensor
    """[N] int64, of the token being drawn: the number of tokens before it."""
    row_list: Sequence[int]
    """`rows` once more, on the host; empty in a step that is being captured."""

    def part(self, part: slice) -> SampleRows:
        """Select some of the N."""
        return SampleRows(self.rows[part], self.positions[part], self.row_list[part])


class LogprobTensors(NamedTuple):
    """Natural log-probabilities of M positions, under the raw logits."""

    token_logprobs: torch.Tensor
    """[M] float32, of the token at hand."""
    ranks: torch.Tensor
    """[M] int64; 1 for the likeliest token of the vocabulary, equals share the better rank."""
    top_ids: torch.Tensor
    """[M, K] int64, likeliest first, among equals the lower id first."""
    top_logprobs: torch.Tensor
    """[M, K] float32."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step drew."""

    tokens: torch.Tensor
    """[N] int64; `BAD_LOGITS` where a NaN, an infinity or nothing but bans left no distribution."""
    logprobs: LogprobTensors | None = None
    """Of all N rows, with as many alternatives as the most demanding row wants, or `None` if none
    asked.  Meaningless for rows with `BAD_LOGITS`."""


class RowParams(NamedTuple):
    """Parameters of the rows of a step, each [N, 1]: float32, but `top_p` float64; then int64."""

    top_p: torch.Tensor
    temperature: torch.Tensor
    min_p: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor
    top_k: torch.Tensor
    is_greedy: torch.Tensor
    seed: torch.Tensor
    num_prompt: torch.Tensor
    min_tokens: torch.Tensor
    stages: torch.Tensor
    """What the host knows as `SamplingState.stages`, a `Stage` for each row."""


REAL_COLUMNS: Final = RowParams._fields[:6]
"""Of `SamplingState.reals`."""
INT_COLUMNS: Final = RowParams._fields[6:]
"""Of `SamplingState.ints`."""


class SamplingState:
    """Sampling parameters by row, on the device; written when a request enters a row.

    `reals` [rows, 6] float64 and `ints` [rows, 6] int64 are the tables behind `params`, for kernels that
    look up for themselves; they never move.

    The matrices that only some requests need are allocated with the first such request.  They keep
    their place then, except for the padded stop ids, which move when a longer list arrives: a
    captured step that includes `Stage.MIN_TOKENS` has to be captured again after that.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.token_ids = torch.arange(vocab_size, device=device)
        self._shape = (max_rows, vocab_size)
        self._device = device
        self._stages = [0] * max_rows
        self._num_logprobs = [-1] * max_rows
        self.reals = torch.zeros((max_rows, len(REAL_COLUMNS)), dtype=torch.float64, device=device)
        self.ints = torch.zeros((max_rows, len(INT_COLUMNS)), dtype=torch.int64, device=device)
        self._bias: torch.Tensor | None = None
        self._stop_ids: torch.Tensor | None = None
        self._num_outputs: torch.Tensor | None = None
        self._in_prompt: torch.Tensor | None = None

    def add(self, entry: RowEntry) -> None:
        """Make a row the request's, whatever the row held before."""
        row, params = entry.row, entry.params
        stages = _stages_of(entry, self.vocab_size)
        self._stages[row] = int(stages)
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.reals[row].copy_(self._upload(_reals_of(params), torch.float64), non_blocking=True)
        ints = _ints_of(entry, stages, self.vocab_size)
        self.ints[row].copy_(self._upload(ints, torch.int64), non_blocking=True)
        self._set_bias(row, params, wanted=Stage.BIAS in stages)
        if Stage.MIN_TOKENS in stages:
            self._set_stop_ids(row, entry.stop_ids)
        if Stage.PENALTIES in stages:
            self._set_counts(entry)

    def stages(self, row_list: Sequence[int]) -> Stage:
        """Name every stage that at least one of these rows wants; on the host."""
        return Stage(functools.reduce(operator.or_, map(self._stages.__getitem__, row_list), 0))

    def num_logprobs(self, row_list: Sequence[int]) -> int:
        """Return the most alternatives that one of these rows wants; -1 if none wants any report."""
        return max(map(self._num_logprobs.__getitem__, row_list), default=-1)

    def params(self, rows: torch.Tensor) -> RowParams:
        """Look up the parameters of some rows."""
        reals = self.reals.index_select(0, rows).unsqueeze(-1)
        ints = self.ints.index_select(0, rows).unsqueeze(-1)
        return RowParams(reals[:, 0], *reals.float().unbind(1)[1:], *ints.unbind(1))

    def bias(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, V] float32 to add to the logits: -inf for what is banned or not allowed."""
        return self._matrix("_bias", torch.float32).index_select(0, rows)

    def stop_ids(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, K] int64; a row of fewer than K repeats one, a row without `min_tokens` holds any."""
        return self._padded_stop_ids(1).index_select(0, rows)

    def num_outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, V] int32, how often each token was generated; only rows with penalties are kept up."""
        return self._matrix("_num_outputs", torch.int32).index_select(0, rows)

    def in_prompt(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, V] bool, whether the prompt holds each token; only rows with penalties are kept up."""
        return self._matrix("_in_prompt", torch.bool).index_select(0, rows)

    def count(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count one generated token per row; those below 0 are none."""
        index = rows * self.vocab_size + tokens.clamp(min=0)
        counts = self._matrix("_num_outputs", torch.int32).view(-1)
        counts.scatter_add_(0, index, (tokens >= 0).int())

    def _set_bias(self, row: int, params: SamplingParams, *, wanted: bool) -> None:
        if not wanted and self._bias is None:
            return
        bias = self._matrix("_bias", torch.float32)[row].zero_()
        if params.allowed_token_ids is not None:
            bias.fill_(-math.inf).index_fill_(0, self._upload_ids(params.allowed_token_ids), 0.0)
        if params.logit_bias:
            values = self._upload(list(params.logit_bias.values()), torch.float32)
            bias.index_add_(0, self._upload_ids(list(params.logit_bias)), values)
        if params.banned_token_ids:
            bias.index_fill_(0, self._upload_ids(params.banned_token_ids), -math.inf)

    def _set_stop_ids(self, row: int, stop_ids: Sequence[int]) -> None:
        table = self._padded_stop_ids(len(stop_ids))
        padding = [stop_ids[0]] * (table.shape[1] - len(stop_ids))
        table[row].copy_(self._upload_ids([*stop_ids, *padding]), non_blocking=True)

    def _set_counts(self, entry: RowEntry) -> None:
        tokens = self._upload_ids(entry.token_ids)
        in_prompt = self._matrix("_in_prompt", torch.bool)[entry.row].zero_()
        in_prompt.index_fill_(0, tokens[: entry.num_prompt], value=True)
        outputs = tokens[entry.num_prompt :]
        counts = self._matrix("_num_outputs", torch.int32)[entry.row].zero_()
        counts.scatter_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))

    def _matrix(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        matrix: torch.Tensor | None = getattr(self, name)
        if matrix is None:
            matrix = torch.zeros(self._shape, dtype=dtype, device=self._device)
            setattr(self, name, matrix)
        return matrix

    def _padded_stop_ids(self, width: int) -> torch.Tensor:
        table = self._stop_ids
        if table is None or table.shape[1] < width:
            size = 1 << (width - 1).bit_length()  # doubling, so that it seldom moves
            grown = torch.zeros((self._shape[0], size), dtype=torch.int64, device=self._device)
            if table is not None:
                grown[:, : table.shape[1]] = table
                grown[:, table.shape[1] :] = table[:, :1]
            self._stop_ids = table = grown
        return table

    def _upload_ids(self, ids: Sequence[int]) -> torch.Tensor:
        return self._upload(ids, torch.int64)

    def _upload(self, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)


class TorchSampler:
    """The built-in sampler: plain torch operations, for any device."""

    state: SamplingState

    def memory_bytes(self, max_rows: int, vocab_size: int, device: torch.device, /) -> int:
        """Bound what this sampler may ever allocate, lazy matrices and workspace included."""
        by_token = max_rows * vocab_size * (4 + 4 + 1)  # bias, output counts, prompt presence
        chunk = min(max_rows, _rows_per_chunk(device, vocab_size)) * vocab_size
        return by_token + max_rows * 16 * 1024 + vocab_size * 8 + chunk * _WORKSPACE_BYTES

    @torch.inference_mode()
    def allocate(
        self, max_rows: int, vocab_size: int, _max_model_len: int, device: torch.device, /
    ) -> None:
        """Allocate the state of all rows, or allocate it anew."""
        self.state = SamplingState(max_rows, vocab_size, device)

    @torch.inference_mode()
    def add(self, entry: RowEntry, /) -> None:
        """Make a row the request's, whatever the row held before."""
        self.state.add(entry)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: SampleRows, /) -> Sampled:
        """Draw one token per row.

        Counts the drawn tokens for later penalties, so each position is to be drawn once.

        :param logits: [N, V] floating; left as they are.
        :param rows: the N rows, each at most once where it has penalties.
        """
        num_top = self.state.num_logprobs(rows.row_list)
        parts = [
            self._sample_part(
                logits[part].float(),
                rows.part(part),
                self.state.stages(rows.row_list[part]),
                num_top,
            )
            for part in _parts(logits)
        ]
        tokens = torch.cat([sampled.tokens for sampled in parts])
        logprobs = [sampled.logprobs for sampled in parts if sampled.logprobs is not None]
        return Sampled(tokens, _concatenate(logprobs) if logprobs else None)

    def capture_keys(self) -> list[Hashable]:
        """List the keys that are worth capturing beforehand: greedy rows, then any random ones."""
        return [Stage(0), Stage.RANDOM]

    def capture_key(self, row_list: Sequence[int], /) -> Hashable | None:
        """Return the stages that these rows want, if none of them reads state that may move."""
        stages = self.state.stages(row_list)
        return None if stages & ~_CAPTURED_STAGES else stages

    def sample_captured(self, logits: torch.Tensor, rows: SampleRows, key: Hashable, /) -> torch.Tensor:
        """Draw as `sample` does for rows with that key.

        :raises TypeError: this is no key of `capture_key`.
        """
        if not isinstance(key, Stage):
            raise TypeError(f"{key!r} is no Stage")
        parts = [
            self._sample_part(logits[part].float(), rows.part(part), key, -1).tokens
            for part in _parts(logits)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _sample_part(self, raw: torch.Tensor, rows: SampleRows, stages: Stage, num_top: int) -> Sampled:
        params = self.state.params(rows.rows)
        logits = self._shape(raw, rows, params, stages)
        best, tokens = logits.max(dim=-1, keepdim=True)
        if Stage.RANDOM in stages:
            drawn = self._draw(logits - best, rows, params, stages)
            tokens = torch.where(params.is_greedy.bool(), tokens, drawn)
        # The maximum is a NaN if any logit is, and -inf if every token is out of the question.
        tokens = torch.where(best.isfinite(), tokens, BAD_LOGITS).squeeze(1)
        if Stage.PENALTIES in stages:
            self.state.count(rows.rows, tokens)
        if num_top < 0:
            return Sampled(tokens)
        return Sampled(tokens, _logprobs_part(raw, tokens.clamp(min=0), num_top))

    def _shape(
        self, logits: torch.Tensor, rows: SampleRows, params: RowParams, stages: Stage
    ) -> torch.Tensor:
        """Apply what comes before the temperature.  Only adds, so that no NaN is covered up."""
        if Stage.BIAS in stages:
            logits = logits + self.state.bias(rows.rows)
        if Stage.MIN_TOKENS in stages:
            num_generated = rows.positions[:, None] - params.num_prompt
            ban = torch.where(num_generated < params.min_tokens, -math.inf, 0.0)
            stop_ids = self.state.stop_ids(rows.rows)
            logits = logits.scatter_add(1, stop_ids, ban.to(logits.dtype).expand_as(stop_ids))
        if Stage.PENALTIES in stages:
            num_outputs = self.state.num_outputs(rows.rows)
            logits = _penalize(logits, num_outputs, self.state.in_prompt(rows.rows), params)
        return logits

    def _draw(
        self, shifted: torch.Tensor, rows: SampleRows, params: RowParams, stages: Stage
    ) -> torch.Tensor:
        """Draw from softmax(shifted / temperature), cut down by min-p, top-k and top-p.

        An exponential race: the token with the greatest weight / Exp(1) is drawn with a
        probability proportional to its weight, so nothing has to be summed up or normalised.

        :param shifted: [N, V] with a maximum of 0 in each row; overwritten.
        :return: [N, 1] int64.
        """
        # Weights relative to the likeliest token, whose weight is exactly 1.
        weights = shifted.div_(params.temperature).exp_()
        if Stage.MIN_P in stages:
            weights.masked_fill_(weights < params.min_p, 0.0)
        if Stage.TOP_K in stages:
            weights.masked_fill_(~_top_k_mask(weights, params.top_k), 0.0)
        if Stage.TOP_P in stages:
            weights.masked_fill_(~_top_p_mask(weights, params.top_p), 0.0)
        noise = exponentials(params.seed.squeeze(1), rows.positions, self.state.token_ids)
        return weights.div_(noise).argmax(dim=-1, keepdim=True)


@torch.inference_mode()
def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> LogprobTensors:
    """Report the log-probabilities of given tokens, as of a prompt's, and of the likeliest ones.

    Beyond its result it needs the workspace of one chunk, however many positions there are.

    :param logits: [M, V] floating, raw; left as they are.
    :param token_ids: [M] int64.
    :param num_top: how many of the likeliest, 0 to V.
    """
    parts = _parts(logits)
    return _concatenate([_logprobs_part(logits[part], token_ids[part], num_top) for part in parts])


def _stages_of(entry: RowEntry, vocab_size: int) -> Stage:
    params = entry.params
    is_random = not params.is_greedy
    wanted = {
        Stage.BIAS: params.logit_bias
        or params.banned_token_ids
        or params.allowed_token_ids is not None,
        Stage.MIN_TOKENS: params.min_tokens > 0 and entry.stop_ids,
        Stage.PENALTIES: params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0,
        Stage.RANDOM: is_random,
        Stage.MIN_P: is_random and params.min_p > 0.0,
        Stage.TOP_K: is_random and 0 < params.top_k < vocab_size,
        Stage.TOP_P: is_random and params.top_p < 1.0,
        Stage.LOGPROBS: params.logprobs is not None,
    }
    return functools.reduce(operator.or_, (stage for stage in wanted if wanted[stage]), Stage(0))


def _reals_of(params: SamplingParams) -> list[float]:
    """Fill the float columns of `RowParams`; what a greedy row does not want is neutral."""
    is_greedy = params.is_greedy
    return [
        1.0 if is_greedy else params.top_p,
        max(params.temperature, _TINY),
        0.0 if is_greedy else params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        max(params.repetition_penalty, _TINY),
    ]


def _ints_of(entry: RowEntry, stages: Stage, vocab_size: int) -> list[int]:
    return [
        entry.params.top_k if Stage.TOP_K in stages else vocab_size,
        entry.params.is_greedy,
        entry.seed,
        entry.num_prompt,
        entry.params.min_tokens if Stage.MIN_TOKENS in stages else 0,
        int(stages),
    ]


def _penalize(
    logits: torch.Tensor, num_outputs: torch.Tensor, in_prompt: torch.Tensor, params: RowParams
) -> torch.Tensor:
    was_output = num_outputs > 0
    scaled = torch.where(logits > 0, logits / params.repetition, logits * params.repetition)
    logits = torch.where(in_prompt | was_output, scaled, logits)
    logits = logits - params.frequency * num_outputs
    return logits - params.presence * was_output


def _top_k_mask(weights: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    return _prefix_mask(weights, torch.ones_like(weights, dtype=torch.int64), top_k)


def _top_p_mask(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    # In fixed point, because integers have one sum, whatever the order in which a device adds.
    mass = (weights * _MASS_SCALE).long()
    total = mass.sum(dim=-1, keepdim=True)
    target = (top_p * total).ceil().long().minimum(total)
    return _prefix_mask(weights, mass, target) | (top_p >= 1.0)


def _prefix_mask(weights: torch.Tensor, measure: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mark the fewest tokens, likeliest first and lower ids first, whose measure reaches a target.

    A radix select instead of a sort: a histogram of the measure over the ten highest bits of the
    weights finds the bits of the last weight to keep, then a second and a third the rest of it.

    :param weights: [N, V] float32 in [0, 1]; there the order of floats is that of their bits.
    :param measure: [N, V] int64, not negative.
    :param target: [N, 1] int64, at most the row's sum of `measure`.
    :return: [N, V] bool.
    """
    last = (1 << _DIGIT_BITS) - 1
    bits = weights.view(torch.int32).long()
    cut = torch.zeros_like(target)
    for shift in _DIGITS:
        falling = last - ((bits >> shift) & last)
        candidates = torch.where(bits >> (shift + _DIGIT_BITS) == cut, measure, 0)
        histogram = measure.new_zeros((len(bits), last + 1)).scatter_add_(1, falling, candidates)
        reached = histogram.cumsum(dim=-1)
        # A row with NaNs must at least stay within the histogram.
        digit = (reached < target).sum(dim=-1, keepdim=True).clamp_(max=last)
        target = target - (reached - histogram).gather(1, digit)
        cut = cut << _DIGIT_BITS | last - digit
    tied = torch.where(bits == cut, measure, 0)
    return (bits > cut) | ((bits == cut) & (tied.cumsum(dim=-1) - tied < target))


def _logprobs_part(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> LogprobTensors:
    logits = logits.float()
    norm = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None])
    ranks = (logits > chosen).sum(dim=-1) + 1
    top_ids = _top_ids(logits, num_top)
    top_logprobs = logits.gather(1, top_ids) - norm
    return LogprobTensors((chosen - norm).squeeze(1), ranks, top_ids, top_logprobs)


def _top_ids(logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """Find the likeliest tokens, lower ids first among equals, where `topk` leaves the choice open."""
    if num_top == 0:
        return logits.new_empty((len(logits), 0), dtype=torch.int64)
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = (bits ^ ((bits >> 31) & (2**31 - 1))).long()
    falling_ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return (ordered << 32 | falling_ids).topk(num_top, dim=-1).indices


def _parts(logits: torch.Tensor) -> Iterator[slice]:
    size = _rows_per_chunk(logits.device, logits.shape[1])
    return (slice(start, start + size) for start in range(0, max(len(logits), 1), size))


def _rows_per_chunk(device: torch.device, vocab_size: int) -> int:
    width = max(vocab_size, 1 << _DIGIT_BITS)  # histograms count as well
    return max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_DEFAULT) // width)


def _concatenate(parts: list[LogprobTensors]) -> LogprobTensors:
    return LogprobTensors(*(torch.cat(column) for column in zip(*parts, strict=True)))
