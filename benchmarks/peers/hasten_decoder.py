"""A bundle of ours, by `hasten.load`, speaking the protocol of the decoder peers: all are started alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from decoder_protocol import DecoderPeer, DecoderServer, DecoderSetting
from protocol import Ids, serve

_CAPACITY = 1024


class Bundle(DecoderPeer):
    """The variant that `hasten.load` chooses."""

    packages = ("onnxruntime-gpu",)

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], DecoderSetting]]:
        """One setting: what a user gets."""
        return {"chosen by load": lambda: Loaded(model)}

    def vocabulary(self, model: Path) -> int:
        """See `DecoderPeer.vocabulary`."""
        import hasten

        return int(hasten.open_bundle(model).manifest.outputs[0].shape[2])


class Loaded(DecoderSetting):
    """The decoder that `generate` runs on, without the sampling of tokens and the making of texts."""

    batches = (1, 8)
    serves = True

    def __init__(self, bundle: Path) -> None:
        import hasten
        from runtimes.tasks.generate import Generator

        model = hasten.load(bundle)
        if not isinstance(model, Generator):
            raise TypeError(f"{bundle} is no language model")
        self._model = model
        self._decoders = {rows: model.decoder(rows, _CAPACITY) for rows in self.batches}
        self._decoder = self._decoders[1]
        self._lengths: list[int] = []
        self._next: list[int] = []

    def prefill(self, ids: Ids) -> None:
        """A prompt at a time, as `generate` does for prompts of this length."""
        self._decoder = self._decoders[len(ids)]
        self._lengths = [ids.shape[1]] * len(ids)
        self._next = []
        for slot, prompt in enumerate(ids.tolist()):
            logits = self._decoder.prefill(slot, [prompt])
            if logits is None:
                raise RuntimeError("the prefill was stopped")
            self._next.append(int(logits[0].argmax()))

    def step(self) -> None:
        """See `DecoderSetting.step`."""
        logits = self._decoder.step(self._next, self._lengths)
        self._lengths = [length + 1 for length in self._lengths]
        self._next = logits.argmax(-1).tolist()

    def serve(self, prompts: Sequence[Ids], steps: Sequence[int]) -> None:
        """The loop that `generate` and the engine run on."""
        from runtimes.generate.loop import Job, Loop, Request
        from runtimes.generate.sampling import Sampling

        job = Job(Sampling(), end=frozenset())
        loop = Loop(self._model.decoder(len(prompts), _CAPACITY), self._model.encoder.vocabulary)
        requests = [
            Request(tuple(prompt.tolist()), limit, job, number)
            for number, (prompt, limit) in enumerate(zip(prompts, steps, strict=True))
        ]
        for _ in loop.run(requests):
            pass


if __name__ == "__main__":
    serve(DecoderServer(Bundle()))
