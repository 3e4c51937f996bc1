"""Tokens as OpenAI tells them: their text, their bytes, how likely they were."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from artifacts.errors import BundleError

from ..generate.detokenize import Vocabulary
from ..generate.results import TokenLogprob

_LEAST = -9999.0
"""What OpenAI writes for a probability of 0, whose logarithm JSON cannot hold."""
_SPACE = "\u2581"


class TokenTexts:
    """Texts and bytes of a model's tokens.

    Args:
        data: Of tokenizer.json.

    Raises:
        BundleError: It is no tokenizer.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # tokenizers raises nothing narrower
            raise BundleError(f"the tokenizer cannot be read: {error}", "Compile the model again") from error
        self._vocabulary = Vocabulary(self._tokenizer)
        self._known: dict[int, tuple[str, list[int]]] = {}

    def of(self, token: int) -> tuple[str, list[int]]:
        """Text and bytes of a token by its id; half a character has U+FFFD as its text."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def chat(self, found: Sequence[TokenLogprob]) -> dict[str, object]:
        """``logprobs`` of a choice of /v1/chat/completions."""
        content = [
            self._entry(one.token, one.logprob)
            | {"top_logprobs": [self._entry(token, logprob) for token, logprob in one.top]}
            for one in found
        ]
        return {"content": content, "refusal": None}

    def completion(self, found: Sequence[TokenLogprob], start: int = 0) -> dict[str, object]:
        """``logprobs`` of a choice of /v1/completions; ``start``: characters of the text before the first token."""
        offsets = []
        for one in found:
            offsets.append(start)
            start += len(self.of(one.token)[0])
        top = [{self._name(token): max(_LEAST, logprob) for token, logprob in one.top} for one in found]
        return {
            "tokens": [self._name(one.token) for one in found],
            "token_logprobs": [max(_LEAST, one.logprob) for one in found],
            "top_logprobs": top if any(top) else None,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """Its text; where that is no whole character, its bytes, so that tokens which differ have names that do."""
        text, data = self.of(token)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if "\ufffd" in text else text

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        text, data = self.of(token)
        return {"token": text, "logprob": max(_LEAST, logprob), "bytes": data}

    def _read(self, token: int) -> tuple[str, list[int]]:
        own = self._vocabulary.token(token)
        if own is None:
            text = str(self._tokenizer.id_to_token(token) or "")
            return text, list(text.encode())
        data = self._vocabulary.token_bytes(token, own)
        if data is None:
            text = own.replace(_SPACE, " ")
            return text, list(text.encode())
        return data.decode("utf-8", "replace"), list(data)
