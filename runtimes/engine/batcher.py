"""Which waiting requests go to a worker together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from .waiting import Part, Waiting, Work

_LOOK = 64


@dataclass(eq=False)
class Batch:
    """Parts of requests that a worker computes together.

    Attributes:
        number: Names it on the wire.
        method: Of all its parts.
        parts: From different requests.
        cost: Tokens, as estimated.
        priority: The highest of its requests.
        sent: When it was sent, on the loop's clock.
    """

    number: int
    method: str
    parts: Sequence[Part]
    cost: int
    priority: int
    sent: float = 0.0


def take_batch(
    waiting: Waiting, number: int, budget: int, *, tensors: bool = False, little: int | None = None
) -> Batch:
    """The request whose turn it is with others that suit it: of its method and form, of about its length, within the
    budget.

    Args:
        waiting: What waits; its head is a `Work`. What is taken whole waits no longer.
        number: Of the batch.
        budget: Tokens; the first item may have more.
        tensors: Whether rows of plain tensors may be computed together.
        little: Tokens up to which the head takes along what is less urgent than itself; None: as many as the budget.
    """
    head = waiting.head
    if not isinstance(head, Work):
        raise TypeError("the head of the queue is no work for a batch")
    length = head.length
    parts = [_take(waiting, head, budget)]
    cost = parts[0].cost
    if not head.alone and head.form is not None and (tensors or head.method != "run") and cost < budget:
        for other in _company(waiting, head, length, budget - cost):
            less = little is not None and other.call.priority < head.call.priority
            most = min(budget, little) if less and little is not None else budget
            if cost + min(other.length, most) > most:
                continue
            parts.append(_take(waiting, other, most - cost))
            cost += parts[-1].cost
            if cost >= budget:
                break
    priority = max(part.work.call.priority for part in parts)
    return Batch(number, head.method, parts, cost, priority)


def _take(waiting: Waiting, work: Work, budget: int) -> Part:
    waiting.remove(work)
    part = work.take(budget)
    if work.waits:
        waiting.add(work)
    return part


def _company(waiting: Waiting, head: Work, length: int, room: int) -> list[Work]:
    """Requests that may go with the head: in their order if all fit, else those nearest in length first."""
    wanted = (head.method, head.form)
    found = [
        one
        for one in islice(waiting, _LOOK)
        if isinstance(one, Work) and one is not head and (one.method, one.form) == wanted and not one.alone
    ]
    if sum(one.left for one in found) <= room:
        return found
    # The head goes first whatever its length, so that nobody is passed over for ever.
    return sorted(found, key=lambda one: abs(one.length - length))
