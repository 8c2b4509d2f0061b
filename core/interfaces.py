"""The Protocols that the engine's loop calls, and the small records that they exchange.

Hooks build these objects once; from then on only these methods run.  Arguments are positional.
Each docstring says what a method mutates, its shapes and units, and what it raises.  Assembly
checks an object against its Protocol once, with `inspect.signature`; the loop checks nothing.

Shapes: T tokens of a step, S scheduled rows, H query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from core.sharding import Span

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    import anyio
    import torch

    from core.batch import StepBatch
    from core.events import Event
    from core.request import FinishReason, Request
    from core.sampling import Sampled, SampleRows
    from core.sharding import Cut
    from core.step import PromptLogprobs, RowEntry, StepPlan, StepResult, TokenLogprobs


# --- KV bookkeeping (host only) -------------------------------------------------------------------


@runtime_checkable
class BlockAllocator(Protocol):
    """Hands out fixed-size blocks of KV positions by number, and counts who holds them.

    Block 0 is the null block: never handed out, never freed, a placeholder for padding.
    """

    num_blocks: int
    """Blocks of the pool, the null block included."""

    @property
    def num_free(self) -> int:
        """Blocks without a holder: what `allocate` can still give."""

    def allocate(self, count: int, /) -> list[int]:
        """Take `count` blocks off the free queue, least recently released first; one holder each.

        :raises OutOfBlocksError: fewer are free; nothing was taken then.
        """

    def share(self, block_ids: Sequence[int], /) -> None:
        """Add one holder to each block.  A free block leaves the free queue, its content intact.

        :raises IntegrityError: an id is out of range or the null block; nothing changed then.
        """

    def release(self, block_ids: Sequence[int], /, *, keep: bool = True) -> None:
        """Take one holder from each block, in the given order; without holders it becomes free.

        :param keep: its content may be wanted again, so it is reused last; `False` puts it first.
        :raises IntegrityError: a block would lose more holders than it has (one block twice in
            one call counts twice); nothing changed then.
        """

    def num_holders(self, block_id: int, /) -> int:
        """Holders of one block."""

    def check_integrity(self) -> None:
        """Check that free + held = total and no block is in two places.

        :raises IntegrityError: naming the law that does not hold.
        """


@dataclass(frozen=True, slots=True)
class KVStats:
    """A snapshot of the KV pool."""

    num_blocks: int
    """Usable blocks (the null block is not)."""
    num_used: int
    """Held by at least one request."""
    num_cached: int
    """Without holder, but with content that a later prompt can reuse."""
    num_queries: int
    """Prompt tokens looked up in the prefix cache since the start."""
    num_hits: int
    """Prompt tokens found there."""
    num_evictions: int
    fragmentation: float
    """Share of the held positions that no token occupies, 0 to 1: the unfilled ends of tables."""

    @property
    def usage(self) -> float:
        """Share of the pool that requests hold, 0 to 1."""
        return self.num_used / self.num_blocks if self.num_blocks else 0.0


@runtime_checkable
class KVCache(Protocol):
    """Block tables and prefix cache.  The only writer of `block_ids` and `block_digests`."""

    block_size: int
    """Positions in one block."""
    num_blocks: int
    """Usable blocks, without the null block."""
    record_events: bool
    """Whether to keep events for `drain_events`; set once, before the first request."""

    def lookup(self, request: Request, /) -> int:
        """Give a request without blocks the longest cached prefix; return its length in tokens.

        At most `num_tokens - 1`, so that something is left to compute, and a multiple of the block
        size.  Appends the shared blocks to its table; does not touch its progress counters.
        """

    def reserve(self, request: Request, num_tokens: int, /) -> bool:
        """Grow the table until it covers `num_tokens` positions; whether there were enough blocks.

        Appends only: a block in a table never moves.  On `False` nothing has changed.
        """

    def commit(self, request: Request, /) -> None:
        """Publish every full block within `request.num_confirmed` for reuse by later prompts."""

    def free(self, request: Request, /) -> None:
        """Release all blocks of a request and empty its table; harmless without blocks."""

    def can_ever_fit(self, num_tokens: int, /) -> bool:
        """Whether the whole pool, all to itself, would hold `num_tokens` positions."""

    def reset(self) -> None:
        """Forget all cached prefixes, for example because a failed step half-wrote them."""

    def stats(self) -> KVStats:
        """Count right now."""

    def drain_events(self) -> list[Event]:
        """Return and forget the events since the last call; empty unless `record_events` was set."""

    def check_integrity(self, requests: Iterable[Request], /) -> None:
        """Check pool and cache against the tables of all requests that hold blocks.

        :raises IntegrityError: naming the law that does not hold.
        """


# --- the loop -------------------------------------------------------------------------------------


@dataclass(slots=True)
class StepOutputs:
    """What one step meant for its requests, as one record: parallel lists, not objects per token."""

    requests: list[Request] = field(default_factory=list)
    """Those that got a token, in scheduled order."""
    tokens: list[int] = field(default_factory=list)
    """One for each of `requests`."""
    finished: list[Request] = field(default_factory=list)
    """Those that ended in this step, with or without a last token."""
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    """By request id, for those that asked."""
    prompt_logprobs: dict[str, PromptLogprobs] = field(default_factory=dict)
    """By request id, for those that asked and whose prompt advanced."""
    errors: dict[str, str] = field(default_factory=dict)
    """By request id, for those that ended with an error."""


@runtime_checkable
class Scheduler(Protocol):
    """Decides what each step computes, and owns every request that has not ended."""

    record_events: bool
    """Whether to keep events for `drain_events`; set once, before the first request."""

    def add(self, request: Request, /) -> None:
        """Queue a legal request.

        :raises InvalidRequestError: its id is in use.
        :raises RequestTooLargeError: it could never fit into the pool.
        """

    def finish(self, request_id: str, reason: FinishReason, /) -> Request | None:
        """End a request from outside at any moment; its blocks are free when this returns.

        :return: the request, or `None` if there is none of that id (any more).
        """

    def plan(self) -> StepPlan | None:
        """Choose the next step, or `None` if nothing can be computed now.

        May be called again before the last result came back.
        """

    def apply(self, result: StepResult, /) -> StepOutputs:
        """Take in the result of the oldest plan not yet applied.

        Rows whose request has ended or was preempted and restarted since then are passed over.
        """

    def fail(self, error: str, /) -> StepOutputs:
        """End every request that the steps in flight scheduled, and forget those steps."""

    def restart(self) -> None:
        """Forget the steps in flight and recompute every running request: the KV cache was lost."""

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""

    @property
    def num_running(self) -> int:
        """Requests that hold a row."""

    @property
    def num_waiting(self) -> int:
        """Requests that hold none."""

    def drain_events(self) -> list[Event]:
        """Return and forget the events since the last call; empty unless `record_events` was set."""

    def open_requests(self) -> Iterable[Request]:
        """All requests that have not ended."""


@runtime_checkable
class Executor(Protocol):
    """Runs steps on devices.  Results come back in the order of submission.

    Two methods instead of one call per step, so that step n + 1 can be launched before the host
    has seen the result of step n.
    """

    max_in_flight: int
    """Steps that may be submitted and not yet collected; 1 means no overlap."""

    def load(self, report: Callable[[int, int], None], /) -> None:
        """Bring the weights to the device.

        :param report: called now and then with what is done and what there is to do, in any unit.
        :raises CheckpointError: the checkpoint does not hold what its config promises.
        """

    def kv_capacity(self) -> int:
        """Measure how many KV blocks fit, the null block included.  Call after `load`.

        :raises CapacityError: not even one sequence of the context length that the configuration
            asks for fits; without such a wish, not even one block.
        """

    def allocate(self, num_blocks: int, /) -> None:
        """Allocate the KV cache and warm up; the executor can step after this."""

    def submit(self, plan: StepPlan, /) -> None:
        """Launch one step."""

    def collect(self) -> StepResult:
        """Wait for the oldest step in flight.

        :raises Exception: whatever that step raised; the executor can go on afterwards.
        """

    def close(self) -> None:
        """Give everything back; harmless when called twice."""


@runtime_checkable
class SupportsRecovery(Protocol):
    """Optional: an executor that can lose its devices and get them back."""

    def recover(self) -> None:
        """Bring everything back to where `allocate` left it, with an empty KV cache.

        Called after `collect` has raised `DeviceLostError`; steps in flight are forgotten.

        :raises CytheraError: it cannot be brought back; the engine ends.
        """


# --- serving --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontend:
    """A surface for clients, as the server is to offer it."""

    routes: Sequence[Any]
    """Routes as the server takes them; `server.http` takes those of Starlette."""
    open_paths: frozenset[str] = frozenset()
    """Paths of routes that need no API key; all others do, once there is a key."""
    openapi: Mapping[str, Any] = field(default_factory=dict)
    """What it adds to `/openapi.json`: `paths` and `components`."""


@runtime_checkable
class Server(Protocol):
    """Carries front ends to clients over a socket that is open already."""

    async def serve(self, sock: socket.socket, stop: anyio.Event, grace: float, /) -> None:
        """Serve until `stop` is set, then accept nothing new and finish what is open.

        :param sock: bound and listening.
        :param grace: seconds that open requests get after `stop`; then they are cut off.
        """


# --- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The size of the device's KV cache."""

    num_layers: int
    num_blocks: int
    """The null block included."""
    block_size: int
    num_kv_heads: int
    """On this rank."""
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention computes: softmax(softcap(scale · q kᵀ) + mask) v."""

    layer: int
    """Index into the cache."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    """Query at position p sees keys at p - window < j <= p; `None` sees all j <= p."""
    softcap: float | None = None
    """Scores become softcap · tanh(score / softcap)."""


@runtime_checkable
class AttentionBackend(Protocol):
    """Writes keys and values to pages and attends over them.  Owns the device's KV cache."""

    def allocate_cache(self, spec: KVCacheSpec, /) -> None:
        """Allocate, or allocate anew, the pages of all layers."""

    def cache_bytes_per_block(self, spec: KVCacheSpec, /) -> int:
        """Bytes of one block over all layers; `spec.num_blocks` is ignored."""

    def prepare(self, batch: StepBatch, /) -> Any:
        """Compute what all layers of a step share; called once a step, result passed to `forward`."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        meta: Any,
        /,
    ) -> torch.Tensor:
        """Store k and v at the batch's slots, then attend.

        :param q: [T, H, D] after rotary embedding.
        :param k: [T, G, D] after rotary embedding.
        :param v: [T, G, D].
        :return: [T, H, D] in q's dtype.
        """


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear layer as the model sees it, before anybody decided how its weights are stored.

    A fused layer (qkv, gate_up) has several shards, stacked along the output dimension.  Where ranks
    share the layer, all sizes are those of one rank's part, and `cut` says which part that is.
    """

    name: str
    """Module path, such as `model.layers.0.self_attn.qkv_proj`."""
    in_features: int
    shards: tuple[tuple[str, int], ...]
    """(checkpoint prefix, output features) of each shard, for example
    `("model.layers.0.self_attn.q_proj", 4096)`."""
    bias: bool
    dtype: torch.dtype
    device: torch.device
    role: str
    """qkv, out, gate_up, down or lm_head."""
    cut: Cut | None = None
    """`None`: the whole layer."""

    @property
    def out_features(self) -> int:
        """Output features over all shards."""
        return sum(size for _, size in self.shards)

    @property
    def input_spans(self) -> tuple[Span, ...]:
        """Which input features of the whole layer these are."""
        return (Span(0, self.in_features) if self.cut is None else self.cut.inputs,)

    def output_spans(self, shard: int) -> tuple[Span, ...]:
        """Which output features of a whole shard these are."""
        return (Span(0, self.shards[shard][1]),) if self.cut is None else self.cut.outputs[shard]

    def rows(self, shard: int) -> slice:
        """Where a shard's output features are among those of the layer."""
        first = sum(size for _, size in self.shards[:shard])
        return slice(first, first + self.shards[shard][1])


@dataclass(frozen=True, slots=True)
class Axis:
    """What a dimension of a stored tensor runs along: this is how a rank finds its part of it."""

    along: Literal["in", "out"]
    """Input or output features."""
    step: int = 1
    """Features that one index stands for: 8 where eight are packed into one integer, 128 where so
    many share a scale."""
    shared: bool = False
    """Whether a cut may fall inside an index; each rank that touches the index then reads it whole,
    and `core.sharding.local_groups` tells which of its features belong to which of those it read."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a checkpoint has to hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    """One, or those that are accepted; `None` accepts any floating dtype."""
    axes: tuple[Axis | None, ...] = ()
    """One for each dimension; `None`, as for missing ones: every rank reads all of it."""
    optional: bool = False
    """Whether the checkpoint may do without."""
    can_broadcast: bool = False
    """Whether a dimension may have size 1, or be left out at the end, because one number stands for
    all along it: [], [1], [n] and [n, 1] are all fine for (n,).  Every rank reads that one."""


@runtime_checkable
class QuantScheme(Protocol):
    """How the weights of linear layers are stored and applied.

    A scheme knows nothing of ranks: it is given the sizes of one rank's part, and says in the `axes`
    of its tensors how a part is cut out of what is stored.
    """

    def make_linear(self, spec: LinearSpec, /) -> torch.nn.Module:
        """Make an empty module with `forward(x: [T, in_features]) -> [T, out_features]`."""

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        """Name the checkpoint tensors of one shard, by suffix (`weight`, `bias`, `qweight` …).

        Called with the spec of the whole layer (`cut` is `None`), for the shapes that are stored.
        """

    def load(
        self,
        module: torch.nn.Module,
        spec: LinearSpec,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        /,
    ) -> None:
        """Copy one shard's tensors, already on the device, into the module.

        :param spec: of this rank's part; the tensors are cut to it as their axes say.
        :param tensors: without the optional ones that the checkpoint does not hold, and without `bias`
            where another rank adds it.
        :raises CheckpointError: a value is impossible.
        """

    def finalize(self, module: torch.nn.Module, spec: LinearSpec, /) -> None:
        """Repack after all shards have been loaded, or after dummy weights have been filled in."""


@runtime_checkable
class TensorParallel(Protocol):
    """Joins the ranks that share each layer of one stage.

    All of them call the same methods in the same order.
    """

    size: int
    rank: int
    """Among the ranks of the stage."""

    def all_reduce(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Sum over the ranks; may work in place."""

    def gather(self, tensor: torch.Tensor, sizes: Sequence[int], /) -> torch.Tensor:
        """Join the ranks' parts along the last dimension, in order of rank.

        :param tensor: [N, sizes[rank]].
        :return: [N, sum of sizes] on rank 0; on the others anything of that shape.
        """

    def broadcast(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Give all ranks what rank 0 has; works in place on the others."""


@runtime_checkable
class PipelineParallel(Protocol):
    """Joins each rank to those that run the layers before and after its own."""

    size: int
    """Stages."""
    stage: int

    def send(self, tensor: torch.Tensor, /) -> None:
        """Give the stream [T, hidden] to the next stage; may return before it has arrived."""

    def recv(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Take the stream of the previous stage into `tensor`."""


@runtime_checkable
class Sampler(Protocol):
    """Turns logits into tokens, all on the device, and owns the sampling state of every row.

    What a request draws depends on its parameters, its seed, its tokens and the position, never on
    the rows that share a step with it.
    """

    def memory_bytes(self, max_rows: int, vocab_size: int, device: torch.device, /) -> int:
        """Bound what state and workspace may come to take, for whoever divides up the memory."""

    def allocate(
        self, max_rows: int, vocab_size: int, max_model_len: int, device: torch.device, /
    ) -> None:
        """Make the state of `max_rows` rows, or make it anew; nothing of an earlier one stays."""

    def add(self, entry: RowEntry, /) -> None:
        """Make a row the request's, whatever the row held before.

        Called before the first step that draws for the request.  After a preemption the entry's
        tokens include what had been generated, and penalties go on from there.
        """

    def sample(self, logits: torch.Tensor, rows: SampleRows, /) -> Sampled:
        """Draw one token per row, without waiting for the device.

        May update the state of these rows: each position of a request is drawn once.

        :param logits: [N, V] floating; left as they are.
        :param rows: which rows, and at which positions.
        :return: tokens [N] int64, `core.step.BAD_LOGITS` where there is nothing to draw from, and
            log-probabilities under the raw logits if any of the rows asked for them.
        """


@runtime_checkable
class SupportsSamplerCapture(Protocol):
    """Optional: the sampler can draw within a CUDA graph.

    What it decides on the host for the rows of a step is the *key* of the step.  A graph that was
    captured with a key serves every step with that key, whatever its rows.
    """

    def capture_keys(self) -> list[Hashable]:
        """List the keys that are worth capturing beforehand, the most frequent first.

        May be asked before `allocate`.
        """

    def capture_key(self, row_list: Sequence[int], /) -> Hashable | None:
        """Return the key of a step that draws for these rows; `None` if it cannot be captured."""

    def sample_captured(self, logits: torch.Tensor, rows: SampleRows, key: Hashable, /) -> torch.Tensor:
        """Draw as `sample` does, on the device alone.

        :param rows: with an empty `row_list`; rows beyond those of the batch are padding.
        :return: [N] int64.
        """


@runtime_checkable
class SupportsIdleWork(Protocol):
    """Optional: an executor that can prepare itself for steps to come while there is nothing to do."""

    def work_idle(self) -> bool:
        """Do a small piece of work; whether there is more.  Never called with steps in flight."""


@runtime_checkable
class SupportsQuantizedKV(Protocol):
    """Optional: the backend can keep keys and values in a narrower dtype than it computes with."""

    def set_kv_scales(self, k_scales: torch.Tensor, v_scales: torch.Tensor, /) -> None:
        """Take the factors by which stored values are multiplied when they are read.

        Called once, between `allocate_cache` and the first step.

        :param k_scales: [layers, G] float32, of the layers and heads on this rank.
        :param v_scales: [layers, G] float32.
        """


@runtime_checkable
class SupportsCudaGraph(Protocol):
    """Optional: the backend's `prepare` and `forward` can be captured in a CUDA graph.

    Both then only launch work on the device, whose extent depends on `num_tokens`, `num_rows` and on
    whether `num_decodes` is `num_rows`; never on `starts` and `counts`, which are empty in a captured
    step.  Rows whose length is 0 are padding, and so are tokens behind those of the last row: their
    slots lie in the null block, and what is computed for them does not matter.
    """

    can_capture: bool
    """Whether that holds for the cache that has been allocated."""


@runtime_checkable
class SupportsRotary(Protocol):
    """Optional: the backend rotates queries and keys where it reads and stores them anyway."""

    def rotary_objections(self, spec: AttentionSpec, rotary_dim: int, /) -> list[str]:
        """Every reason why it cannot do so for a layer; empty if it can."""

    def forward_rotary(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        spec: AttentionSpec,
        meta: Any,
        /,
    ) -> torch.Tensor:
        """Rotate queries and keys, store keys and values, then attend: `forward` after the rotation.

        :param qkv: [T, (H + 2 G) · D], contiguous; may be overwritten.
        :param cos: [L, R / 2] in qkv's dtype, by position; the two halves of the first R dimensions of
            a head form the pairs, the others pass through.
        :param sin: as `cos`.
        :return: [T, H · D] in qkv's dtype.
        """


# Fused forms of linear layers.  They are optional methods of the modules that `make_linear` returns;
# where they round differs from the plain forms, what they compute does not.


@runtime_checkable
class SupportsNorm(Protocol):
    """Optional: a linear layer that normalizes its input itself."""

    def norm_objections(self, style: str, /) -> list[str]:
        """Every reason why it cannot, for a style of `core.model.spec.NormStyle`; empty if it can."""

    def forward_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, /) -> torch.Tensor:
        """Apply to norm(x), with norm(x) = weight · x / rms(x).

        :param x: [T, in_features]; left as it is.
        :param weight: [in_features].
        :return: [T, out_features].
        """


@runtime_checkable
class SupportsGate(Protocol):
    """Optional: a gate_up layer that normalizes its input and applies activation and gate itself."""

    def gate_objections(self, style: str, activation: str, /) -> list[str]:
        """Every reason why it cannot, for a norm style and an activation of `core.model.spec`."""

    def forward_gate(self, x: torch.Tensor, weight: torch.Tensor, eps: float, /) -> torch.Tensor:
        """Compute activation(gate) · up, where [gate, up] is this layer applied to norm(x).

        :param x: [T, in_features]; left as it is.
        :param weight: [in_features], of the norm.
        :return: [T, out_features / 2].
        """


@runtime_checkable
class SupportsResidual(Protocol):
    """Optional: a linear layer that adds its result to the stream itself."""

    def residual_objections(self) -> list[str]:
        """Every reason why it cannot; empty if it can."""

    def forward_residual(self, x: torch.Tensor, residual: torch.Tensor, /) -> torch.Tensor:
        """Return residual + the layer applied to x.

        :param x: [T, in_features].
        :param residual: [T, out_features]; may be overwritten with the result.
        """


def missing_members(candidate: object, protocol: type) -> list[str]:
    """Every way in which `candidate` fails to look like `protocol`: one sentence each.

    Compares names, and for methods the number of positional arguments, with `inspect.signature`.
    """
    problems = []
    members = sorted(getattr(protocol, "__protocol_attrs__", None) or _protocol_members(protocol))
    for name in members:
        wanted = getattr(protocol, name, None)
        if not inspect.isfunction(wanted):
            if not hasattr(candidate, name):
                problems.append(f"attribute {name!r} is missing")
            continue
        method = getattr(candidate, name, None)
        if not callable(method):
            problems.append(f"method {name!r} is missing")
            continue
        num_args = len(inspect.signature(wanted).parameters) - 1  # without self
        keywords = {
            p.name: None
            for p in inspect.signature(wanted).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        try:
            inspect.signature(method).bind(*[None] * (num_args - len(keywords)), **keywords)
        except TypeError as error:
            problems.append(f"method {name!r} cannot be called as the contract says: {error}")
    return problems


def _protocol_members(protocol: type) -> set[str]:
    names: set[str] = set()
    for base in protocol.__mro__:
        if base in (object, Protocol) or not getattr(base, "_is_protocol", False):
            continue
        names |= {n for n in vars(base) if not n.startswith("_")}
        names |= {n for n in getattr(base, "__annotations__", {}) if not n.startswith("_")}
    return names
