"""bos, eos, sampling and the chat template, read from the files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_decoders import SPECIAL, TEMPLATE, write_tokenizer

from artifacts.errors import SourceError
from artifacts.manifest import Generation
from compiler.generation_defaults import read_generation
from compiler.processor import CHAT_TEMPLATE, context_length
from compiler.source import ModelSource

CONFIG: dict[str, object] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
ROLES = (("bos_token", SPECIAL[0]), ("eos_token", SPECIAL[1]), ("pad_token", SPECIAL[2]))


Read = tuple[Generation, dict[str, bytes]]


def read(folder: Path, config: dict[str, object] | None = None, **stated: object) -> Read:
    write_tokenizer(folder)
    if stated:
        (folder / "generation_config.json").write_text(json.dumps(stated))
    source = ModelSource("tiny", "huggingface", folder, "text-generation", {}, "LlamaForCausalLM", "", None, folder)
    return read_generation(source, CONFIG if config is None else config, (folder / "tokenizer.json").read_bytes())


def test_what_config_json_states(tmp_path: Path) -> None:
    generation, files = read(tmp_path)
    assert generation == Generation(eos=(1,), bos=0, chat_template="", special=ROLES)
    assert files == {}


def test_generation_config_is_believed_first(tmp_path: Path) -> None:
    generation, _ = read(
        tmp_path,
        eos_token_id=[5, 6, 5],
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.05,
        repetition_penalty=1.1,
    )
    assert generation.eos == (5, 6)
    assert generation.bos == 0
    assert (generation.sample, generation.temperature, generation.top_k) == (True, 0.6, 20)
    assert (generation.top_p, generation.min_p, generation.repetition_penalty) == (0.95, 0.05, 1.1)


def test_the_tokenizer_ends_a_text_where_no_config_does(tmp_path: Path) -> None:
    generation, _ = read(tmp_path, {"vocab_size": 300, "eos_token_id": None})
    assert (generation.eos, generation.bos) == ((1,), -1)


def test_ids_that_the_model_does_not_know_are_left_out(tmp_path: Path) -> None:
    generation, _ = read(tmp_path, {"vocab_size": 300, "eos_token_id": [2, 300], "bos_token_id": 128000})
    assert (generation.eos, generation.bos) == ((2,), -1)


@pytest.mark.parametrize(
    ("stated", "text"),
    [
        ({"temperature": "hot"}, "temperature 'hot'"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"min_p": True}, "min_p True"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"top_k": 2.5}, "top_k 2.5"),
    ],
)
def test_impossible_sampling_is_named(tmp_path: Path, stated: dict[str, object], text: str) -> None:
    with pytest.raises(SourceError, match=text):
        read(tmp_path, **stated)


def test_a_generation_config_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(SourceError, match="does not hold a JSON object"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        (
            "chat_template.json",
            json.dumps({"chat_template": [{"name": "t", "template": "x"}, {"name": "default", "template": TEMPLATE}]}),
        ),
    ],
)
def test_the_chat_template(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    generation, files = read(tmp_path)
    assert generation.chat_template == CHAT_TEMPLATE
    assert files == {CHAT_TEMPLATE: TEMPLATE.encode()}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
        ("chat_template.json", b'{"chat_template": 3}', "is no text"),
        ("chat_template.json", b"{", "is not valid JSON"),
    ],
)
def test_a_broken_chat_template(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=text):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({}, 512),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)
def test_context_length(config: dict[str, object], length: int) -> None:
    assert context_length(config) == length
