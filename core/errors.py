"""The exceptions of cythera, and the exit code each one ends a command with.

Every error that a user, a request or a plugin can cause is one of these. Their messages carry the
value that was refused, the limit it broke and the knob that moves the limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence


EXIT_INTERRUPTED: Final = 130
"""The exit code of a command that Ctrl-C has ended."""


class CytheraError(Exception):
    """Base of all errors that cythera raises on purpose."""

    exit_code = 1


class ConfigError(CytheraError):
    """A setting is unknown, malformed or contradicts another one."""

    exit_code = 2


class PluginError(CytheraError):
    """Something about a plugin is wrong; `plugin` names it as the user wrote it."""

    exit_code = 3

    def __init__(self, message: str, *, plugin: str = "") -> None:
        super().__init__(message)
        self.plugin = plugin


class PluginNotFoundError(PluginError):
    """No installed distribution offers a plugin of that name."""


class PluginImportError(PluginError):
    """The plugin is known, but importing its module failed; the cause is chained."""


class PluginRegistrationError(PluginError):
    """The plugin was imported but breaks the contract of the hooks; nothing of it stays active."""


class PluginConflictError(PluginError):
    """Two distributions claim the same name."""


class PluginCallError(PluginError):
    """A hook of a plugin raised; the message names plugin, distribution, version and hook."""


class PlanError(CytheraError):
    """The parts cannot work together; `objections` lists every reason, not just the first.

    :param objections: one sentence per incompatibility, each starting with who objects.
    """

    exit_code = 4

    def __init__(self, objections: Sequence[str]) -> None:
        self.objections = tuple(objections)
        lines = "".join(f"\n  - {line}" for line in self.objections)
        super().__init__(f"this configuration cannot be served:{lines}")


class CheckpointError(CytheraError):
    """A checkpoint is missing, truncated or does not hold what its config promises."""

    exit_code = 5


class CapacityError(CytheraError):
    """There is not enough memory for what was asked; the message says which knobs help."""

    exit_code = 6


class OutOfBlocksError(CytheraError):
    """A block allocator was asked for more blocks than are free; it allocated none of them."""


class IntegrityError(CytheraError):
    """A conservation law of the block pool or the prefix cache does not hold."""


class RequestError(CytheraError, ValueError):
    """A request is refused at the door; `field` names the part of it that is wrong.

    :param field: dotted name of the offending field, as the client sent it.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidRequestError(RequestError):
    """A value of the request is outside its legal range, whatever the engine's load."""


class RequestTooLargeError(RequestError):
    """The request is well formed but can never fit into this engine, however long it waits."""


class EngineDeadError(CytheraError):
    """The engine loop has ended, so no request can be served any more; the cause is chained."""


class DeviceLostError(CytheraError):
    """A rank died, hung or failed in a step; what the devices held is lost.

    :param rank: the one that is to blame, as far as can be told.
    """

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class EngineStartError(CytheraError):
    """The engine's process has failed before it was ready, or died.

    :param exit_code: of the error that it reported.
    :param trace: its traceback, empty if it died without a word.
    """

    def __init__(self, message: str, *, exit_code: int = 1, trace: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.trace = trace


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here."""


class NotReadyError(CytheraError):
    """The engine is loading, draining or gone: nothing is served now.

    :param retry_after: seconds after which another attempt makes sense.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(CytheraError):
    """The queue is full; taking the request in would only make everybody wait longer.

    :param retry_after: seconds in which the queue is likely to have room again.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceededError(CytheraError):
    """The request was ended because its time, or its time in the queue, ran out."""


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Find what happened first, if several tasks tell of the same end."""
    first = group.exceptions[0]
    return first_cause(first) if isinstance(first, BaseExceptionGroup) else first
