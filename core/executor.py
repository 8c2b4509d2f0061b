"""One rank: loads the model, runs steps, owns everything that lives on the device."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import torch

from core.batch import BatchState, Draws, StepBatch, StepInputs, StepShape
from core.device_memory import explain_out_of_memory
from core.errors import PlanError
from core.graphs import StepGraph, StepGraphs, decode_shapes, in_order_of_need, prompt_shapes
from core.interfaces import KVCacheSpec, SupportsQuantizedKV, SupportsSamplerCapture
from core.kv_capacity import Needs, count_kv_blocks, free_bytes, peak_bytes
from core.model.decoder import make_decoder
from core.model.kv_scales import KVScales, needs_scales
from core.model.layer_store import LayerStore
from core.model.weights import load_dummy, load_weights
from core.sampling import LogprobTensors, SampleRows, gather_logprobs
from core.step import NO_TOKEN, PromptLogprobs, RowEntry, StepPlan, StepResult, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from core.assemble import Parts
    from core.plan import Plan
    from core.sampling import Sampled

log = structlog.get_logger(__name__)

_LOAD_KNOBS: Final = "--tensor-parallel-size, --quantization or --cpu-offload-gb"
_STEP_KNOBS: Final = "a lower --max-num-batched-tokens or --max-num-seqs"
_CACHE_KNOBS: Final = "a lower --gpu-memory-utilization or --num-kv-blocks, or --enforce-eager"
_LOGIT_ROWS = 256  # prompt positions whose logits exist at one time


@dataclass(slots=True)
class _Chunk:
    """Log-probabilities of a chunk of one prompt."""

    index: int
    """Of the scheduled row."""
    first: int
    """Position of the first token that it predicts."""
    token_ids: list[int]
    num_top: int
    tensors: LogprobTensors


@dataclass(slots=True)
class _Launched:
    """A step whose results may still be on their way to the host."""

    plan: StepPlan
    sampling: list[int] = field(default_factory=list)
    """Indices of the scheduled rows that sample."""
    tokens: torch.Tensor | None = None
    logprobs: LogprobTensors | None = None
    prompt_logprobs: list[_Chunk] = field(default_factory=list)
    entries: dict[int, RowEntry] = field(default_factory=dict)
    """Of the sampling rows that asked for log-probabilities, by index of the scheduled row: the row
    may belong to another request when the step comes back."""
    done: torch.cuda.Event | None = None
    error: Exception | None = None


class TorchExecutor:
    """Fulfils `core.interfaces.Executor` on one device with plain torch.

    Where several ranks run a model, each has one of these, and all are given the same plans.  The
    first rank of the last stage samples; results of the others hold no tokens.

    :param plan: the resolved plan.
    :param parts: attention backend, quantization scheme, sampler and the links to other ranks, built
        from the same plan.
    """

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self.device = torch.device(parts.device or plan.device)
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        is_cpu = self.device.type == "cpu"
        self.max_in_flight = plan.config.max_in_flight or (1 if is_cpu else 2)
        self._plan = plan
        self._share = plan.shares[parts.rank]
        self._tensor = parts.tensor
        self._pipeline = parts.pipeline
        self._rank = parts.rank
        self._is_sampling = self._share.tensor_rank == 0
        # With one stage its own ranks embed what they draw; with several, tokens come with the plan.
        self._shares_tokens = parts.tensor is not None and parts.pipeline is None
        self._attention = parts.attention
        self._kv_scales = self._make_kv_scales()
        self._sampler = parts.sampler
        self._entries: dict[int, RowEntry] = {}  # who sits in each row
        self._launched: deque[_Launched] = deque()
        self._has_failed = False  # on one of several ranks: others wait where this one did not get to
        offloaded = plan.offloaded_layers(parts.rank)
        self._decoder = make_decoder(
            plan.model,
            scheme=parts.scheme,
            attention=parts.attention,
            dtype=self.dtype,
            device=self.device,
            max_len=plan.max_model_len,
            share=self._share,
            tensor=parts.tensor,
            store=LayerStore(offloaded, self.device) if offloaded else None,
        )
        self._state = self._make_state(plan.max_model_len)
        self._graphs: StepGraphs | None = None

    # --- start ---

    def load(self, report: Callable[[int, int], None], /) -> None:
        """Bring the weights to the device."""
        with (
            self._as_current_device(),
            explain_out_of_memory(self.device, "loading the weights", _LOAD_KNOBS),
        ):
            self._load(report)

    def _load(self, report: Callable[[int, int], None]) -> None:
        config = self._plan.config
        if config.load_format == "dummy":
            load_dummy(self._decoder, config.seed)
        else:
            load_weights(
                self._decoder,
                self._plan.model_path,
                device=self.device,
                report=report,
                revision=config.revision,
                kv_scales=self._kv_scales,
            )

    def kv_capacity(self) -> int:
        """Measure how many KV blocks fit, the null block included.

        :raises CapacityError: not even one sequence of the context length that was asked for fits.
        """
        with (
            self._as_current_device(),
            explain_out_of_memory(self.device, "running the largest step", _STEP_KNOBS),
        ):
            block_bytes = self._attention.cache_bytes_per_block(self._cache_spec(1))
            share = self._plan.config.gpu_memory_utilization
            return count_kv_blocks(
                self._plan, block_bytes, lambda: free_bytes(self.device, share, self._measure_needs)
            )

    def allocate(self, num_blocks: int, /) -> None:
        """Allocate the KV cache and the rows' state, for sequences that this cache can hold."""
        with (
            self._as_current_device(),
            explain_out_of_memory(self.device, "allocating the KV cache", _CACHE_KNOBS),
        ):
            self._allocate(num_blocks)

    def _allocate(self, num_blocks: int) -> None:
        max_model_len = self._plan.fit_model_len(num_blocks)
        if max_model_len < self._plan.max_model_len:
            self._decoder.limit_length(max_model_len)
        self._state = self._make_state(max_model_len)
        self._attention.allocate_cache(self._cache_spec(num_blocks))
        if self._kv_scales is not None and isinstance(self._attention, SupportsQuantizedKV):
            self._attention.set_kv_scales(self._kv_scales.keys, self._kv_scales.values)
        self._allocate_sampler(max_model_len)
        self._graphs = self._make_graphs()
        if self._graphs is not None:
            self._graphs.capture_first()

    def _allocate_sampler(self, max_model_len: int) -> None:
        self._sampler.allocate(
            self._plan.config.max_num_seqs + 1,  # one for the padding of captured steps
            self._plan.model.vocab_size,
            max_model_len,
            self.device,
        )

    def close(self) -> None:
        """Forget the steps in flight, and give the memory of graphs back."""
        self._launched.clear()
        self._entries.clear()
        self._graphs = None

    def _make_state(self, max_model_len: int) -> BatchState:
        return BatchState(
            self._plan.config.max_num_seqs, max_model_len, self._plan.block_size, self.device
        )

    def _make_kv_scales(self) -> KVScales | None:
        """Make room for the scales of a quantized KV cache.

        :raises PlanError: the attention backend cannot keep one.
        """
        name = self._plan.kv_cache_dtype
        if not needs_scales(getattr(torch, name)):
            return None
        if not isinstance(self._attention, SupportsQuantizedKV):
            backend = self._plan.choices["attention"].name
            raise PlanError(
                [f"attention {backend}: --kv-cache-dtype {name} needs a backend with set_kv_scales"]
            )
        return KVScales.ones(self._share, self.device)

    def _cache_spec(self, num_blocks: int) -> KVCacheSpec:
        model = self._plan.model
        return KVCacheSpec(
            num_layers=self._share.layers.size,
            num_blocks=num_blocks,
            block_size=self._plan.block_size,
            num_kv_heads=self._share.kv_heads.size,
            head_dim=model.head_dim,
            dtype=getattr(torch, self._plan.kv_cache_dtype),
            device=self.device,
        )

    def _measure_needs(self) -> Needs:
        """Run the largest step and capture the largest graphs, with a cache for nobody."""
        config = self._plan.config
        self._attention.allocate_cache(self._cache_spec(2))
        allocate_sampler = partial(self._allocate_sampler, self._plan.max_model_len)
        graphs = self._make_graphs()
        if graphs is None:
            allocate_sampler()
        else:  # or what is measured would compile one by one
            graphs.compile(allocate_sampler, self._run_largest_step)
        return Needs(
            activations=peak_bytes(self.device, self._run_largest_step),
            graphs=0 if graphs is None else graphs.measure(),
            sampler=self._sampler.memory_bytes(
                config.max_num_seqs + 1, self._plan.model.vocab_size, self.device
            ),
        )

    @torch.inference_mode()
    def _run_largest_step(self) -> None:
        config = self._plan.config
        count = min(config.max_num_batched_tokens, self._plan.max_model_len)
        num_rows = min(config.max_num_seqs, max(1, config.max_num_batched_tokens // count))
        plan = StepPlan(
            0,
            rows=list(range(num_rows)),
            starts=[0] * num_rows,
            counts=[count] * num_rows,
            samples=[False] * num_rows,
        )
        shape = StepShape(plan.num_tokens, num_rows, 0)
        inputs = StepInputs(shape, self.device)
        inputs.upload(self._state.describe(plan, shape))
        stream = self._forward(self._state.make_batch(inputs, plan))
        if self._decoder.is_last:
            self._logits(stream[: config.max_num_seqs])

    # --- steps ---

    def submit(self, plan: StepPlan, /) -> None:
        """Launch one step; what it raises is raised by `collect`."""
        launched = _Launched(plan)
        self._launched.append(launched)
        if self._has_failed:  # its collectives would meet those of the step that has failed
            launched.error = RuntimeError("not run: this rank has failed in an earlier step")
            return
        try:
            with (
                torch.inference_mode(),
                self._as_current_device(),
                explain_out_of_memory(self.device, f"step {plan.step}", _STEP_KNOBS),
            ):
                self._launch(launched)
        except Exception as error:  # noqa: BLE001  kept for collect, so that steps stay in order
            launched.error = error
            self._has_failed = self._tensor is not None or self._pipeline is not None

    def collect(self) -> StepResult:
        """Wait for the oldest step in flight."""
        launched = self._launched.popleft()
        if launched.error is not None:
            raise launched.error
        if launched.done is not None:
            launched.done.synchronize()
        return _to_result(launched)

    def work_idle(self) -> bool:
        """Capture one more graph; whether there are more to capture."""
        with self._as_current_device():
            return self._graphs is not None and self._graphs.capture_next()

    def _as_current_device(self) -> AbstractContextManager[object]:
        """Make the device the current one, where Triton launches, whatever thread this is."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _launch(self, launched: _Launched) -> None:
        plan = launched.plan
        if plan.drawn is not None:
            self._state.store(*torch.tensor(plan.drawn).to(self.device, non_blocking=True).unbind())
        for entry in plan.added:
            self._entries[entry.row] = entry
            self._sampler.add(entry)
        self._state.update(plan)
        graph = self._find_graph(plan)
        if graph is not None:
            self._replay(launched, graph)
        else:
            self._run_eagerly(launched)
        if self.device.type == "cuda":
            launched.done = torch.cuda.Event()
            launched.done.record(torch.cuda.current_stream(self.device))

    def _find_graph(self, plan: StepPlan) -> StepGraph | None:
        if self._graphs is None or self._wants_prompt_logprobs(plan):
            return None
        return self._graphs.find(_shape_of(plan))

    def _wants_prompt_logprobs(self, plan: StepPlan) -> bool:
        """Whether the stream of tokens that do not draw is wanted too."""
        rows = plan.rows[plan.num_decodes :]
        return any(self._entries[row].params.prompt_logprobs is not None for row in rows)

    def _replay(self, launched: _Launched, graph: StepGraph) -> None:
        """Run a step through its graph."""
        plan, inputs = launched.plan, graph.inputs
        if self._graphs is None:
            raise RuntimeError("there are no graphs")
        inputs.upload(self._state.describe(plan, inputs.shape))
        launched.sampling = _sampling_rows(plan)
        count = len(launched.sampling)
        row_list = [plan.rows[index] for index in launched.sampling]
        key = self._capture_key(row_list) if count else None
        tokens = self._graphs.replay(graph, key)
        if tokens is not None:
            launched.tokens = self._to_host(tokens[:count])
        elif count:
            self._launch_sampling(launched, inputs.draws.first(count), graph.stream)

    def _capture_key(self, row_list: Sequence[int]) -> Hashable | None:
        sampler = self._sampler
        return sampler.capture_key(row_list) if isinstance(sampler, SupportsSamplerCapture) else None

    def _run_eagerly(self, launched: _Launched) -> None:
        plan = launched.plan
        launched.sampling = _sampling_rows(plan)
        shape = _shape_of(plan)
        if self._graphs is not None:
            shape = self._graphs.pad_draws(shape)
        inputs = StepInputs(shape, self.device)
        inputs.upload(self._state.describe(plan, shape))
        draws = inputs.draws
        wants_all = self._wants_prompt_logprobs(plan)
        stream = self._forward(
            self._state.make_batch(inputs, plan), None if wants_all else draws.tokens
        )
        if not self._decoder.is_last:
            launched.sampling = []
            return
        if wants_all:
            self._launch_prompt_logprobs(launched, stream)
            stream = stream if draws.tokens is None else stream[draws.tokens]
        if launched.sampling:
            self._launch_sampling(launched, draws.first(len(launched.sampling)), stream)

    def _forward(self, batch: StepBatch, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layers.

        :param wanted: [N] int64, which of the T tokens are to be scored; `None` for all.
        """
        meta = self._attention.prepare(batch)
        stream = batch.token_ids
        if self._pipeline is not None and not self._decoder.is_first:
            shape = (batch.num_tokens, self._plan.model.hidden_size)
            stream = self._pipeline.recv(torch.empty(shape, dtype=self.dtype, device=self.device))
        wanted = wanted if self._decoder.is_last else None
        stream = self._decoder.forward(stream, batch.positions, meta, wanted)
        if self._pipeline is not None and not self._decoder.is_last:
            self._pipeline.send(stream)
        return stream

    def _logits(self, stream: torch.Tensor) -> torch.Tensor:
        """Score the whole vocabulary: [N, V], complete on the rank that samples."""
        logits = self._decoder.logits(stream)
        if self._tensor is None:
            return logits
        stage = self._rank - self._share.tensor_rank
        shares = self._plan.shares[stage : stage + self._tensor.size]
        return self._tensor.gather(logits, [share.vocab.size for share in shares])

    def _launch_sampling(self, launched: _Launched, draws: Draws, stream: torch.Tensor) -> None:
        """Draw a token for each of the rows that sample.

        :param stream: [N, hidden], of each row's last token; what lies behind them is padding.
        """
        rows, positions = draws.rows, draws.positions
        row_list = [launched.plan.rows[index] for index in launched.sampling]
        logits = self._logits(stream)[: len(rows)]
        if not self._is_sampling:
            if self._shares_tokens:
                self._state.store(rows, positions, self._share_tokens(torch.empty_like(rows)))
            launched.sampling = []
            return
        sampled: Sampled = self._sampler.sample(logits, SampleRows(rows, positions, row_list))
        tokens = self._share_tokens(sampled.tokens) if self._shares_tokens else sampled.tokens
        self._state.store(rows, positions, tokens)
        launched.tokens = self._to_host(sampled.tokens)
        if sampled.logprobs is not None:
            launched.logprobs = LogprobTensors(*map(self._to_host, sampled.logprobs))
            for index, row in zip(launched.sampling, row_list, strict=True):
                if self._entries[row].params.logprobs is not None:
                    launched.entries[index] = self._entries[row]

    def _share_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give the drawn tokens to the ranks that will embed them."""
        return tokens if self._tensor is None else self._tensor.broadcast(tokens)

    def _launch_prompt_logprobs(self, launched: _Launched, stream: torch.Tensor) -> None:
        plan, offset = launched.plan, 0
        for index, (row, first) in enumerate(zip(plan.rows, plan.starts, strict=True)):
            entry, count = self._entries[row], plan.counts[index]
            num_top = entry.params.prompt_logprobs
            if num_top is not None:
                # Position p predicts the token at p + 1, which must still be part of the prompt.
                last = min(first + count, entry.num_prompt - 1)
                targets = entry.token_ids[first + 1 : last + 1]
                if targets:
                    tensors = self._logprobs_of(
                        stream[offset : offset + len(targets)], targets, num_top
                    )
                    chunk = _Chunk(index, first + 1, targets, num_top, tensors)
                    launched.prompt_logprobs.append(chunk)
            offset += count

    def _logprobs_of(self, stream: torch.Tensor, targets: list[int], num_top: int) -> LogprobTensors:
        """Report on some positions; their logits exist for a few of them at a time only."""
        token_ids = torch.tensor(targets).to(self.device, non_blocking=True)
        parts = [
            gather_logprobs(self._logits(rows), ids, num_top)
            for rows, ids in zip(stream.split(_LOGIT_ROWS), token_ids.split(_LOGIT_ROWS), strict=True)
        ]
        return LogprobTensors(
            *(self._to_host(torch.cat(columns)) for columns in zip(*parts, strict=True))
        )

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    # --- graphs ---

    def _make_graphs(self) -> StepGraphs | None:
        """Prepare to capture steps, or say why not."""
        if self.device.type != "cuda":
            return None
        objections = self._graph_objections()
        if objections:
            log.info("no CUDA graphs", because=objections)
            return None
        sampler = self._sampler
        keys = sampler.capture_keys() if isinstance(sampler, SupportsSamplerCapture) else []
        config = self._plan.config
        decodes = decode_shapes(config.max_num_seqs)
        prompts = prompt_shapes(config.max_num_seqs, config.max_num_batched_tokens)
        return StepGraphs(
            in_order_of_need(decodes, prompts),
            self.device,
            keys=keys,
            run=self._run_captured,
            score=self._logits,
            draw=self._draw_captured,
        )

    def _graph_objections(self) -> list[str]:
        objections = []
        if self._plan.config.enforce_eager:
            objections.append("--enforce-eager")
        if self._plan.world_size > 1:
            objections.append("several ranks run the model")
        if self._plan.offloaded_layers(self._rank):
            objections.append("some layers lie in the host's memory")
        if not getattr(self._attention, "can_capture", False):
            backend = self._plan.choices["attention"].name
            objections.append(f"attention {backend} cannot be captured")
        return objections

    def _run_captured(self, inputs: StepInputs) -> torch.Tensor:
        return self._forward(self._state.make_batch(inputs), inputs.draws.tokens)

    def _draw_captured(self, inputs: StepInputs, stream: torch.Tensor, key: Hashable) -> torch.Tensor:
        if not isinstance(self._sampler, SupportsSamplerCapture):
            raise TypeError("this sampler cannot be captured")
        _, rows, positions = inputs.draws
        logits = self._logits(stream)
        tokens = self._sampler.sample_captured(logits, SampleRows(rows, positions, ()), key)
        self._state.store(rows, positions, tokens)
        return tokens


def _sampling_rows(plan: StepPlan) -> list[int]:
    """Return the indices of the scheduled rows that sample."""
    return [index for index, samples in enumerate(plan.samples) if samples]


def _shape_of(plan: StepPlan) -> StepShape:
    return StepShape(plan.num_tokens, len(plan.rows), sum(plan.samples))


def _to_result(launched: _Launched) -> StepResult:
    plan = launched.plan
    tokens = [NO_TOKEN] * len(plan.rows)
    if launched.tokens is not None:
        for index, token in zip(launched.sampling, launched.tokens.tolist(), strict=True):
            tokens[index] = token
    result = StepResult(plan.step, tokens, {}, {})
    if launched.logprobs is not None:
        drawn = [tokens[index] for index in launched.sampling]
        entries = {index: entry.params.logprobs or 0 for index, entry in launched.entries.items()}
        records = _records(launched.logprobs, drawn, [entries.get(i, 0) for i in launched.sampling])
        for index, record in zip(launched.sampling, records, strict=True):
            if index in entries:
                result.logprobs[index] = record
    for chunk in launched.prompt_logprobs:
        records = _records(chunk.tensors, chunk.token_ids, [chunk.num_top] * len(chunk.token_ids))
        result.prompt_logprobs[chunk.index] = PromptLogprobs(chunk.first, list(records))
    return result


def _records(
    tensors: LogprobTensors, token_ids: list[int], num_top: list[int]
) -> Iterator[TokenLogprobs]:
    columns = (tensor.tolist() for tensor in tensors)
    for token_id, count, logprob, rank, top_ids, top_logprobs in zip(
        token_ids, num_top, *columns, strict=True
    ):
        yield TokenLogprobs(token_id, logprob, rank, top_ids[:count], top_logprobs[:count])
