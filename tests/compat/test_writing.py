"""Text generation as transformers' pipeline does it, over the same tiny Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from decoder_graphs import byte_level, tiny_llama, write_decoder
from transformers import PreTrainedTokenizerFast
from transformers import pipeline as peer_pipeline

from artifacts.errors import UsageError
from hasten.compat import pipeline

PROMPTS = ["the cat sat", "hello", "2 + 2 ="]
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def bundle(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    return write_decoder(folder / "bundle", llama, byte_level(folder / "tokenizer.json")).path


@pytest.fixture(scope="module")
def mine(bundle: Path) -> Any:
    with pipeline("text-generation", model=bundle, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def peer(llama: Any, bundle: Path) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bundle / "processor" / "tokenizer.json"))
    return peer_pipeline("text-generation", model=llama, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("options", [{}, {"return_full_text": False}, {"prefix": "so "}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("inputs", [PROMPTS[0], PROMPTS, PROMPTS[:1]])
def test_continuations(mine: Any, peer: Any, inputs: Any, options: dict[str, Any]) -> None:
    asked = {"max_new_tokens": 12, "do_sample": False, **options}
    assert mine(inputs, **asked) == peer(inputs, **asked)


def test_stop_strings_stay(mine: Any, peer: Any) -> None:
    (plain,) = mine(PROMPTS[0], max_new_tokens=12, do_sample=False, return_full_text=False)
    stop = plain["generated_text"][3:5]
    asked = {"max_new_tokens": 12, "do_sample": False, "stop_sequence": [stop]}
    assert mine(PROMPTS[0], **asked) == peer(PROMPTS[0], **asked)


def test_several_texts_of_a_prompt(mine: Any) -> None:
    asked = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "num_return_sequences": 3, "seed": 1}
    found = mine(PROMPTS, **asked)
    assert [len(texts) for texts in found] == [3, 3, 3]
    assert found == mine(PROMPTS, **asked)
    assert len({text["generated_text"] for text in found[0]}) > 1
    beams = mine(PROMPTS[0], max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert len(beams) == 2


def test_chats(mine: Any) -> None:
    (found,) = mine(CHAT, max_new_tokens=6)
    assert found["generated_text"][:1] == CHAT
    assert found["generated_text"][1]["role"] == "assistant"
    ((new,),) = mine([CHAT], max_new_tokens=6, return_full_text=False)
    assert new["generated_text"] == found["generated_text"][1]["content"]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("a", {"return_tensors": True}, "no option 'return_tensors'"),
        ("a", {"return_text": True, "return_full_text": True}, "exclude each other"),
        ("a", {"return_text": False}, "returns texts"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"temperature": -1.0}, "temperature"),
        ([3], {}, "neither a text nor a chat"),
        ([*CHAT, {"role": "assistant", "content": "well"}], {}, "does not continue the last message"),
    ],
)
def test_what_is_refused(mine: Any, inputs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mine(inputs, **options)


def test_no_prompts(mine: Any) -> None:
    assert mine([]) == []
