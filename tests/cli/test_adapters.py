"""hasten adapter, and adapters in run, chat and verify: the real command on a small real bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import decoder_graphs
import numpy as np
import pytest
from lora_folders import change_config, write_lora
from real_command import assert_refused, cold, listing, ok, warm

import hasten
from artifacts.bundle import open_bundle

WORDS = ("--max-new-tokens", "12", "--temperature", "0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain``: a tiny model; ``bundle``: the same with the adapter ``terse``; ``lora``: that adapter."""
    root = tmp_path_factory.mktemp("adapters")
    model = decoder_graphs.tiny_llama(context=256)
    decoder_graphs.write_decoder(root / "plain", model, decoder_graphs.byte_level(root / "tokenizer.json"))
    write_lora(root / "lora", model)
    shutil.copytree(root / "plain", root / "bundle")
    done = ok(cold("adapter", "add", root / "bundle", root / "lora", "--name", "terse"))
    assert done.err == ""
    assert done.out.startswith("terse: 14 modules, ")
    assert "hasten run" in done.out
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy for one test to change."""
    shutil.copytree(made, tmp_path / "all")
    return tmp_path / "all"


def test_an_adapter_is_listed_used_and_removed(place: Path) -> None:
    listed = json.loads(ok(warm("adapter", "list", place / "bundle", "--json")).out)
    assert [(one["name"], len(one["modules"]), one["modules"][0]["rank"]) for one in listed] == [("terse", 14, 4)]
    assert "terse" in ok(warm("adapter", "list", place / "bundle")).out
    with hasten.load(place / "bundle") as model:
        messages = [{"role": "user", "content": "the cat"}]
        plain, terse = (
            model.generate(messages, max_new_tokens=12, temperature=0, **options).text
            for options in ({}, {"adapter": "terse"})
        )
    assert plain != terse
    written = ok(warm("run", place / "bundle", "--prompt", "the cat", *WORDS, "--adapter", "terse")).out
    assert written.removesuffix("\n") == terse.removesuffix("\n")
    (place / "prompts.jsonl").write_text('{"text": "the cat"}\n{"text": "the cat", "adapter": "terse"}\n')
    rows = ok(warm("run", place / "bundle", "-i", place / "prompts.jsonl", *WORDS)).out.splitlines()
    assert [json.loads(row)["text"] for row in rows] == [plain, terse]
    told = ok(cold("chat", place / "bundle", *WORDS, "--adapter", "terse", stdin="the cat\n")).out
    assert told.rstrip("\n") == terse.rstrip("\n")
    left = json.loads(ok(warm("adapter", "remove", place / "bundle", "terse", "--json")).out)
    assert left == {"digest": open_bundle(place / "plain").digest, "adapters": []}
    assert "has no adapters" in ok(warm("adapter", "list", place / "bundle")).out
    assert listing(place / "bundle").keys() == listing(place / "plain").keys()


def test_add_as_json(place: Path) -> None:
    done = ok(warm("adapter", "add", place / "plain", place / "lora", "--name", "a.b-c_1", "--json"))
    document = json.loads(done.out)
    assert document["digest"] == open_bundle(place / "plain").digest
    assert (document["adapter"]["name"], document["against"], document["notes"]) == ("a.b-c_1", [], [])


def test_verify_looks_at_adapters(place: Path) -> None:
    told = [line for line in warm("verify", place / "bundle").out.splitlines() if "cpu-fp32 with adapters" in line]
    assert len(told) == 1
    assert told[0].startswith("ok"), told
    assert told[0].endswith("terse can be used")
    numbers = np.fromfile(place / "bundle/adapters/terse.bin", "<f4")
    numbers[0] = np.nan
    numbers.tofile(place / "bundle/adapters/terse.bin")
    assert_refused(warm("verify", place / "bundle"), 6, "adapters/terse.bin was altered")


def test_what_is_refused(place: Path) -> None:
    before = listing(place)
    bundle, lora = place / "bundle", place / "lora"
    unknown = warm("run", bundle, "--prompt", "x", "--adapter", "rude")
    assert_refused(unknown, 2, "no adapter 'rude'", "It has terse")
    assert_refused(warm("run", place / "plain", "--prompt", "x", "--adapter", "terse"), 2, "hasten adapter add")
    assert_refused(warm("adapter", "remove", bundle, "rude"), 2, "has no adapter 'rude'", "It has terse")
    assert_refused(warm("adapter", "add", bundle, lora, "--name", "terse"), 2, "--replace")
    assert_refused(warm("adapter", "add", bundle, lora, "--name", "No!"), 2, "cannot be used")
    assert_refused(warm("adapter", "add", bundle, place / "none", "--name", "x"), 3, "adapter_config.json is missing")
    assert_refused(warm("adapter", "add", place / "none", lora, "--name", "x"), 6, "does not exist")
    assert_refused(warm("adapter", "add", bundle, lora), 2, "--name")
    assert listing(place) == before
    change_config(lora, base_model_name_or_path="org/another")
    other = warm("adapter", "add", bundle, lora, "--name", "x")
    assert_refused(other, 3, "trained on org/another", "--any-base")
    ok(warm("adapter", "add", bundle, lora, "--name", "x", "--any-base"))
    ok(warm("adapter", "add", bundle, lora, "--name", "x", "--any-base", "--replace"))
    change_config(lora, use_dora=True)
    assert_refused(warm("adapter", "add", bundle, lora, "--name", "y", "--any-base"), 3, "DoRA", "merge_and_unload")
