"""Ranks on several machines.

One machine runs the engine and listens; each other one runs an *agent* (`serve` with `--node-rank` above
0), which joins it and starts ranks there when it is told to.  Every rank has a connection of its own to
the engine.  Both ends prove that they know the cluster's key before anything else is said.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from core.errors import ConfigError, CytheraError, EngineStartError
from core.link import READ_BYTES, Framer, encode
from core.ranks.launch import LOOPBACK, ProcessLauncher, describe_exit, end, start_worker
from core.ranks.rendezvous import Hello, Rendezvous, join
from core.ranks.watch import STACK_WAIT
from core.sharding import divide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from core.config import EngineConfig
    from core.plan import Plan
    from core.ranks.launch import Worker
    from core.ranks.watch import RankHandle

log = structlog.get_logger(__name__)

RETRY_SECONDS: Final = 0.5
AGENT: Final = -1
"""The `local_rank` of an agent's own connection."""


class Spawn(msgspec.Struct, tag=True, frozen=True):
    """Start so many ranks, after ending those of earlier attempts."""

    num_ranks: int
    attempt: int


class AskStack(msgspec.Struct, tag=True, frozen=True):
    """Get the stacks of a rank that does not answer."""

    local_rank: int
    attempt: int


class Ended(msgspec.Struct, tag=True, frozen=True):
    """How a rank's process ended."""

    local_rank: int
    attempt: int
    how: str


class Stack(msgspec.Struct, tag=True, frozen=True):
    """What `AskStack` asked for."""

    local_rank: int
    attempt: int
    text: str


class Goodbye(msgspec.Struct, tag=True, frozen=True):
    """The engine has ended as planned."""


ToAgent = Spawn | AskStack | Goodbye
FromAgent = Ended | Stack


# --- the engine's machine --------------------------------------------------------------------------


@dataclass(slots=True)
class Agent:
    """The connection to the agent of one node."""

    node: int
    sock: socket.socket
    address: str
    ended: dict[tuple[int, int], str] = field(default_factory=dict)
    """How ranks ended, by (attempt, local rank)."""
    news: threading.Condition = field(default_factory=threading.Condition)
    stacks: queue.SimpleQueue[Stack] = field(default_factory=queue.SimpleQueue)
    is_gone: bool = False

    def read(self) -> None:
        """Take in what the agent tells until it is gone; on a thread of its own."""
        framer = Framer(FromAgent)
        with contextlib.suppress(OSError, CytheraError):
            while data := self.sock.recv(READ_BYTES):
                for message in framer.feed(data):
                    self._take(message)
        with self.news:
            self.is_gone = True
            self.news.notify_all()

    def _take(self, message: Any) -> None:
        if isinstance(message, Stack):
            self.stacks.put(message)
        elif isinstance(message, Ended):
            with self.news:
                self.ended[message.attempt, message.local_rank] = message.how
                self.news.notify_all()

    def send(self, message: msgspec.Struct) -> None:
        """Send; whoever waits for the answer notices that nobody is there."""
        with contextlib.suppress(OSError):
            self.sock.sendall(encode(message))

    def end(self) -> None:
        """Close the connection, which ends the thread that reads it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class RemoteRank:
    """A rank on another machine; fulfils `core.ranks.watch.RankHandle`."""

    def __init__(
        self, sock: socket.socket, agent: Agent, *, local_rank: int, num_local: int, attempt: int
    ) -> None:
        self.sock = sock
        self.local_rank = local_rank
        self.local_world_size = num_local
        self.name = f"node {agent.node} at {agent.address}, local rank {local_rank}"
        self._agent = agent
        self._key = (attempt, local_rank)

    def ended(self, timeout: float) -> str | None:
        """Say how the process ended, as its agent tells, or that its machine is gone."""
        agent, key = self._agent, self._key
        with agent.news:
            agent.news.wait_for(lambda: key in agent.ended or agent.is_gone, timeout)
            if key in agent.ended:
                return agent.ended[key]
            return "is gone with its machine" if agent.is_gone else None

    def dump_stack(self) -> str:
        """Ask the agent for the stacks of a rank that does not answer."""
        attempt, _ = self._key
        self._agent.send(AskStack(self.local_rank, attempt))
        deadline = time.monotonic() + 4 * STACK_WAIT
        with contextlib.suppress(queue.Empty):
            while (left := deadline - time.monotonic()) > 0:
                stack = self._agent.stacks.get(timeout=left)
                if (stack.attempt, stack.local_rank) == self._key:  # not a late answer about another
                    return stack.text
        return ""

    def kill(self) -> None:
        """Close the connection, upon which the rank ends; a stopped one is ended by its agent."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class ClusterLauncher:
    """Starts ranks on this machine and on all that have joined.

    Fulfils `core.ranks.executor.Launcher`.
    """

    def __init__(self, config: EngineConfig, world_size: int) -> None:
        self.store_host = config.master_addr
        self._timeout = config.join_timeout
        self._counts = [span.size for span in divide(world_size, config.nnodes)]
        self._attempt = 0
        self._agents: dict[int, Agent] = {}
        self._ranks: dict[tuple[int, int, int], socket.socket] = {}
        self._joined = threading.Condition()
        self._rendezvous = Rendezvous(
            config.master_addr, config.master_port, config.cluster_key or "", self._admit
        )

    def start(self) -> Sequence[RankHandle]:
        """Wait for all machines and start all ranks.

        :raises EngineStartError: a machine or one of its ranks has not joined in time.
        """
        self._attempt += 1
        self._drop_late_ranks()
        others = range(1, len(self._counts))
        self._wait_for("machines", lambda: [n for n in others if not self._has_agent(n)])
        for node in others:
            self._agents[node].send(Spawn(self._counts[node], self._attempt))
        wanted = [(self._attempt, n, local) for n in others for local in range(self._counts[n])]
        ranks: list[RankHandle] = [*ProcessLauncher(self._counts[0]).start()]
        try:
            self._wait_for("ranks", lambda: [key for key in wanted if key not in self._ranks], others)
        except BaseException:
            end(ranks)
            raise
        for attempt, node, local in wanted:
            sock = self._ranks.pop((attempt, node, local))
            agent, count = self._agents[node], self._counts[node]
            ranks.append(RemoteRank(sock, agent, local_rank=local, num_local=count, attempt=attempt))
        return ranks

    def close(self) -> None:
        """Let the agents end, and nobody join any more."""
        self._rendezvous.close()
        self._drop_late_ranks()
        for agent in self._agents.values():
            agent.send(Goodbye())
            agent.end()

    def _drop_late_ranks(self) -> None:
        """Close the connections of ranks that joined after their attempt was given up."""
        with self._joined:
            for sock in self._ranks.values():
                sock.close()
            self._ranks.clear()

    def _has_agent(self, node: int) -> bool:
        return node in self._agents and not self._agents[node].is_gone

    def _wait_for(
        self, what: str, list_missing: Callable[[], list[Any]], nodes: Sequence[int] = ()
    ) -> None:
        """Wait until nobody is missing.

        :param nodes: must stay meanwhile.
        :raises EngineStartError: one has not, or the time is over.
        """
        deadline = time.monotonic() + self._timeout
        with self._joined:
            if missing := list_missing():
                log.info("waiting for others to join", missing=missing, what=what)
            while missing := list_missing():
                if left := [node for node in nodes if not self._has_agent(node)]:
                    raise EngineStartError(f"machines {left} left while their ranks were started")
                if time.monotonic() > deadline:
                    raise EngineStartError(
                        f"{what} {missing} have not joined within {self._timeout:.0f} s "
                        f"(--join-timeout); start the same command there with --node-rank N and this "
                        f"machine's --master-addr"
                    )
                self._joined.wait(RETRY_SECONDS)

    def _admit(self, sock: socket.socket, hello: Hello, address: str) -> None:
        if not 0 < hello.node < len(self._counts):
            log.warning("no such node", node=hello.node, nnodes=len(self._counts), address=address)
            sock.close()
            return
        with self._joined:
            if hello.local_rank == AGENT:
                self._replace_agent(hello.node, address)
                agent = self._agents[hello.node] = Agent(hello.node, sock, address)
                threading.Thread(target=agent.read, name=f"node-{hello.node}", daemon=True).start()
            elif hello.attempt == self._attempt:
                self._ranks[hello.attempt, hello.node, hello.local_rank] = sock
            else:
                sock.close()
            self._joined.notify_all()

    def _replace_agent(self, node: int, address: str) -> None:
        """Let go of who had joined as this node before: its machine may have started anew, unnoticed."""
        former = self._agents.get(node)
        if former is None:
            return
        if not former.is_gone:
            log.warning("node joins again", node=node, address=address, before=former.address)
        former.end()


def make_cluster_launcher(plan: Plan) -> ClusterLauncher:
    """Start ranks here and on the machines that join.

    :raises ConfigError: others could join, and there is no key.
    """
    check_key(plan.config)
    return ClusterLauncher(plan.config, plan.world_size)


def check_key(config: EngineConfig) -> None:
    """Refuse to let anybody join by accident.

    :raises ConfigError: the machines are reached over a network, and there is no key.
    """
    if config.cluster_key or config.insecure or config.master_addr == LOOPBACK:
        return
    raise ConfigError(
        f"--nnodes {config.nnodes}: whoever reaches {config.master_addr} port {config.master_port} could "
        f"join and read all prompts; set the same --cluster-key (or CYTHERA_CLUSTER_KEY) on every "
        f"machine, or --insecure if that is meant"
    )


# --- the other machines ----------------------------------------------------------------------------


def run_agent(config: EngineConfig) -> int:
    """Join the engine, run ranks for it, and end when it ends.

    :return: the exit code: 0 if the engine has ended as planned.
    :raises CytheraError: the engine cannot be joined, or is gone without a word.
    """
    check_key(config)
    node, where = config.node_rank, f"{config.master_addr} port {config.master_port}"
    log.info("joining", engine=where, node=node)
    sock = _join_patiently(config)
    log.info("joined", engine=where, node=node)
    agent = _Agent(config, sock)
    try:
        for message in _messages(sock):
            if isinstance(message, Goodbye):
                return 0
            agent.take(message)
    finally:
        agent.end_ranks()
        sock.close()
    raise CytheraError(f"the engine at {where} is gone; start this machine's command again with it")


def _join(config: EngineConfig, local_rank: int, attempt: int) -> socket.socket:
    address = (config.master_addr, config.master_port)
    return join(
        address,
        config.cluster_key or "",
        node=config.node_rank,
        local_rank=local_rank,
        attempt=attempt,
    )


def _join_patiently(config: EngineConfig) -> socket.socket:
    deadline = time.monotonic() + config.join_timeout
    while True:
        try:
            return _join(config, AGENT, 0)
        except CytheraError as error:
            raise CytheraError(
                f"cannot join {config.master_addr} port {config.master_port} as node "
                f"{config.node_rank}: {error}; check --cluster-key, --nnodes and --node-rank"
            ) from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise CytheraError(
                    f"cannot join {config.master_addr} port {config.master_port} within "
                    f"{config.join_timeout:.0f} s (--join-timeout): {error}"
                ) from error
            time.sleep(RETRY_SECONDS)


def _messages(sock: socket.socket) -> Iterator[Any]:
    framer = Framer(ToAgent)
    with contextlib.suppress(OSError):
        while data := sock.recv(READ_BYTES):
            yield from framer.feed(data)


class _Agent:
    """Runs the ranks of one machine, as the engine says."""

    def __init__(self, config: EngineConfig, sock: socket.socket) -> None:
        self._config = config
        self._sock = sock
        self._lock = threading.Lock()
        self._workers: list[Worker] = []

    def take(self, message: Any) -> None:
        """Obey one message."""
        if isinstance(message, Spawn):
            self.end_ranks()
            for local_rank in range(message.num_ranks):
                self._spawn(local_rank, message.attempt)
        elif isinstance(message, AskStack) and message.local_rank < len(self._workers):
            text = self._workers[message.local_rank].dump_stack()
            self._tell(Stack(message.local_rank, message.attempt, text))

    def end_ranks(self) -> None:
        """Kill every rank of this machine."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _spawn(self, local_rank: int, attempt: int) -> None:
        try:
            sock = _join(self._config, local_rank, attempt)
        except OSError as error:
            raise CytheraError(f"a rank cannot join the engine: {error}") from error
        worker = start_worker(sock)
        self._workers.append(worker)
        threading.Thread(target=self._wait, args=(worker, local_rank, attempt), daemon=True).start()

    def _wait(self, worker: Worker, local_rank: int, attempt: int) -> None:
        how = describe_exit(worker.process.wait())
        self._tell(Ended(local_rank, attempt, how))

    def _tell(self, message: msgspec.Struct) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._sock.sendall(encode(message))
