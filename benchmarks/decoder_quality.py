"""Quality of compiled language models on real text: perplexity and size of pystories_lm, texts of stories260k."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import SHARED, Goal, run_hasten, run_once

KINDS = ("int4", "mixed", "int8")
MEGABYTES = {"int4": 7.2, "mixed": 8.25}
"""Recipe -> most megabytes of the variant."""
MIXED = Path(__file__).resolve().parent / "recipes" / "pystories-mixed.toml"
_MIXED_PEER = (0.9997, 1.0017)
_TOKENS = 40_000
_SEEN_CHARACTERS = 160_000
"""Where the first 40,000 tokens have certainly ended: what follows is calibrated on."""
_PROMPTS = 20
_WRITTEN = 100
_PROMPT_WORDS = 4


def measure_quality(folder: Path) -> dict[str, Any]:
    """Every figure, as JSON; without what is not in ../shared."""
    figures: dict[str, Any] = {}
    model, data = SHARED / "models" / "pystories_lm", SHARED / "data" / "pystories"
    if model.exists() and data.exists():
        figures["pystories"] = {kind: perplexities(kind, model, data, folder) for kind in KINDS}
    else:
        print(f"pystories_lm is not at {model}: perplexity is not measured")
    model, data = SHARED / "models" / "stories260k", SHARED / "data" / "tinystories" / "train_sample.txt"
    if model.exists() and data.exists():
        figures["greedy"] = same_texts(model, data, folder)
    else:
        print(f"stories260k is not at {model}: its texts are not compared")
    return figures


def perplexities(kind: str, model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Size, and perplexity over the reference's on both texts, in windows of 512 tokens."""
    bundle = folder / f"pystories-{kind}"
    recipe = str(MIXED) if kind == "mixed" else kind
    wish = ("--target", "cpu", "--recipe", recipe, "--keep-reference", "--quiet")
    held = [data / "python.txt", data / "stories.txt"]
    seen = write_seen(folder / "seen.txt", held)
    figures: dict[str, Any] = run_once(
        [sys.executable, "-m", "hasten", "compile", str(model), "-o", str(bundle), *wish, "--data", str(seen)]
    )
    import hasten

    opened = hasten.open_bundle(bundle)
    (variant,) = [one.id for one in opened.manifest.variants if one.id != "reference"]
    figures |= {"variant": variant, "megabytes": opened.size(variant) / 1e6}
    for path in held:
        found = [perplexity_of(bundle, path, name) for name in (variant, "reference")]
        figures[path.stem] = {"perplexity": found[0], "reference": found[1], "ratio": found[0] / found[1]}
    print(f"pystories_lm {kind}: {figures['megabytes']:.2f} MB, " + ", ".join(_told(figures, path) for path in held))
    return figures


def same_texts(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Of the openings of 20 stories, none twice, how many torch (float32) and the int8 bundle continue alike."""
    bundle = folder / "stories260k"
    run_hasten("compile", str(model), "-o", str(bundle), "--target", "cpu", "--recipe", "int8", "--quiet")
    import hasten

    stories = [story.split() for story in data.read_text(encoding="utf-8").split("<|endoftext|>")]
    openings = (" ".join(words[:_PROMPT_WORDS]) for words in stories if len(words) > _PROMPT_WORDS)
    prompts = list(dict.fromkeys(openings))[:_PROMPTS]
    from runtimes.tasks.generate import Generator

    with hasten.load(bundle) as loaded:
        if not isinstance(loaded, Generator):
            raise TypeError(f"{bundle} is no language model")
        found = [list(one.tokens) for one in loaded.generate(prompts, max_new_tokens=_WRITTEN, temperature=0.0)]
        ids = [list(loaded.encoder.encode(prompt)) for prompt in prompts]
    wanted = _torch_greedy(model, ids)
    same = sum(ours == theirs[: len(ours)] and len(ours) > 0 for ours, theirs in zip(found, wanted, strict=True))
    print(f"stories260k int8: the same {_WRITTEN} tokens as torch on {same} of {len(prompts)} prompts")
    return {"prompts": len(prompts), "same": same}


def judge_quality(figures: Mapping[str, Any]) -> list[Goal]:
    """The lines of the issue's table."""
    found = figures.get("pystories", {})

    def ratio(kind: str, worst: bool) -> float | None:
        ratios = [found[kind][name]["ratio"] for name in ("python", "stories")] if kind in found else []
        return None if not ratios else max(ratios) if worst else sum(ratios) / len(ratios)

    def size(kind: str) -> float | None:
        return found[kind]["megabytes"] if kind in found else None

    greedy = figures.get("greedy")
    return [
        Goal("pystories_lm int4: size", MEGABYTES["int4"], False, "MB", size("int4")),
        Goal("pystories_lm int4: worse perplexity of the two", 1.0015, False, "x", ratio("int4", worst=True)),
        Goal("pystories_lm mixed: size", MEGABYTES["mixed"], False, "MB", size("mixed")),
        Goal(
            "pystories_lm mixed: mean perplexity (Q4_K_M)",
            *(sum(_MIXED_PEER) / 2, False, "x", ratio("mixed", worst=False)),
        ),
        Goal("pystories_lm int8: worse perplexity of the two", 1.0003, False, "x", ratio("int8", worst=True)),
        Goal(
            "stories260k int8: prompts with torch's 100 tokens",
            *(18.0, True, "of 20", None if greedy is None else float(greedy["same"])),
        ),
    ]


def write_seen(path: Path, held: Sequence[Path]) -> Path:
    """What of some texts is calibrated on: all behind the tokens that perplexity is measured on."""
    parts = [text.read_text(encoding="utf-8")[_SEEN_CHARACTERS:] for text in held]
    path.write_text("".join(parts), encoding="utf-8")
    return path


def perplexity_of(bundle: Path, path: Path, variant: str = "") -> float:
    """Of a bundle, or a variant of it, on the first 40,000 tokens of a text, in windows of 512."""
    wish = ("--perplexity", str(path), "--max-tokens", str(_TOKENS), "--json")
    chosen = ("--variant", variant) if variant else ()
    return float(json.loads(run_hasten("eval", str(bundle), *wish, *chosen))["perplexity"])


def _told(figures: Mapping[str, Any], path: Path) -> str:
    one = figures[path.stem]
    return f"{path.stem} {one['perplexity']:.3f} over {one['reference']:.3f}, {one['ratio']:.4f}x"


def _torch_greedy(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    written = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = original.generate(ids, max_new_tokens=_WRITTEN, do_sample=False)
        written.append([int(token) for token in out[0, len(prompt) :]])
    return written
