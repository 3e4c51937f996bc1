"""Texts held to a grammar, token by token: masks of what may follow, computed while the model computes its logits.

A token may follow if the bytes that it adds can still become a text of the grammar (llguidance: Earley's parser over a
lexer of derivatives, walked along a trie of the vocabulary). Where the grammar leaves one text only, the mask leaves
the tokens that the tokenizer would cut it into.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import InstallationError, UsageError

from .aside import Aside, Pending
from .grammars import Form, grammar_of
from .pieces import Pieces, Segmenter, pieces_of
from .prompts import PromptEncoder
from .results import Finish

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

_KEPT = 64
_MOST_SECONDS = 5.0
_LONGEST = 300
_LIMITS = {
    "max_items_in_row": 20_000,  # an item for each property that an object may go on with, and some
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Constraints:
    """Makes constraints for one tokenizer, and keeps the last grammars. May be used by several threads.

    Args:
        encoder: Of the model.
        size: Tokens that logits are given for.
    """

    def __init__(self, encoder: PromptEncoder, size: int) -> None:
        self._encoder = encoder
        self._size = size
        self._lock = threading.Lock()
        self._tokens: _Tokens | None = None
        self._kept: OrderedDict[Form, _Grammar] = OrderedDict()
        self._aside = Aside("hasten-masks")

    def constraint(self, form: Form, end: Iterable[int], forbidden: Iterable[int] = ()) -> Constraint:
        """What texts of that form have to obey.

        Args:
            form: What they have to look like.
            end: Token ids that end a text: allowed where it is complete, and nowhere else.
            forbidden: Token ids that are never allowed.

        Raises:
            UsageError: It is no schema or expression, uses something that is not supported, cannot be satisfied (with
                this vocabulary), or is too large.
            InstallationError: llguidance is not installed.
        """
        with self._lock:
            grammar = self._kept.pop(form, None)
        if grammar is None:
            grammar = self._compile(form)
        with self._lock:
            self._kept[form] = grammar
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return Constraint(grammar, self._aside, _ids(end), _ids(forbidden))

    def close(self) -> None:
        """End the thread that computes masks."""
        self._aside.close()

    def _compile(self, form: Form) -> _Grammar:
        with self._lock:
            if self._tokens is None:
                self._tokens = _Tokens(self._encoder, self._size)
            tokens = self._tokens
        # The library bounds its work, but not every path of it: then the caller at least is let go.
        return _within(_MOST_SECONDS, lambda: _Grammar(form, tokens), form.kind)


@dataclass(frozen=True)
class _Mask:
    """What a token must not be, bool [vocabulary]; or why the text ends instead."""

    blocked: Bools
    finish: Finish | None


class Constraint:
    """What a text has to look like; any number of texts may be held to it.

    Args:
        grammar: Compiled.
        aside: Where masks are computed.
        end: Token ids that end a text, int64.
        forbidden: Token ids that are never allowed, int64.
    """

    def __init__(self, grammar: _Grammar, aside: Aside, end: NDArray[Any], forbidden: NDArray[Any]) -> None:
        self.aside = aside
        self._grammar = grammar
        self._end = end
        self._forbidden = forbidden
        self.first = self.mask(grammar.first, begin=True)

    def start(self) -> Matcher:
        """For a text that has not begun."""
        return Matcher(self, self._grammar.copy())

    def mask(self, allowed: Bools, *, begin: bool) -> _Mask:
        """What is allowed by the grammar, see `_allowed`, and here; ``begin``: of the first token of a text."""
        size = self._grammar.size
        complete, blocked = bool(allowed[size]), ~allowed[:size]
        if begin and self._grammar.begins is not None:
            blocked |= ~self._grammar.begins
        text = not blocked.all()
        blocked[self._end] = not complete
        blocked[self._forbidden] = True
        if blocked.all():
            return _Mask(blocked, "stop" if complete else "constraint")
        return _Mask(blocked, "stop" if complete and not text else None)

    def masks(self, matcher: Any, tokens: Sequence[int], *, begin: bool) -> list[_Mask]:
        """What is allowed now and after each of the tokens, which are taken back; ``begin``: the text has not begun."""
        size = self._grammar.size
        found = [self.mask(_allowed(matcher, size), begin=begin)]
        taken = 0
        for token in tokens:
            if not matcher.consume_token(token):
                break
            taken += 1
            if matcher.is_stopped():
                break
            found.append(self.mask(_allowed(matcher, size), begin=False))
        if taken:
            matcher.rollback(taken)
        return found


class Matcher:
    """What one text may go on with. For one thread at a time.

    Args:
        constraint: On all texts of its form.
        matcher: Of the library, before the first token; its own.

    Attributes:
        finish: Why the text ends here: ``stop`` where it is complete and nothing may follow, ``constraint`` where no
            token may, though it is not; None: it goes on.
    """

    def __init__(self, constraint: Constraint, matcher: Any) -> None:
        self.finish: Finish | None = None
        self._constraint = constraint
        self._inner = matcher
        self._begun = False
        # Masks of now and after each of the foreseen tokens.
        self._ahead: list[_Mask] = [constraint.first]
        self._foreseen: list[int] = []
        self._coming: Pending[list[_Mask]] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing may follow; :attr:`finish` says why."""
        return self.finish is not None

    def mask(self, logits: Floats) -> None:
        """Set the logits float32 [vocabulary] of tokens that may not follow to -inf, in place.

        Where none may follow they stay, and :attr:`done` says so.
        """
        self._settle()
        if not self._ahead:
            self._ahead = self._constraint.masks(self._inner, (), begin=not self._begun)
        mask = self._ahead[0]
        if mask.finish is None:
            np.copyto(logits, -np.inf, where=mask.blocked)
        self.finish = mask.finish

    def accept(self, token: int) -> None:
        """Go on with a token that :meth:`mask` left; the next mask is computed meanwhile."""
        self._settle()
        del self._ahead[:1]
        if self._foreseen[:1] != [token]:
            self._ahead.clear()
        del self._foreseen[:1]
        self._begun = True
        if not self._inner.consume_token(token):
            self.finish = "constraint"
        elif self._inner.is_stopped():
            self.finish = "stop" if self._inner.is_accepting() else "constraint"
        elif not self._ahead:
            self._foreseen.clear()
            self._compute(())

    def admissible(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, from the first on, may follow one after the other."""
        self._settle()
        return 0 if self.done else int(self._inner.validate_tokens(list(tokens)))

    def forced(self) -> list[int]:
        """Tokens that have to follow, where the grammar leaves no choice."""
        self._settle()
        return [] if self.done else list(self._inner.compute_ff_tokens())

    def foresee(self, tokens: Sequence[int]) -> None:
        """Compute the masks before and after each of these tokens, :meth:`admissible`, meanwhile: they may follow."""
        self._settle()
        if not self.done and tokens:
            self._foreseen = list(tokens)
            self._compute(tokens)

    def _compute(self, tokens: Sequence[int]) -> None:
        begin = not self._begun
        self._coming = self._constraint.aside.do(lambda: self._constraint.masks(self._inner, tokens, begin=begin))

    def _settle(self) -> None:
        if self._coming is not None:
            coming, self._coming = self._coming, None
            self._ahead = coming.result()


class _Tokens:
    """A tokenizer as llguidance knows it. Its own end of text is one id beyond the vocabulary."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, encoder: PromptEncoder, size: int) -> None:
        pieces = pieces_of(encoder.vocabulary, size)
        self.eos_token_id = size
        self.tokens = [*pieces.data, b""]
        self.special_token_ids = [index for index, data in enumerate(self.tokens) if not data]
        self.pieces: Pieces = pieces
        self._segmenter = Segmenter(encoder.plain, pieces)
        self.library = _library()
        self.trie = self.library.LLTokenizer(self)

    def __call__(self, text: str) -> list[int]:
        return self._segmenter.ids(text)


class _Grammar:
    """A grammar before its first token."""

    def __init__(self, form: Form, tokens: _Tokens) -> None:
        library = tokens.library
        self._matcher = library.LLMatcher(
            tokens.trie,
            grammar_of(form, library, strips=tokens.pieces.strips),
            log_level=0,
            limits=library.LLParserLimits(**_LIMITS),
        )
        self._check(form)
        self.size = tokens.eos_token_id
        self.begins = tokens.pieces.begins if tokens.pieces.strips else None
        self.first = _allowed(self._matcher, self.size)
        self._check(form)
        if not self.first[: self.size + 1].any():
            raise _hopeless(form)

    def copy(self) -> Any:
        """A matcher of one's own."""
        return self._matcher.deep_copy()

    def _check(self, form: Form) -> None:
        if not self._matcher.is_error():
            return
        said = " ".join(self._matcher.get_error().partition("<")[0].split())
        if said.startswith("NoExtension"):
            raise _hopeless(form)
        line = said if len(said) <= _LONGEST else f"{said[:_LONGEST]} …"
        raise UsageError(f"the {form.kind} cannot be used: {line}", "docs/generation.md says what is supported")


def _hopeless(form: Form) -> UsageError:
    return UsageError(f"no text that this model can write satisfies the {form.kind}", "Pass a wider one")


def _allowed(matcher: Any, size: int) -> Bools:
    """Tokens that may follow, bool [size + 1 or some more]; at [size]: whether the text is complete."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)
    # Where nothing may follow the library lets a text end that is not complete.
    allowed[size] = allowed[size] and matcher.is_accepting()
    return allowed


def _ids(tokens: Iterable[int]) -> NDArray[Any]:
    return np.fromiter(sorted(tokens), np.int64)


def _within(seconds: float, work: Callable[[], _Grammar], kind: str) -> _Grammar:
    """The result of the work, which is left alone where it takes longer."""
    found: list[_Grammar | Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            found.append(error)

    thread = threading.Thread(target=run, name="hasten-grammar", daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise UsageError(f"the {kind} takes longer than {seconds:g} seconds to compile", "Pass a simpler one")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InstallationError("llguidance is not installed", "pip install 'hasten[serve]'") from error
    return llguidance
