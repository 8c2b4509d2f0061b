"""The offline API: a list of prompts in, a list of results out, in the calling process."""

from __future__ import annotations

import itertools
from collections import deque
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.assemble import Assembly, build_engine, resolve
from core.config import load_config
from core.errors import ConfigError, InvalidRequestError
from core.journal import Journal
from core.log import configure_for_library
from core.outputs import OutputKind, RequestOutput
from core.request import SamplingParams
from core.tokenizer import load_generation_defaults, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from core.config import EngineConfig
    from core.messages import OutputBatch
    from core.tokenizer import Tokenizer


class LLM:
    """An engine in the calling process, for offline use.

    >>> with LLM("path/to/checkpoint", plugins=["attention.torch"]) as llm:  # doctest: +SKIP
    ...     outputs = llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=8))
    ...     print(outputs[0].outputs[0].text)

    :param model: a checkpoint folder, or the id of one on the hub.
    :param plugins: what `--plugins` takes.
    :param settings: any setting of `EngineConfig`, such as `dtype="float32"` or `num_kv_blocks=512`.
    :raises CytheraError: the engine cannot be assembled; the message says why and what to change.
    """

    def __init__(self, model: str, *, plugins: Sequence[str] = (), **settings: Any) -> None:
        self._start(load_config({"model": str(model), "plugins": tuple(plugins), **settings}))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """Make one from a configuration that is there already."""
        llm = cls.__new__(cls)
        llm._start(config)  # noqa: SLF001  of this very class
        return llm

    def _start(self, config: EngineConfig) -> None:
        configure_for_library(config.log_level, config.log_format)
        self.assembly: Assembly = resolve(config)
        self._outputs: deque[OutputBatch] = deque()
        self.engine = build_engine(self.assembly, self._outputs.append)
        self.engine.prepare()
        self.journal = make_journal(self.assembly, self.engine.kv_cache.num_blocks)
        self._defaults = load_sampling_defaults(self.assembly)
        self._ids = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the devices back; harmless when called twice."""
        self.engine.close()

    def get_tokenizer(self) -> Tokenizer | None:
        """Return the model's tokenizer; `None` if its folder holds none."""
        return self.journal.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return what `generate` uses when it is given no parameters: the checkpoint's defaults."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Complete prompts; results come in the order of the prompts.

        :param prompts: one prompt or a list of them.  A prompt is text, a list of token ids, or a
            dictionary with `prompt` or `prompt_token_ids`.
        :param sampling_params: one for all, or one each.
        :param use_tqdm: show a progress bar when there are many prompts and a terminal.
        :param priority: one number each, lower first; needs `scheduling_policy="priority"`.
        :raises RequestError: a prompt is refused; then none was started.
        """
        prompt_list = _list_prompts(prompts)
        params = self._list_params(sampling_params, len(prompt_list))
        priorities = list(priority) if priority is not None else [0] * len(prompt_list)
        if len(priorities) != len(prompt_list):
            raise InvalidRequestError(
                f"priority: {len(priorities)} values for {len(prompt_list)} prompts", field="priority"
            )
        ids = [str(next(self._ids)) for _ in prompt_list]
        try:
            commands = [
                command
                for request in zip(ids, prompt_list, params, priorities, strict=True)
                for command in self._open(*request, cache_salt)
            ]
            for command in commands:
                self.engine.send(command)
            return self._run(ids, show_progress=use_tqdm and len(ids) > 1)
        except BaseException:
            self._abort(ids)
            raise

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, rendered with the model's chat template.

        :param messages: one conversation (a list of `{"role": …, "content": …}`) or a list of them.
        :raises RequestError: the model has no chat template, or a conversation does not fit it.
        """
        tokenizer = self.journal.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("messages: chat needs a tokenizer, but this model has none")
        variables = dict(chat_template_kwargs or {})
        tokenizer.check_template_variables(variables)
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        prompts = [
            tokenizer.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, **variables
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _open(
        self, request_id: str, prompt: Any, params: SamplingParams, priority: int, cache_salt: str
    ) -> list[Any]:
        return self.journal.submit(
            request_id,
            prompt,
            params,
            kind=OutputKind.FINAL_ONLY,
            priority=priority,
            cache_salt=cache_salt,
        )

    def _run(self, ids: list[str], *, show_progress: bool) -> list[RequestOutput]:
        results: dict[str, RequestOutput] = {}
        # A bar takes longer to make than a short prompt takes to be scheduled, even if nobody sees it.
        with _show_progress(len(ids)) if show_progress else nullcontext(_ignore) as advance:
            while len(results) < len(ids):
                self.engine.step()
                while self._outputs:
                    requests, commands = self.journal.take(self._outputs.popleft())
                    for command in commands:
                        self.engine.send(command)
                    for output in (request.read() for request in requests):
                        results[output.request_id] = output
                        advance(output)
        self.engine.step()  # lets a last stop-string command free its blocks
        return [results[request_id] for request_id in ids]

    def _abort(self, ids: Iterable[str]) -> None:
        for request_id in ids:
            for command in self.journal.abort(request_id):
                self.engine.send(command)
        while self.engine.has_work:
            self.engine.step()
        self._outputs.clear()

    def _list_params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise InvalidRequestError(
                f"sampling_params: {len(params)} given for {count} prompts", field="sampling_params"
            )
        return list(params)


def make_journal(assembly: Assembly, num_kv_blocks: int) -> Journal:
    """Make the front half that fits an engine: limits, tokenizer and end-of-sequence ids."""
    plan = assembly.plan
    revision = plan.config.revision
    tokenizer = load_tokenizer(plan.config.tokenizer or plan.model_path, revision=revision)
    if tokenizer is not None:
        eos = tokenizer.eos_token_ids
        if plan.config.chat_template is not None:
            tokenizer.hf.chat_template = read_chat_template(plan.config.chat_template)
    else:
        eos = load_generation_defaults(plan.model_path, revision=revision).get("eos_token_ids", ())
    return Journal(
        plan.limits(num_kv_blocks), tokenizer, eos_token_ids=list(eos), seed=plan.config.seed
    )


def read_chat_template(file: str) -> str:
    """Read a chat template.

    :raises ConfigError: the file cannot be read as text.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template = {file}: cannot be read: {error}") from error


def load_sampling_defaults(assembly: Assembly) -> dict[str, Any]:
    """Read the sampling defaults that the checkpoint recommends, unless they are switched off."""
    if assembly.plan.config.generation_config == "none":
        return {}
    defaults = load_generation_defaults(
        assembly.plan.model_path, revision=assembly.plan.config.revision
    )
    return {key: value for key, value in defaults.items() if key in SamplingParams.__struct_fields__}


def _list_prompts(prompts: Any) -> list[Any]:
    is_one = isinstance(prompts, str | dict) or (
        len(prompts) > 0 and all(isinstance(item, int) for item in prompts)
    )
    return [_prompt_of(prompt) for prompt in ([prompts] if is_one else prompts)]


def _prompt_of(prompt: Any) -> Any:
    if not isinstance(prompt, dict):
        return prompt
    for key in ("prompt_token_ids", "prompt"):
        if prompt.get(key) is not None:
            return prompt[key]
    raise InvalidRequestError(
        f"prompt: a dictionary needs 'prompt' or 'prompt_token_ids', got {sorted(prompt)}",
        field="prompt",
    )


def _ignore(_output: RequestOutput) -> None:
    pass


@contextmanager
def _show_progress(num_prompts: int) -> Iterator[Callable[[RequestOutput], None]]:
    """Show a bar with the tokens per second; what is yielded takes each result."""
    num_tokens = 0

    def advance(output: RequestOutput) -> None:
        nonlocal num_tokens
        num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed = progress.tasks[0].elapsed or 1e-9
        progress.update(task, advance=1, speed=num_tokens / elapsed)

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
        transient=True,
    ) as progress:
        task = progress.add_task("prompts", total=num_prompts, speed=0.0)
        yield advance
