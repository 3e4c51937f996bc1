"""From the queue to the workers and back: what goes where and when, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from artifacts.errors import DeadlineError, HastenError, OverloadError, WorkerError

from .batcher import Batch, take_batch
from .calls import MOST_PRIORITY, Answer, Call, EngineOptions
from .crew import Crew
from .host import Host
from .placement import LEAST_TOKENS, RUN_SECONDS, Trust, choose
from .rows import pack, unpack
from .stats import Counters, Stats
from .streams import Streams, Writing
from .waiting import Ticket, Waiting, Work
from .wire import Arrays, Message, read_error

_LEAST_RETRY = 0.1
_URGENT_MEMORY = 10.0
_MOST_AT_WORKER = 4


class Dispatcher:
    """Takes requests, sends them to workers in batches, and hands back what comes.

    Args:
        options: Of the engine.
        load: What a worker is told to load; one list entry a worker.
    """

    def __init__(self, options: EngineOptions, loads: Sequence[Message]) -> None:
        self.options = options
        self.counters = Counters()
        self.waiting = Waiting(options.queue_requests, options.queue_tokens)
        hosts = [Host(load, self, hang_timeout=options.hang_timeout) for load in loads]
        self.crew = Crew(hosts, self._wanted, options.idle_timeout)
        self.streams = Streams(self.counters, self.settle, self._fail)
        self._numbers = 0
        self._scheduled = False
        self._later: asyncio.TimerHandle | None = None
        self._company = self._company_tokens = 0.0
        self._trust = Trust()
        self._levels: dict[int, float] = {}
        self._open: set[Ticket] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def start(self) -> None:
        """Start the workers.

        Raises:
            HastenError: None of them loads the bundle.
        """
        await self.crew.start()
        for host in self.crew.ready:
            self._learn(host)
        self.crew.rest(busy=False)

    def next_number(self) -> int:
        """A number that no request or batch had."""
        self._numbers += 1
        return self._numbers

    def admit(self, call: Call, cost: int) -> float:
        """Refuse a request that cannot be done, before anything is made of it.

        Returns:
            Seconds that it is expected to take, where it has a timeout; else 0.

        Raises:
            OverloadError: There is no room for it, or its time is too short.
            WorkerError: No worker can load the bundle any more.
        """
        if self.crew.hopeless:
            why = self.crew.failure.what if self.crew.failure is not None else "all workers are gone"
            raise WorkerError(f"no worker runs: {why}", "It is tried again every few seconds")
        try:
            return self._check_room(call, cost)
        except OverloadError:
            self.counters.add("refused")
            raise

    def _check_room(self, call: Call, cost: int) -> float:
        self.waiting.check(cost, lambda: max(_LEAST_RETRY, self.expected_wait(-MOST_PRIORITY)))
        if call.timeout is None:
            return 0.0
        own = min((host.run_seconds(cost, self.waiting.tokens) for host in self.crew.ready), default=0.0)
        wait = self.expected_wait(call.priority)
        if self._trust.late(wait + own, call.timeout):
            said = f"it would take {self._trust.seconds(wait + own):.3g} s, too much of the {call.timeout:.3g} s it has"
            raise OverloadError(said, "Try again later, or give it more time", retry_after=max(_LEAST_RETRY, wait))
        return wait + own

    def expected_wait(self, priority: int) -> float:
        """Seconds until a newcomer of that priority would begin, from what was measured; 0 where nothing was."""
        ready = self.crew.ready
        if not ready:
            return 0.0
        streamed = self.streams.expected_wait(self.waiting, ready, priority)
        rate = sum(host.rate for host in ready)
        if rate <= 0.0:
            return streamed
        left = sum(host.remaining() for host in ready) / len(ready)
        return max(streamed, left + self.waiting.ahead(priority) / rate)

    def submit(self, ticket: Ticket) -> None:
        """Let a request wait that was admitted."""
        self.counters.add("accepted")
        self._levels[ticket.call.priority] = ticket.arrived
        self._open.add(ticket)
        self._quiet.clear()
        if ticket.call.timeout is not None:
            ticket.timer = asyncio.get_running_loop().call_at(ticket.deadline, self._late, ticket)
        self.waiting.add(ticket)
        self._wanted()

    def give_up(self, ticket: Ticket) -> None:
        """The caller does not want it any more: what did not start is dropped."""
        if not ticket.future.done():
            ticket.future.cancel()
        self.settle(ticket, "cancelled")

    def settle(self, ticket: Ticket, outcome: str) -> None:
        """A request ended; count it, once, and let go of it everywhere."""
        if ticket.timer is not None:
            ticket.timer.cancel()
        if ticket not in self._open:
            return
        self._open.discard(ticket)
        self.counters.add(outcome)
        seconds = asyncio.get_running_loop().time() - ticket.arrived
        if outcome == "done":
            self.counters.total_seconds.add(seconds)
        if ticket.expected and outcome in ("done", "deadline_missed"):
            self._trust.learn(ticket.expected, seconds)
        self.waiting.remove(ticket)
        if isinstance(ticket, Writing):
            self.streams.stop(self.crew.hosts, ticket)
        else:
            self._drop(ticket)
        self._rest()

    async def close(self, drain: float) -> None:
        """Wait until all is answered, so many seconds at most; fail the rest and end the workers."""
        try:
            async with asyncio.timeout(drain):  # wait_for may swallow a cancellation
                await self._quiet.wait()
        except TimeoutError:
            self._fail_all(WorkerError("the engine was closed before it could answer"))
        finally:
            if self._later is not None:
                self._later.cancel()
            await self.crew.close()
            self._fail_all(WorkerError("the engine was closed"))

    def stats(self) -> Stats:
        """What happened so far."""
        now = {
            "queue_requests": len(self.waiting),
            "queue_tokens": self.waiting.tokens,
            "outstanding": sum(ticket.started is not None for ticket in self._open),
        }
        return self.counters.stats(tuple(host.stats() for host in self.crew.hosts), now)

    # What workers say.

    def heard(self, host: Host, message: Message, arrays: Arrays) -> None:
        """A worker finished a batch, or wrote something."""
        self._wanted()  # First: the worker is to have its next batch before the answers of this one are written.
        if message.get("op") == "done":
            batch = host.batches.pop(int(message["id"]), None)
            if batch is not None and not message.get("dropped"):
                self.crew.proven(host)
                self._finished(host, batch, message, arrays)
        else:
            self.crew.proven(host)
            self.streams.heard(host, message)

    def died(self, host: Host, reason: str) -> None:
        """A worker ended: what it had is tried once more elsewhere, and it is started again."""
        batches, host.batches = list(host.batches.values()), {}
        writings = self.streams.lost(host)
        self.crew.replace(host)
        death = self.next_number()
        for part in (part for batch in batches for part in batch.parts):
            if not part.work.done and self._once_more(part.work, host, death, reason):
                self.waiting.remove(part.work)
                part.work.alone = True
                part.work.give_back(part)
                self.waiting.add(part.work)
        for writing in writings:
            if not writing.done and self._once_more(writing, host, death, reason):
                self.waiting.add(writing)
        self._wanted()

    def _once_more(self, ticket: Ticket, host: Host, death: int, reason: str) -> bool:
        """Whether a request may be tried again; otherwise it has failed."""
        if ticket.death != death:
            ticket.retries += 1
        ticket.death, ticket.avoid = death, host
        if ticket.retries > 1:
            self._fail(ticket, WorkerError(f"{reason}, and so did the one before it", "Try again"))
            return False
        self.counters.add("retried")
        return True

    # From the queue to the workers.

    def _wanted(self) -> None:
        """Look at the queue, once for all that happens in this turn of the loop: who comes together goes together."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        while (head := self.waiting.head) is not None:
            if self.crew.hopeless:
                failure = self.crew.failure
                self._fail(head, WorkerError(f"no worker runs: {failure.what if failure else 'all are gone'}"))
                continue
            if not self.crew.ready:
                self.crew.wake()
                return
            self.crew.rest(busy=True)
            if not (self._write(head) if isinstance(head, Writing) else self._send_batch(head)):
                return

    def _write(self, writing: Writing) -> bool:
        host = self.streams.place(writing, self.crew.ready)
        if host is None:
            return False
        self.waiting.remove(writing)
        self._begun(writing)
        try:
            self.streams.send(host, writing)
        except HastenError as error:
            self._fail(writing, error)
        return True

    def _send_batch(self, head: Ticket) -> bool:
        ready = self.crew.ready
        backlog = self.waiting.tokens
        free = [host for host in ready if self._takes(host, head, backlog)]
        elsewhere = [host for host in free if host is not head.avoid]
        busy = [host for host in ready if host not in free]
        host = choose(elsewhere or free, busy, min(head.left, LEAST_TOKENS), backlog)
        if host is None:
            return False
        idle = sum(not one.batches for one in ready)
        budget = self._budget(host, head)
        if idle > 1:
            budget = min(budget, max(LEAST_TOKENS // 4, -(-backlog // idle)))
        if not host.batches and self._better_wait(head, backlog, budget):
            return False
        number, little = self.next_number(), host.little(head.method)
        self._dispatch(host, take_batch(self.waiting, number, budget, tensors=host.apart, little=little))
        return True

    def _takes(self, host: Host, head: Ticket, backlog: int) -> bool:
        """Whether a worker takes a batch: it is idle, or the next would be full, or something urgent comes."""
        at_work = host.batches.values()
        if not at_work:
            return True
        if len(at_work) == 1 and backlog >= self._budget(host, head):
            return True
        return len(at_work) < _MOST_AT_WORKER and all(head.call.priority > batch.priority for batch in at_work)

    def _budget(self, host: Host, head: Ticket) -> int:
        """Tokens of a batch; few where more urgent requests came lately, for they wait until it is done."""
        if self.options.max_batch_tokens:
            return self.options.max_batch_tokens
        since = asyncio.get_running_loop().time() - _URGENT_MEMORY
        urgent = any(level > head.call.priority and when > since for level, when in self._levels.items())
        return host.little(head.method) if urgent else host.speed(head.method).budget(RUN_SECONDS)

    def _better_wait(self, head: Ticket, backlog: int, budget: int) -> bool:
        """Whether an idle worker should wait a moment for company: others keep the engine busy, and few are here."""
        delay = self.options.max_delay
        if not delay or self._company < 2.0 or backlog >= min(budget, self._company_tokens / 2):
            return False
        loop = asyncio.get_running_loop()
        if loop.time() >= head.arrived + delay:
            return False
        if self._later is None or self._later.cancelled() or self._later.when() < loop.time():
            self._later = loop.call_at(head.arrived + delay, self._wanted)
        return True

    def _dispatch(self, host: Host, batch: Batch) -> None:
        for part in batch.parts:
            self._begun(part.work)
        self._company += 0.1 * (len(batch.parts) - self._company)
        self._company_tokens += 0.1 * (batch.cost - self._company_tokens)
        message: dict[str, Any] = {"op": "work", "id": batch.number, "method": batch.method, "priority": batch.priority}
        try:
            if batch.method == "run":
                feeds = pack((index, part.work.items[0]) for index, part in enumerate(batch.parts))
                host.send({**message, "parts": [[]] * len(batch.parts)}, feeds)
            else:
                parts = [[part.work.items[index] for index in part.indices] for part in batch.parts]
                host.send({**message, "parts": parts})
        except HastenError as error:
            self._refuse(batch, error)
            return
        batch.sent = asyncio.get_running_loop().time()
        host.batches[batch.number] = batch
        self.counters.add("batches")

    def _refuse(self, batch: Batch, error: HastenError) -> None:
        """A batch that cannot be sent: each request by itself, to find whose fault it is."""
        for part in batch.parts:
            if len(batch.parts) == 1:
                self._fail(part.work, error)
            else:
                part.work.alone = True
                self.waiting.remove(part.work)
                part.work.give_back(part)
                self.waiting.add(part.work)
        self._wanted()

    def _begun(self, ticket: Ticket) -> None:
        if ticket.started is None:
            ticket.started = asyncio.get_running_loop().time()
            self.counters.queue_seconds.add(ticket.started - ticket.arrived)

    # From the workers to the callers.

    def _finished(self, host: Host, batch: Batch, message: Message, arrays: Arrays) -> None:
        tokens = sum(int(told.get("tokens", 0)) for told in message["parts"])
        # As we saw it, pipes and our own delays included: those who wait wait for them too.
        now = asyncio.get_running_loop().time()
        began, host.replied = max(batch.sent, host.replied), now
        host.speed(batch.method).add(batch.cost, max(float(message["seconds"]), now - began))
        self.counters.add("tokens_in", tokens)
        vectors = arrays.get("embedding") if batch.method == "embed" else None
        outputs = unpack(arrays, len(batch.parts)) if batch.method == "run" else []
        start = 0
        for index, (part, told) in enumerate(zip(batch.parts, message["parts"], strict=True)):
            if "error" in told:
                self._fail(part.work, read_error(told["error"]))
                continue
            work = part.work
            work.tokens += int(told["tokens"])
            if vectors is not None:
                work.accept_vectors(part, vectors[start : start + len(part.indices)])
                start += len(part.indices)
            elif batch.method == "run":
                work.accept_arrays({name: array.copy() for name, array in outputs[index].items()})
            else:
                work.accept_rows(part, told["rows"])
            answer = work.answer()
            if answer is not None:
                self._answered(work, answer)

    def _answered(self, work: Work, answer: Answer) -> None:
        if not work.future.done():
            work.future.set_result(answer)
            self.settle(work, "done")

    def _fail(self, ticket: Ticket, error: HastenError) -> None:
        late = isinstance(error, DeadlineError)
        if not ticket.future.done():
            ticket.future.set_exception(error)
            ticket.future.exception()  # Whoever waits for it sees it; where nobody does, that is no news.
            ticket.ended()
        self.settle(ticket, "deadline_missed" if late else "failed")

    def _late(self, ticket: Ticket) -> None:
        if not ticket.done:
            self._fail(ticket, DeadlineError(f"the answer was not there within {ticket.call.timeout:g} s"))

    def _fail_all(self, error: HastenError) -> None:
        for ticket in list(self._open):
            self._fail(ticket, error)

    def _drop(self, ticket: Ticket) -> None:
        """Take back batches at a worker that nobody waits for any more, if they did not start."""
        for host in self.crew.hosts:
            for batch in host.batches.values():
                mine = any(part.work is ticket for part in batch.parts)
                if mine and all(part.work.done for part in batch.parts):
                    host.send({"op": "drop", "id": batch.number})

    def _rest(self) -> None:
        if not self._open:
            self._quiet.set()
            self.crew.rest(busy=False)

    def _learn(self, host: Host) -> None:
        """What the worker measured when it started."""
        method = "embed" if host.told.get("embeds") else "rows"
        for tokens, seconds in host.told.get("warm", ()):
            host.speed(method).add(int(tokens), float(seconds))
