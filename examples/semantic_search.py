"""Semantic search with a compiled sentence encoder: python examples/semantic_search.py BUNDLE [QUESTION ...]"""

from __future__ import annotations

import sys

import hasten

PASSAGES = (
    "The kettle switches itself off when the water boils, so nobody has to wait beside it.",
    "Bees tell each other where the flowers are by dancing on the comb.",
    "To change a tyre, loosen the nuts a little before lifting the car with the jack.",
    "The night train leaves at ten and reaches the coast shortly after sunrise.",
    "Bread rises because yeast turns sugar into gas, and the dough holds on to it.",
    "A cache keeps what was asked for recently, because it is likely to be asked for again.",
    "Glaciers carve valleys slowly, carrying stones that scratch the rock beneath them.",
    "The library lends books for four weeks and forgives the first reminder.",
)
QUESTIONS = ("Why does dough grow?", "How do insects share directions?", "When can I travel to the sea?")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with hasten.load(sys.argv[1]) as model:
        passages = model.embed(PASSAGES)
        for question in sys.argv[2:] or QUESTIONS:
            scores = passages @ model.embed([question])[0]
            best = int(scores.argmax())
            print(f"{question}\n  {scores[best]:.2f}  {PASSAGES[best]}")


if __name__ == "__main__":
    main()
