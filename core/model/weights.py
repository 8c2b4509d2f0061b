"""Checkpoint -> device: safetensors only, mapped into memory and copied tensor by tensor.

Everything that can be wrong with a checkpoint is found from the headers of its files, before the
first byte of a weight is copied.
"""

from __future__ import annotations

import itertools
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from core.errors import CheckpointError
from core.interfaces import Axis, LinearSpec, TensorSpec
from core.model.decoder import EMBEDDING, HEAD
from core.model.kv_scales import is_about_cache, load_kv_scales
from core.sharding import Span, covering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from os import PathLike

    from torch import nn

    from core.model.decoder import Decoder, Section
    from core.model.kv_scales import KVScales
    from core.model.spec import ModelSpec

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
_HEAD: Final = f"{HEAD}.weight"
_EMBEDDING: Final = f"{EMBEDDING}.weight"
BIAS: Final = "bias"
"""Suffix of what a linear layer adds, in all formats."""
_HARMLESS_SUFFIX: Final = ".rotary_emb.inv_freq"  # older exports stored what the config implies
_MAX_LISTED: Final = 10
_ROWS_AT_ONCE: Final = 4096
_CONVERTIBLE: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# --- the files of a checkpoint ---------------------------------------------------------------------


def find_checkpoint(path: str | PathLike[str], revision: str | None = None) -> Path:
    """Find the folder of a checkpoint; download it if `path` names a repository.

    :param revision: branch, tag or commit of the repository.
    :raises CheckpointError: it is neither a folder nor to be had.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder of the checkpoint")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  local folders do without

    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(f"{path} is no folder and cannot be downloaded: {error}") from error


def list_files(folder: Path) -> dict[Path, set[str]]:
    """List the weight files, each with the tensors that the index promises in it.

    :raises CheckpointError: there are none, the index is malformed or names a file that is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: set()}
    if (folder / INDEX_FILE).is_file():
        return _read_index(folder)
    pickled = sorted(p.name for ext in ("*.bin", "*.pt", "*.pth") for p in folder.glob(ext))
    if pickled:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({_some(pickled)}), and reading those can run code; "
            f"convert them to safetensors, for example with save_pretrained of transformers"
        )
    found = _some(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; it holds {found}")


def _read_index(folder: Path) -> dict[Path, set[str]]:
    path = folder / INDEX_FILE
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        pairs = [(str(name), _shard_name(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed: {error!r}") from error
    files: dict[Path, set[str]] = {}
    for name, file in pairs:
        files.setdefault(folder / file, set()).add(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise CheckpointError(f"{path} names {len(missing)} files that are missing: {_some(missing)}")
    if not files:
        raise CheckpointError(f"{path} names no tensors")
    return files


def _shard_name(name: str) -> str:
    """Refuse a name that leads out of the folder.  A link inside it may: download caches use them."""
    if not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is no .safetensors file")
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        if flavour.is_absolute() or flavour.drive or ".." in flavour.parts:
            raise ValueError(f"{name!r} leads out of the checkpoint's folder")
    return name


Part = tuple[tuple[Span, ...] | None, ...]
"""For each dimension of a stored tensor the indices to read; `None`, as for missing ones: all."""


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class CheckpointReader:
    """All open files of a checkpoint; tensors by their name in the decoder.

    :param device: where tensors are read to.
    """

    def __init__(
        self, files: Mapping[Path, set[str]], spec: ModelSpec, device: torch.device, stack: ExitStack
    ) -> None:
        self._handles = {file: _open(file, device, stack) for file in files}
        self.tensors: dict[str, StoredTensor] = {}
        for file, promised in files.items():
            names = set(self._handles[file].keys())
            if promised - names:
                raise CheckpointError(
                    f"{file} lacks {len(promised - names)} tensors that {INDEX_FILE} promises in it: "
                    f"{_some(sorted(promised - names))}"
                )
            self._add(file, sorted(names), spec)

    def read(self, name: str, part: Part = ()) -> torch.Tensor:
        """Read one tensor, or a part of it; the rest of it is not touched.

        :raises CheckpointError: the file is damaged.
        """
        stored = self.tensors[name]
        handle = self._handles[stored.file]
        try:
            if all(spans is None for spans in part):
                tensor: torch.Tensor = handle.get_tensor(stored.name)
                return tensor
            return _read_part(handle.get_slice(stored.name), part)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{stored.file}: cannot read {stored.name}: {error}") from error

    def num_bytes(self, name: str, part: Part = ()) -> int:
        """Bytes of a tensor or of a part of it; call after its dtype has been checked."""
        stored = self.tensors[name]
        sizes = [
            size if spans is None else sum(span.size for span in spans)
            for size, spans in itertools.zip_longest(stored.shape, part)
        ]
        return math.prod(sizes) * _DTYPES[stored.dtype].itemsize

    def _add(self, file: Path, names: Iterable[str], spec: ModelSpec) -> None:
        for stored_name in names:
            if stored_name.startswith(spec.ignored_prefixes):
                continue
            name = _rename(stored_name, spec)
            taken = self.tensors.get(name)
            if taken is not None:
                raise CheckpointError(
                    f"{file} holds {stored_name}, which {taken.file} holds as {taken.name} already"
                )
            view = self._handles[file].get_slice(stored_name)
            shape = tuple(view.get_shape())
            self.tensors[name] = StoredTensor(file, stored_name, shape, view.get_dtype())


def _open(file: Path, device: torch.device, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="pt", device=str(device)))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from error


def _read_part(view: Any, part: Part) -> torch.Tensor:
    """Read the blocks that the spans of all dimensions select, and join them."""
    choices = [
        (slice(None),) if spans is None else tuple(slice(*span) for span in spans) for spans in part
    ]
    tensor = _join(view, choices, ())
    return tensor.contiguous()


def _join(view: Any, choices: Sequence[tuple[slice, ...]], chosen: tuple[slice, ...]) -> torch.Tensor:
    dim = len(chosen)
    if dim == len(choices):
        tensor: torch.Tensor = view[chosen]
        return tensor
    parts = [_join(view, choices, (*chosen, one)) for one in choices[dim]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _rename(name: str, spec: ModelSpec) -> str:
    for old, new in spec.renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


# --- what the decoder wants ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Load:
    """Tensors that are copied together, by suffix, and where they go."""

    prefix: str
    tensors: Mapping[str, TensorSpec]
    """As the checkpoint holds them."""
    parts: Mapping[str, Part]
    """What this rank reads of each; all of those that are missing here."""
    apply: Callable[[Mapping[str, torch.Tensor]], None]

    def names(self, reader: CheckpointReader) -> Iterator[tuple[str, str, Part]]:
        """Suffix, name and part of each tensor that the checkpoint holds."""
        for suffix, tensor in self.tensors.items():
            name = f"{self.prefix}.{suffix}"
            if name in reader.tensors:
                part, shape = self.parts.get(suffix, ()), reader.tensors[name].shape
                yield suffix, name, _broadcast(part, shape) if tensor.can_broadcast else part


def load_weights(
    decoder: Decoder,
    path: str | PathLike[str],
    *,
    device: torch.device,
    report: Callable[[int, int], None] = lambda _done, _total: None,
    revision: str | None = None,
    kv_scales: KVScales | None = None,
) -> None:
    """Fill a decoder from a checkpoint.  A rank that holds a part of the model reads no other bytes.

    :param path: folder or name of a repository.
    :param device: of the decoder.
    :param report: called with the bytes that have been read and the bytes of all tensors.
    :param revision: branch, tag or commit of the repository.
    :param kv_scales: filled too; `None` passes over those that the checkpoint has.
    :raises CheckpointError: a file is missing or damaged, or the tensors are not those that the
        decoder wants; names the file, the tensor and both shapes.
    """
    folder = find_checkpoint(path, revision)
    loads = [load for section in decoder.sections() for load in _loads(section)]
    with ExitStack() as stack, torch.no_grad():
        reader = CheckpointReader(list_files(folder), decoder.spec, device, stack)
        if decoder.spec.tied:
            _drop_tied_head(reader, decoder)
        _check(reader, loads, set(_whole_names(decoder)), folder)
        if kv_scales is not None:
            load_kv_scales(kv_scales, reader, decoder.spec, decoder.share)
        total = sum(
            reader.num_bytes(name, part) for load in loads for _, name, part in load.names(reader)
        )
        num_read = 0
        for section in decoder.sections_to_fill():
            for load in _loads(section):
                report(num_read, total)
                tensors = {suffix: reader.read(name, part) for suffix, name, part in load.names(reader)}
                load.apply(tensors)
                num_read += sum(tensor.nbytes for tensor in tensors.values())
            _finalize(section)
        report(total, total)


def _finalize(section: Section) -> None:
    """Let the scheme repack what was loaded."""
    for linear, module, scheme in section.linears:
        scheme.finalize(module, linear.local)


def _loads(section: Section) -> Iterator[_Load]:
    for weight in section.plain:
        prefix, _, suffix = weight.name.rpartition(".")
        parts: dict[str, Part] = {} if weight.rows is None else {suffix: ((weight.rows,),)}
        tensors = {suffix: TensorSpec(weight.whole_shape)}
        yield _Load(prefix, tensors, parts, partial(_copy, weight.parameter, suffix))
    for (local, whole), module, scheme in section.linears:
        for shard, (prefix, _) in enumerate(whole.shards):
            tensors = dict(scheme.tensors(whole, shard))
            if whole.bias and not local.bias:  # another rank adds it
                tensors.pop(BIAS, None)
            parts = {} if local.cut is None else _parts(tensors, local, shard)
            yield _Load(prefix, tensors, parts, partial(scheme.load, module, local, shard))


def _parts(tensors: Mapping[str, TensorSpec], local: LinearSpec, shard: int) -> dict[str, Part]:
    spans = {"in": local.input_spans, "out": local.output_spans(shard)}
    return {
        suffix: tuple(
            None if axis is None else _indices(axis, spans[axis.along], local.shards[shard][0], suffix)
            for axis in tensor.axes
        )
        for suffix, tensor in tensors.items()
    }


def _indices(axis: Axis, spans: Sequence[Span], prefix: str, suffix: str) -> tuple[Span, ...]:
    """Find what a rank reads along one dimension.

    :raises CheckpointError: the rank's part begins or ends inside of an index that cannot be shared.
    """
    if not axis.shared:
        odd = [bound for span in spans for bound in span if bound % axis.step]
        if odd:
            raise CheckpointError(
                f"{prefix}.{suffix} holds {axis.step} {axis.along}put features per index, but a rank's "
                f"part of the layer begins or ends at feature {odd[0]}; use another "
                f"--tensor-parallel-size"
            )
    return tuple(covering(spans, axis.step))


def _whole_names(decoder: Decoder) -> Iterator[str]:
    """Every tensor that the whole model wants, on whichever rank."""
    yield from decoder.whole_plain_names()
    for whole, scheme in decoder.whole_linears():
        for shard, (prefix, _) in enumerate(whole.shards):
            for suffix in scheme.tensors(whole, shard):
                yield f"{prefix}.{suffix}"


def _copy(weight: nn.Parameter, suffix: str, tensors: Mapping[str, torch.Tensor]) -> None:
    weight.copy_(tensors[suffix])


def _drop_tied_head(reader: CheckpointReader, decoder: Decoder) -> None:
    """Pass over an output projection that repeats the embedding, or take it for a missing one.

    :raises CheckpointError: it differs, so that the config is wrong.
    """
    head = reader.tensors.get(_HEAD)
    if head is None:
        return
    part: Part = ((decoder.share.vocab,),)
    if _EMBEDDING not in reader.tensors:
        reader.tensors[_EMBEDDING] = head
    elif not torch.equal(reader.read(_HEAD, part), reader.read(_EMBEDDING, part)):
        raise CheckpointError(
            f"{head.file}: {head.name} differs from the embedding, but the config says that they are "
            f"tied; set tie_word_embeddings to false in config.json"
        )
    del reader.tensors[_HEAD]


def _check(
    reader: CheckpointReader, loads: Sequence[_Load], whole_names: set[str], folder: Path
) -> None:
    """Compare what is stored with what is wanted.

    :raises CheckpointError: the first kind of problem, with up to ten tensors that have it.
    """
    wanted = {f"{load.prefix}.{s}": tensor for load in loads for s, tensor in load.tensors.items()}
    missing = [n for n, tensor in wanted.items() if n not in reader.tensors and not tensor.optional]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors: {_some(missing)}")
    extra = [
        f"{stored.name} ({stored.file.name})"
        for name, stored in reader.tensors.items()
        if name not in whole_names and not name.endswith(_HARMLESS_SUFFIX) and not is_about_cache(name)
    ]
    if extra:
        raise CheckpointError(
            f"{folder} holds {len(extra)} tensors that the model does not have: {_some(extra)}"
        )
    problems = [
        problem
        for name, tensor in wanted.items()
        if name in reader.tensors
        for problem in _mismatches(reader.tensors[name], tensor)
    ]
    if problems:
        raise CheckpointError("; ".join(problems[:_MAX_LISTED]) + _rest(problems))


def _mismatches(stored: StoredTensor, wanted: TensorSpec) -> Iterator[str]:
    where = f"{stored.file}: {stored.name}"
    if not _is_shape(stored.shape, wanted):
        yield f"{where} has shape {list(stored.shape)}, but the config asks for {list(wanted.shape)}"
    accepted = wanted.dtype or _CONVERTIBLE
    accepted = accepted if isinstance(accepted, tuple) else (accepted,)
    if _DTYPES.get(stored.dtype) not in accepted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        yield f"{where} has dtype {stored.dtype}, but {names} is needed"


def _is_shape(shape: tuple[int, ...], wanted: TensorSpec) -> bool:
    if not wanted.can_broadcast:
        return shape == wanted.shape
    pairs = itertools.zip_longest(shape, wanted.shape, fillvalue=1)
    return all(size in (1, full) for size, full in pairs)


def _broadcast(part: Part, shape: tuple[int, ...]) -> Part:
    """Read the one index of a dimension whole, and no dimension that is left out."""
    return tuple(None if size == 1 else spans for spans, size in zip(part, shape, strict=False))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + _rest(names)


def _rest(names: Sequence[str]) -> str:
    return f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""


# --- without a checkpoint --------------------------------------------------------------------------


def load_dummy(decoder: Decoder, seed: int) -> None:
    """Fill a decoder with random values that keep activations sane, then let the scheme repack them.

    Norms do not change their input, matrices are normal with a variance of 1 / inputs, scales are
    positive and small, biases are zero, integers take their full range.

    :param seed: the same one gives the same values on the same kind of device.
    """
    generator = torch.Generator(decoder.device).manual_seed(seed)
    neutral = 0.0 if decoder.spec.norm_style == "one_plus" else 1.0
    with torch.no_grad():
        for section in decoder.sections_to_fill():
            for weight in section.plain:
                if weight.name == _EMBEDDING:
                    _fill(weight.name, weight.parameter, decoder.spec.hidden_size, generator)
                else:
                    weight.parameter.fill_(neutral)
            for linear, module, _ in section.linears:
                for name, tensor in _tensors_of(module):
                    _fill(name, tensor, linear.whole.in_features, generator)
            _finalize(section)


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _fill(name: str, tensor: torch.Tensor, fan_in: int, generator: torch.Generator) -> None:
    std = fan_in**-0.5
    if not tensor.dtype.is_floating_point:
        _fill_integers(tensor, generator)
    elif name.endswith("bias"):
        tensor.zero_()
    elif "scale" in name:
        _copy_random(tensor, lambda part: part.uniform_(0.5 * std, 1.5 * std, generator=generator))
    else:
        _copy_random(tensor, lambda part: part.normal_(0.0, std, generator=generator))


def _fill_integers(tensor: torch.Tensor, generator: torch.Generator) -> None:
    if tensor.dtype == torch.bool:
        tensor.random_(0, 2, generator=generator)
    else:
        tensor.random_(torch.iinfo(tensor.dtype).min, None, generator=generator)


def _copy_random(tensor: torch.Tensor, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Draw in place where the dtype allows it; else in float32, a slice at a time."""
    if tensor.dtype in _CONVERTIBLE:
        draw(tensor)
        return
    for part in torch.split(tensor, _ROWS_AT_ONCE) if tensor.ndim else (tensor,):
        part.copy_(draw(torch.empty(part.shape, dtype=torch.float32, device=part.device)))


def estimate_weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of all weights if none is quantized."""
    return spec.num_parameters() * dtype.itemsize
