"""A rank without a model: `python fake_rank.py FD STACKS_FD FOLDER FAULT`.

Everything between the engine and its ranks is real; only the device is not.  Ranks wait for one another
in every phase by way of files, as they would in a collective.  FAULT is `rank:phase:action`: what one of
them does, once, when it gets there.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path

from core.ranks.messages import Joined
from core.ranks.worker import STACK_SIGNAL, Worker
from core.step import StepResult


class Device:
    """Draws the number of the step for every row."""

    def __init__(self, rank, world_size, folder, fault):
        self.rank, self.world_size, self.folder = rank, world_size, folder
        self.fault_rank, self.fault_phase, self.fault_action = fault.split(":")
        self.launched = deque()
        self.num_visits = {}

    def meet(self, phase):
        """Do what the fault says, then wait until all ranks are in this phase."""
        if (str(self.rank), phase) == (self.fault_rank, self.fault_phase):
            self.fail()
        count = self.num_visits[phase] = self.num_visits.get(phase, 0) + 1
        (self.folder / f"{phase}-{count}-{self.rank}").touch()
        everybody = [self.folder / f"{phase}-{count}-{rank}" for rank in range(self.world_size)]
        self.all_reduce_in_distributed(everybody)

    def all_reduce_in_distributed(self, files):
        while not all(file.exists() for file in files):
            time.sleep(0.002)

    def fail(self):
        marker = self.folder.parent / "failed"
        if marker.exists() and not self.fault_action.endswith("always"):
            return
        marker.touch()
        action = self.fault_action.removesuffix("-always")
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "raise":
            raise RuntimeError("planted")
        elif action == "hang":
            self.hang_here()
        elif action == "exit":
            os._exit(7)

    def hang_here(self):
        time.sleep(1000)

    def load(self, report):
        report(1, 2)
        self.meet("load")
        report(2, 2)

    def kv_capacity(self):
        self.meet("measure")
        return 20 + self.rank

    def allocate(self, num_blocks):
        self.meet("allocate")

    def submit(self, plan):
        result = StepResult(plan.step, [5 if samples else -1 for samples in plan.samples])
        try:
            self.meet("step")
        except RuntimeError as error:
            result = error
        self.launched.append(result)

    def collect(self):
        result = self.launched.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self):
        pass


class FakeWorker(Worker):
    def __init__(self, sock, folder, fault):
        super().__init__(sock)
        self.folder, self.fault = folder, fault

    def _begin(self, begin):
        # Each start of the ranks has a store of its own.
        folder = self.folder / str(begin.store_port)
        folder.mkdir(exist_ok=True)
        self._executor = Device(begin.rank, begin.world_size, folder, self.fault)
        self._executor.meet("join")
        self._is_sampling = begin.rank == 0
        self._send(Joined("fake"))


if __name__ == "__main__":
    fd, stacks, folder, fault = sys.argv[1:]
    faulthandler.register(STACK_SIGNAL, file=int(stacks), all_threads=True)
    code = FakeWorker(socket.socket(fileno=int(fd)), Path(folder), fault).run()
    os._exit(code)
