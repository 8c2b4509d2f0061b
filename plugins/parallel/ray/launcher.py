"""Places ranks with Ray.

Ray is asked for places and for nothing else: one actor for each rank starts the rank's process on its
machine and joins it to the engine.  Steps and tensors never go through Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from typing import TYPE_CHECKING, Any, Final

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from core.errors import EngineStartError
from core.ranks.launch import Worker, describe_exit, start_worker
from core.ranks.rendezvous import Hello, Rendezvous, join
from core.ranks.watch import STACK_WAIT

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from core.plan import Plan
    from plugins.parallel.ray import Settings

NODE: Final = 0  # Ray numbers machines in its own way; a rank's number is all that matters here


class RankKeeper:
    """What runs in the actor: starts one rank's process and says how it is."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def start(self, address: tuple[str, int], key: str, rank: int, attempt: int) -> str:
        """Start the process and join it to the engine; return where that is."""
        sock = join(address, key, node=NODE, local_rank=rank, attempt=attempt)
        self._worker = start_worker(sock)
        return f"pid {self._worker.process.pid} on {ray.util.get_node_ip_address()}"

    def ended(self) -> str | None:
        """Say how the process ended; `None` if it runs."""
        code = self._worker.process.poll() if self._worker else None
        return None if code is None else describe_exit(code)

    def dump_stack(self) -> str:
        """Get the stacks of its threads."""
        return self._worker.dump_stack() if self._worker else ""

    def stop(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.kill()


class RayRank:
    """A rank that Ray has placed; fulfils `core.ranks.watch.RankHandle`."""

    local_rank = 0  # Ray shows each actor its own GPU only
    local_world_size = 1

    def __init__(self, sock: socket.socket, keeper: Any, name: str) -> None:
        self.sock = sock
        self.name = name
        self._keeper = keeper

    def ended(self, timeout: float) -> str | None:
        """Say how the process ended, or that its actor is gone."""
        try:
            how: str | None = ray.get(self._keeper.ended.remote(), timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError as error:
            return f"is gone with its actor ({type(error).__name__})"
        return how

    def dump_stack(self) -> str:
        """Ask the actor for the stacks of a rank that does not answer."""
        try:
            stack: str = ray.get(self._keeper.dump_stack.remote(), timeout=4 * STACK_WAIT)
        except ray.exceptions.RayError:
            return ""
        return stack

    def kill(self) -> None:
        """End process and actor."""
        with contextlib.suppress(ray.exceptions.RayError):  # else it goes with its actor
            ray.get(self._keeper.stop.remote(), timeout=STACK_WAIT)
        ray.kill(self._keeper)


class RayLauncher:
    """Fulfils `core.ranks.executor.Launcher`."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self._plan = plan
        self._settings = settings
        self._key = secrets.token_hex(32)
        self._attempt = 0
        self._group: Any = None
        self._socks: dict[tuple[int, int], socket.socket] = {}
        self._joined = threading.Condition()
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            ray.init(address=settings.address, log_to_driver=True, logging_level=logging.WARNING)
        self.store_host: str = ray.util.get_node_ip_address()
        self._rendezvous = Rendezvous(self.store_host, 0, self._key, self._admit)

    def start(self) -> Sequence[RayRank]:
        """Let Ray place all ranks, and wait until they have joined.

        :raises EngineStartError: the cluster has no room, or a rank has not joined in time.
        """
        with self._joined:
            self._attempt += 1
            self._drop_late_ranks()
        timeout = self._plan.config.join_timeout
        keepers = self._place(timeout)
        address = (self.store_host, self._rendezvous.port)
        try:
            names = ray.get(
                [
                    keeper.start.remote(address, self._key, rank, self._attempt)
                    for rank, keeper in enumerate(keepers)
                ],
                timeout=timeout,
            )
        except ray.exceptions.RayError as error:
            raise EngineStartError(f"Ray could not start the ranks: {error}") from error
        wanted = [(self._attempt, rank) for rank in range(len(keepers))]
        with self._joined:
            if not self._joined.wait_for(lambda: all(k in self._socks for k in wanted), timeout):
                raise EngineStartError(f"ranks have not joined within {timeout:.0f} s (--join-timeout)")
            socks = [self._socks.pop(key) for key in wanted]
        return [RayRank(*parts) for parts in zip(socks, keepers, names, strict=True)]

    def close(self) -> None:
        """Give the places back."""
        self._rendezvous.close()
        self._drop_late_ranks()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._owns_ray:
            ray.shutdown()

    def _place(self, timeout: float) -> list[Any]:
        on_gpu = self._plan.device.startswith("cuda")
        bundle = {"CPU": self._settings.num_cpus, **({"GPU": 1.0} if on_gpu else {})}
        count = self._plan.world_size
        if self._group is None:
            self._group = placement_group([bundle] * count, strategy=self._settings.placement)
        if not self._group.wait(timeout):
            raise EngineStartError(
                f"the Ray cluster has no room for {count} ranks of {bundle} within {timeout:.0f} s "
                f"(--join-timeout); it has {ray.cluster_resources()}"
            )
        paths = os.environ.get("PYTHONPATH", "")
        actor = ray.remote(RankKeeper)
        return [
            actor.options(
                num_cpus=self._settings.num_cpus,
                num_gpus=1 if on_gpu else 0,
                runtime_env={"env_vars": {"PYTHONPATH": paths}} if paths else None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank
                ),
            ).remote()
            for rank in range(count)
        ]

    def _admit(self, sock: socket.socket, hello: Hello, _address: str) -> None:
        with self._joined:
            if hello.attempt != self._attempt:
                sock.close()
                return
            self._socks[hello.attempt, hello.local_rank] = sock
            self._joined.notify_all()

    def _drop_late_ranks(self) -> None:
        """Close the connections of ranks that joined after their attempt was given up."""
        for sock in self._socks.values():
            sock.close()
        self._socks.clear()
