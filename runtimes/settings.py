"""How a session uses the machine: threads, memory, and how a long input is cut up. No result depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from artifacts.constraints import Between
from artifacts.target import CPU_PROVIDER, OPENVINO_PROVIDER

from .environment import physical_cores

MAX_TOKENS = 1024
"""Padded tokens a batch: real text is short and uneven, and larger batches only add padding (shared/FACTS.md)."""

_CPU_TOKENS = 512
_RUN_TOKENS = 24
_MOST_LANES = 32


@dataclass(frozen=True)
class Settings:
    """What is chosen per machine. It changes a result by rounding at most.

    Attributes:
        threads: Threads within an operator, of the session that runs one batch after another.
        spinning: Those threads wait actively for their next piece of work while a run lasts; between runs never.
        arena: The CPU provider keeps the memory of a run for the next one.
        lanes: Batches of a long input that run at once; 1: one after another. See `SessionPool`.
        max_tokens: Padded tokens a batch, where the caller does not say.
        run_tokens: Tokens that a thread computes in the time that a run takes besides its tokens; see `padding`.
        tuned: It was measured on this machine; see `runtimes.tune`.
    """

    threads: Annotated[int, Between(1, 1024)]
    spinning: bool = True
    arena: bool = True
    lanes: Annotated[int, Between(1, 1024)] = 1
    max_tokens: Annotated[int, Between(1, 1 << 20)] = MAX_TOKENS
    run_tokens: Annotated[int, Between(1, 1 << 20)] = 1 << 20
    tuned: bool = False

    @property
    def padding(self) -> int:
        """Tokens of padding that cost as much as one more run: a batch with more of them is better cut in two."""
        return self.run_tokens * self.threads

    def describe(self, *, text: bool) -> str:
        """In words; with what concerns texts only where ``text``."""
        words = [counted(self.threads, "thread")]
        words += [] if self.spinning else ["no spinning"]
        words += [] if self.arena else ["no arena"]
        words += [f"long inputs in {self.lanes} lanes"] if text and self.lanes > 1 else []
        words += [f"{self.max_tokens} tokens a batch"] if text else []
        return ", ".join(words)


def default_settings(provider: str, device: str = "cpu", threads: int = 0) -> Settings:
    """What to do where nothing was measured.

    On a CPU a long input runs in as many lanes as there are threads, each lane a batch of its own on one thread: short
    texts leave several threads within an operator waiting for each other. Measured on two cores over the sentences of
    STS-B against one lane of both threads: 1.20 times the throughput on the CPU provider, 1.11 on OpenVINO. One
    tokenizer feeds no more than 32 lanes. The CPU provider's kernels like 512 tokens a batch better than 1024 (1.06),
    OpenVINO's 1024 better than 512 (1.04). A run reads the weights once, whatever it computes: on one thread that takes
    as long as 24 tokens do, on two as 47.

    Args:
        provider: Execution provider, by full name.
        device: ``cpu``, ``cuda``, ``cuda:1``...
        threads: Threads within an operator; 0 means the physical cores this process may use.
    """
    chosen = threads or physical_cores()
    on_cpu = provider in (CPU_PROVIDER, OPENVINO_PROVIDER) and device == "cpu"
    tokens = _CPU_TOKENS if provider == CPU_PROVIDER else MAX_TOKENS
    if not on_cpu:
        return Settings(chosen, max_tokens=tokens)
    return Settings(chosen, lanes=min(chosen, _MOST_LANES), max_tokens=tokens, run_tokens=_RUN_TOKENS)


def counted(number: int, name: str) -> str:
    """``1 lane``, ``2 lanes``."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
