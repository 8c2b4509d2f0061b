"""The commands of `python -m core bench` that measure speed: their flags, and what becomes of the results.

What they measure with is imported when they run, so that `--help` needs neither torch nor numpy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Group, Parameter

from core.bench.results import parse_counts, parse_numbers, parse_pairs, write_json
from core.bench.workloads import VOCAB_SIZE, Dataset, DatasetName
from core.cli import Assignments, ConfigFile, Flags, load_settings
from core.config import DEFAULT_ORIGIN
from core.errors import ConfigError

if TYPE_CHECKING:
    from core.config import EngineConfig

API_KEYS: Final = ("CYTHERA_API_KEY", "OPENAI_API_KEY")
"""Variables that may hold a key for the server, the first one first."""

_MEASUREMENT: Final = Group("Measurement", sort_key=0)
_SERVER: Final = Group("Server", sort_key=1)
_REQUESTS: Final = Group("Requests", sort_key=2)
_FIGURES: Final = Group("Figures", sort_key=3)
_RESULTS: Final = Group("Results", sort_key=4)


def _flag(group: Group, text: str, **settings: Any) -> Parameter:
    return Parameter(group=group, help=text, **settings)


def _words(group: Group, text: str, metavar: str) -> Parameter:
    return _flag(group, text, metavar=metavar, negative=(), consume_multiple=True, show_default=False)


OutputJson = Annotated[
    Path | None, _flag(_MEASUREMENT, "File for the figures.", metavar="FILE", show_default=False)
]
PlotFile = Annotated[
    Path | None,
    _flag(_MEASUREMENT, "Picture: .png, .svg or .pdf; needs matplotlib.", metavar="FILE"),
]
RequestDataset = Annotated[
    DatasetName,
    _flag(
        _REQUESTS,
        "random: of one size. seed-mix: 100 to 2048 tokens in, 50 to 500 out. custom: a file.",
    ),
]
DatasetPath = Annotated[
    Path | None,
    _flag(
        _REQUESTS,
        "custom: JSON lines with prompt, as text or token ids, and output_tokens; or conversations.",
        metavar="FILE",
    ),
]
NumPrompts = Annotated[int, _flag(_REQUESTS, "Requests in all.", metavar="N")]
InputLen = Annotated[
    int, _flag(_REQUESTS, "random: tokens of a prompt.", metavar="N", alias="--random-input-len")
]
OutputLen = Annotated[
    int | None,
    _flag(
        _REQUESTS,
        "Tokens to generate for a request; unset: 128, or what the file says.",
        metavar="N",
        alias="--random-output-len",
    ),
]
RangeRatio = Annotated[
    float,
    _flag(_REQUESTS, "random: lengths differ by up to this share of them; below 1.", metavar="X"),
]


def bench_latency(
    model: str | None = None,
    /,
    *,
    input_len: Annotated[int, _flag(_MEASUREMENT, "Tokens of a prompt.", metavar="N")] = 32,
    output_len: Annotated[int, _flag(_MEASUREMENT, "Tokens to generate.", metavar="N")] = 128,
    batch_size: Annotated[
        str, _flag(_MEASUREMENT, "Requests side by side; several such as 1,16,64.", metavar="N,N")
    ] = "8",
    num_iters_warmup: Annotated[int, _flag(_MEASUREMENT, "Runs before.", metavar="N")] = 10,
    num_iters: Annotated[int, _flag(_MEASUREMENT, "Runs that count.", metavar="N")] = 30,
    output_json: OutputJson = None,
    plot: PlotFile = None,
    flags: Flags = None,
    config_file: ConfigFile = None,
    assignments: Assignments = (),
) -> None:
    """Measure how long a batch takes whose requests start together: in all, to the first token, per token.

    :param model: Folder of a checkpoint, or the id of one on the hub; demo is the bundled one.
    """
    from core.bench.plots import check_plot, plot_batches  # noqa: PLC0415  not needed for --help

    config = load_settings(model, flags, config_file, assignments)
    sizes = tuple(parse_counts("--batch-size", batch_size))
    check_plot(plot)
    from core.bench import latency  # noqa: PLC0415  imports torch and transformers

    options = latency.LatencyOptions(
        input_len=input_len,
        output_len=output_len,
        batch_sizes=sizes,
        num_iters_warmup=num_iters_warmup,
        num_iters=num_iters,
        seed=_seed_of(config) or 0,
    )
    results = latency.measure(config, options)
    _print(latency.report(results))
    if output_json is not None:
        write_json(output_json, latency.to_dict(results))
    if plot is not None:
        title = f"{config.model}: {input_len} tokens in, {output_len} out"
        plot_batches(plot, [result.to_dict() for result in results], title)


def bench_throughput(
    model: str | None = None,
    /,
    *,
    dataset_name: RequestDataset = "random",
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = 1000,
    input_len: InputLen = 1024,
    output_len: OutputLen = None,
    random_range_ratio: RangeRatio = 0.0,
    num_warmups: Annotated[int, _flag(_MEASUREMENT, "Requests before.", metavar="N")] = 8,
    output_json: OutputJson = None,
    flags: Flags = None,
    config_file: ConfigFile = None,
    assignments: Assignments = (),
) -> None:
    """Measure how many requests and tokens a second an engine does that has all requests at once.

    :param model: Folder of a checkpoint, or the id of one on the hub; demo is the bundled one.
    """
    config = load_settings(model, flags, config_file, assignments)
    dataset = Dataset(
        name=dataset_name,
        path=dataset_path,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=random_range_ratio,
        seed=_seed_of(config),
    )
    from core.bench import throughput  # noqa: PLC0415  imports torch and transformers

    result = throughput.measure(config, dataset, num_warmups=num_warmups)
    _print(throughput.report(result))
    if output_json is not None:
        write_json(output_json, result.to_dict())


def bench_startup(
    model: str | None = None,
    /,
    *,
    num_iters_cold: Annotated[
        int, _flag(_MEASUREMENT, "Starts without any compiled kernel.", metavar="N")
    ] = 3,
    num_iters_warm: Annotated[
        int, _flag(_MEASUREMENT, "Starts with the kernels of the one before.", metavar="N")
    ] = 3,
    timeout: Annotated[float, _flag(_MEASUREMENT, "Seconds for one start.", metavar="X")] = 1800.0,
    output_json: OutputJson = None,
    flags: Flags = None,
    config_file: ConfigFile = None,
    assignments: Assignments = (),
) -> None:
    """Measure how long a server takes to open its port, to be ready, and to give a first token.

    Weights are random unless --load-format says otherwise.

    :param model: Folder of a checkpoint, or the id of one on the hub; demo is the bundled one.
    """
    config = load_settings(model, flags, config_file, assignments)
    if min(num_iters_cold, num_iters_warm) < 0 or num_iters_cold + num_iters_warm < 1:
        raise ConfigError(
            f"--num-iters-cold {num_iters_cold} and --num-iters-warm {num_iters_warm} must be at "
            f"least 0, and one of them more"
        )
    from core.bench import startup  # noqa: PLC0415  imports numpy

    results = startup.measure(config, num_cold=num_iters_cold, num_warm=num_iters_warm, timeout=timeout)
    _print(startup.report(results))
    if output_json is not None:
        write_json(output_json, startup.to_dict(results))


def bench_kernels(
    model: str | None = None,
    /,
    *,
    batch_size: Annotated[
        str, _flag(_MEASUREMENT, "Requests of a decode step; several such as 1,64.", metavar="N,N")
    ] = "1,64",
    context_len: Annotated[
        int, _flag(_MEASUREMENT, "Tokens that each of them has.", metavar="N")
    ] = 512,
    prefill_len: Annotated[
        int, _flag(_MEASUREMENT, "Tokens of the prompt of a prefill step; 0: none.", metavar="N")
    ] = 2048,
    num_steps: Annotated[int, _flag(_MEASUREMENT, "Steps of each kind.", metavar="N")] = 20,
    attention_kernels: Annotated[
        str | None,
        _flag(_MEASUREMENT, "Expression that names of attention kernels match.", metavar="REGEX"),
    ] = None,
    linear_kernels: Annotated[
        str | None,
        _flag(_MEASUREMENT, "Expression that names of matrix kernels match.", metavar="REGEX"),
    ] = None,
    trace: Annotated[
        Path | None,
        _flag(_MEASUREMENT, "Folder for the traces, which Perfetto shows.", metavar="DIR"),
    ] = None,
    output_json: OutputJson = None,
    flags: Flags = None,
    config_file: ConfigFile = None,
    assignments: Assignments = (),
) -> None:
    """Profile steps on a GPU: time of each kernel, and how close it comes to what the card can do.

    :param model: Folder of a checkpoint, or the id of one on the hub; demo is the bundled one.
    """
    config = load_settings(model, flags, config_file, assignments)
    sizes = tuple(parse_counts("--batch-size", batch_size))
    from core.bench import kernels, step_profile  # noqa: PLC0415  import torch and transformers

    options = kernels.KernelOptions(
        batch_sizes=sizes,
        context_len=context_len,
        prefill_len=prefill_len,
        num_steps=num_steps,
        attention_kernels=attention_kernels or kernels.ATTENTION_KERNELS,
        linear_kernels=linear_kernels or kernels.LINEAR_KERNELS,
    )
    ceilings, profiles = kernels.measure(config, options, trace=trace)
    _print(step_profile.report(ceilings, profiles))
    if output_json is not None:
        write_json(output_json, kernels.to_dict(options, ceilings, profiles))


def bench_model(
    folder: Path,
    /,
    *,
    size: Annotated[str, Parameter(help="8b, 70b and 405b of Llama 3.1; 7b, 13b, 34b.")] = "8b",
    quant: Annotated[
        Literal["bf16", "fp16", "fp8", "awq", "gptq"], Parameter(help="How weights are stored.")
    ] = "bf16",
    max_len: Annotated[int, Parameter(help="Longest sequence in tokens.")] = 8192,
) -> None:
    """Write a model that has a config and no weights, to be measured with --load-format dummy.

    :param folder: Folder to write.
    """
    from core.bench.shapes import write_model  # noqa: PLC0415  next to its only use

    _print(f"wrote {write_model(folder, size, quant, max_len=max_len)}")


# --- bench serve -----------------------------------------------------------------------------------


def bench_serve(
    *,
    base_url: Annotated[
        str | None, _flag(_SERVER, "Of the server; unset: made of host and port.", metavar="URL")
    ] = None,
    host: Annotated[str, _flag(_SERVER, "Of the server.")] = "127.0.0.1",
    port: Annotated[int, _flag(_SERVER, "Of the server.", metavar="N")] = 2242,
    endpoint: Annotated[
        str, _flag(_SERVER, "Route; /v1/chat/completions takes data sets of text.", metavar="PATH")
    ] = "/v1/completions",
    model: Annotated[
        str | None, _flag(_SERVER, "Name to ask for; unset: the first that the server serves.")
    ] = None,
    header: Annotated[
        tuple[str, ...], _words(_SERVER, "Sent with each request; may be repeated.", "NAME=VALUE")
    ] = (),
    insecure: Annotated[
        bool, _flag(_SERVER, "Do not check the certificate.", show_default=False)
    ] = False,
    ready_check_timeout_sec: Annotated[
        float, _flag(_SERVER, "Seconds to wait for a first answer; 0: none is awaited.", metavar="X")
    ] = 0.0,
    dataset_name: RequestDataset = "random",
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = 1000,
    input_len: InputLen = 1024,
    output_len: OutputLen = None,
    random_range_ratio: RangeRatio = 0.0,
    vocab_size: Annotated[
        int, _flag(_REQUESTS, "Token ids that are drawn lie below.", metavar="N")
    ] = VOCAB_SIZE,
    seed: Annotated[
        int | None, _flag(_REQUESTS, "Of prompts and arrivals; unset: those of the data set.")
    ] = None,
    request_rate: Annotated[
        str,
        _flag(
            _REQUESTS, "Requests a second, or inf: all at once; several such as 1,2,4.", metavar="X,X"
        ),
    ] = "inf",
    burstiness: Annotated[
        float, _flag(_REQUESTS, "1: a Poisson process; less: bursts; more: even.", metavar="X")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, _flag(_REQUESTS, "Most open requests; others wait in the client.", metavar="N")
    ] = None,
    num_warmups: Annotated[int, _flag(_REQUESTS, "Requests before.", metavar="N")] = 0,
    ignore_eos: Annotated[
        bool,
        _flag(_REQUESTS, "Have every answer as long as asked.", negative="--no-ignore-eos"),
    ] = True,
    temperature: Annotated[float, _flag(_REQUESTS, "0: greedy.", metavar="X")] = 0.0,
    extra_body: Annotated[
        str, _flag(_REQUESTS, "More fields of each request.", metavar="JSON", show_default=False)
    ] = "",
    percentile_metrics: Annotated[
        str, _flag(_FIGURES, "Of ttft, tpot, itl and e2el those to report.", metavar="A,B")
    ] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, _flag(_FIGURES, "Percentiles of each.", metavar="X,X")] = "99",
    goodput: Annotated[
        tuple[str, ...],
        _words(_FIGURES, "Most ms of a good request: ttft:500 tpot:50 e2el:9000.", "METRIC:MS"),
    ] = (),
    save_result: Annotated[
        bool, _flag(_RESULTS, "Write a file of results.", show_default=False)
    ] = False,
    save_detailed: Annotated[
        bool, _flag(_RESULTS, "The same, with each request in it.", show_default=False)
    ] = False,
    result_dir: Annotated[
        Path, _flag(_RESULTS, "Folder of results.", metavar="DIR", show_default=False)
    ] = Path(),
    result_filename: Annotated[
        str | None, _flag(_RESULTS, "Name of the file; unset: after what was measured.")
    ] = None,
    metadata: Annotated[
        tuple[str, ...], _words(_RESULTS, "More keys of the file; may be repeated.", "KEY=VALUE")
    ] = (),
    label: Annotated[str, _flag(_RESULTS, "First part of the file's name.", show_default=False)] = "",
    plot: Annotated[
        Path | None,
        _flag(
            _RESULTS,
            "Picture: of several rates latencies over the rate, of one how they are distributed.",
            metavar="FILE",
        ),
    ] = None,
    plot_timeline: Annotated[
        bool,
        _flag(
            _RESULTS, "Picture of all requests over time, in the folder of results.", show_default=False
        ),
    ] = False,
    disable_tqdm: Annotated[bool, _flag(_RESULTS, "No bar.", show_default=False)] = False,
) -> None:
    """Put a load on a server that speaks the API of OpenAI, whoever made it, and report what clients saw.

    Keys are read from CYTHERA_API_KEY or OPENAI_API_KEY.
    """
    from core.bench import serving  # noqa: PLC0415  imports numpy and httpx
    from core.bench.campaign import Campaign  # noqa: PLC0415  the same
    from core.bench.serving_report import (  # noqa: PLC0415  the same
        parse_goodput,
        parse_metrics,
        parse_percentiles,
    )

    dataset = Dataset(
        name=dataset_name,
        path=dataset_path,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=random_range_ratio,
        seed=seed,
        vocab_size=vocab_size,
    )
    headers = _auth_header() | parse_pairs("--header", header)
    url = (base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}").rstrip("/")
    campaign = Campaign(
        rates=parse_numbers("--request-rate", request_rate),
        metrics=parse_metrics(percentile_metrics),
        percentiles=parse_percentiles(metric_percentiles),
        goodput=parse_goodput(goodput),
        is_saved=save_result or save_detailed,
        is_detailed=save_detailed,
        folder=result_dir,
        file_name=result_filename,
        metadata=parse_pairs("--metadata", metadata),
        label=label,
        plot=plot,
        has_timeline=plot_timeline,
    )
    campaign.check()
    requests = dataset.requests()
    load = serving.Load(
        base_url=url,
        model=model or serving.find_model(url, headers, is_insecure=insecure),
        endpoint=endpoint,
        headers=headers,
        is_insecure=insecure,
        burstiness=burstiness,
        seed=seed,
        max_concurrency=max_concurrency,
        num_warmups=num_warmups,
        vocab_size=vocab_size,
        ready_timeout=ready_check_timeout_sec,
        ignore_eos=ignore_eos,
        extra_body={"temperature": temperature} | serving.parse_body(extra_body),
        keep_text=save_detailed,
        has_progress=not disable_tqdm,
    )
    campaign.run(load, requests, _print)


def _auth_header() -> dict[str, str]:
    key = next((os.environ[name] for name in API_KEYS if os.environ.get(name)), "")
    return {"Authorization": f"Bearer {key.partition(',')[0]}"} if key else {}


def _seed_of(config: EngineConfig) -> int | None:
    """Return the seed that somebody has set."""
    return None if config.origin_of("seed") == DEFAULT_ORIGIN else config.seed


def _print(text: str) -> None:
    print(text)  # noqa: T201  what a command is for
