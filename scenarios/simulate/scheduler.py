"""One thread at a time, in simulated time: the same seed gives the same run.

The drivers' threads are real threads, but only the one that holds the baton runs. It
gives the baton away where it waits: for a time, an event, a lock or an answer. Who is
next is decided by simulated time alone.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Crashed(BaseException):
    """The agent that this thread belongs to is dead: nothing it does has an effect."""


class Life:
    """What threads belong to: one run of an agent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False


class Task:
    """One thread. ``waiting`` is what it waits on besides time."""

    def __init__(self, name: str, life: Life | None, target: Callable[[], object]) -> None:
        self.name = name
        self.life = life
        self.target = target
        self.baton = threading.Lock()
        self.baton.acquire()
        self.ticket = 0  # of its place in the queue; an older one is no longer valid
        self.ended = False
        self.joined: list[Task] = []
        self.worker: _Worker | None = None

    def is_alive(self) -> bool:
        """See Clock."""
        return not self.ended

    def join(self, timeout: float | None = None) -> None:
        """See Clock. The simulation never stops an agent in order."""
        raise NotImplementedError


class _Worker:
    """A thread that runs one task after another, so that tasks are cheap."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.task: Task | None = None
        self.begin = threading.Lock()
        self.begin.acquire()
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        while True:
            self.begin.acquire()
            task = self.task
            if task is None:
                return
            task.baton.acquire()
            self.scheduler.run_task(task)


class Scheduler:
    """Simulated time and the queue of who goes when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sequence = 0
        self._queue: list[tuple[float, int, Task | Callable[[], object]]] = []
        self._idle: list[_Worker] = []
        self.director = Task("director", None, lambda: None)
        self.current = self.director
        self.failure: BaseException | None = None
        self.tasks: set[Task] = set()
        self.switches = 0
        self.paused: dict[str, float] = {}  # until when, by the first word of a task's name

    def reset(self) -> None:
        """A new run. No task may be left."""
        assert not self.tasks, [t.name for t in self.tasks]
        self.now, self._sequence, self._queue = 0.0, 0, []
        self.failure = None
        self.switches = 0
        self.paused = {}

    def pause(self, name: str, seconds: float) -> None:
        """Threads whose name begins with *name* don't go for a while."""
        self.paused[name] = self.now + seconds

    def unpause(self) -> None:
        """All go."""
        self.paused = {}

    def drain(self) -> None:
        """Let the threads of dead agents end. Called by the director."""
        self._queue = [item for item in self._queue if isinstance(item[2], Task)]
        heapq.heapify(self._queue)
        while self.tasks:
            self._enqueue(float("inf"), self.current)
            self._switch()

    # ------------------------------------------------------------ for seams

    def check(self) -> None:
        """Raises Crashed in a thread of a dead agent."""
        life = self.current.life
        if life is not None and life.dead:
            raise Crashed

    def sleep(self, seconds: float) -> None:
        """Let others go for a while."""
        self.check()
        self._enqueue(self.now + seconds, self.current)
        self._switch()
        self.check()

    def block(self) -> None:
        """Wait until somebody wakes us."""
        self.check()
        self.current.ticket = 0
        self._switch()
        self.check()

    def wake(self, task: Task) -> None:
        """Let a task go now. One that has a place in the queue loses it."""
        if not task.ended:
            self._enqueue(self.now, task)

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Call *action* in a while. It must not wait."""
        self._sequence += 1
        heapq.heappush(self._queue, (self.now + seconds, self._sequence, action))

    def start(self, name: str, life: Life | None, target: Callable[[], object]) -> Task:
        """A new thread, which goes when its turn comes."""
        task = Task(name, life, target)
        task.worker = self._idle.pop() if self._idle else _Worker(self)
        task.worker.task = task
        task.worker.begin.release()
        self.tasks.add(task)
        self._enqueue(self.now, task)
        return task

    def kill(self, life: Life) -> None:
        """All threads of *life* end without another effect."""
        life.dead = True
        for task in sorted(self.tasks, key=lambda t: t.name):
            if task.life is life:
                self.wake(task)

    # ------------------------------------------------------------ the baton

    def _enqueue(self, when: float, task: Task) -> None:
        self._sequence += 1
        task.ticket = self._sequence
        heapq.heappush(self._queue, (when, self._sequence, task))

    def _next(self) -> Task:
        while True:
            when, ticket, item = heapq.heappop(self._queue)
            if isinstance(item, Task):
                if item.ticket != ticket or item.ended:
                    continue
                until = self.paused.get(item.name.split(" ", 1)[0], 0.0) if self.paused else 0.0
                if until > max(self.now, when) and not (item.life and item.life.dead):
                    self._enqueue(until, item)
                    continue
                if when != float("inf"):
                    self.now = max(self.now, when)
                item.ticket = 0
                return item
            self.now = max(self.now, when)
            try:
                item()
            except Exception as error:
                self.failure = self.failure or error

    def _switch(self) -> None:
        this = self.current
        task = self._next()
        if task is this:
            return
        self.switches += 1
        self.current = task
        task.baton.release()
        this.baton.acquire()

    def run_task(self, task: Task) -> None:
        """The body of a worker: *task* has the baton."""
        try:
            if task.life is None or not task.life.dead:
                task.target()
        except Crashed:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        task.ended = True
        self.tasks.discard(task)
        assert task.worker is not None
        self._idle.append(task.worker)
        following = self._next()
        self.current = following
        following.baton.release()


class SimulatedEvent(threading.Event):
    """An event whose waiters wait in simulated time."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._waiters: list[Task] = []

    def set(self) -> None:
        """See threading.Event."""
        super().set()
        waiters, self._waiters = self._waiters, []
        for task in waiters:
            self._scheduler.wake(task)

    def wait(self, timeout: float | None = None) -> bool:
        """See threading.Event."""
        if not self.is_set():
            self._waiters.append(self._scheduler.current)
            try:
                if timeout is None:
                    self._scheduler.block()
                else:
                    self._scheduler.sleep(timeout)
            finally:
                if self._scheduler.current in self._waiters:
                    self._waiters.remove(self._scheduler.current)
        return self.is_set()


class SimulatedLock:
    """A lock that its holder may take again; who waits, waits in simulated time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._holder: Task | None = None
        self._depth = 0
        self._waiters: list[Task] = []

    def __enter__(self) -> SimulatedLock:
        task = self._scheduler.current
        while self._holder not in (None, task):
            self._waiters.append(task)
            try:
                self._scheduler.block()
            finally:
                if task in self._waiters:
                    self._waiters.remove(task)
        self._holder = task
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
            if self._waiters:
                self._scheduler.wake(self._waiters[0])
