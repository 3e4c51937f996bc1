"""The Open Inference Protocol against a real server: Triton's own client, curl, and requests that lie."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from serving import Server
from task_builders import VOCABULARY
from task_graphs import LABELS, classifier, embedder
from tritonclient.utils import InferenceServerException

from runtimes.tasks.numbers import softmax

IDS = np.array([[2, 7, 9, 3], [2, 11, 3, 0]], np.int64)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64)
LONG = np.ones((1, 129), np.int64)
FEEDS = {"input_ids": IDS, "attention_mask": MASK}
TEXTS = np.array([b"the cat", "hello wörld".encode()], object)


@pytest.fixture
def client(everything: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=everything.url, timeout=30.0) as found:
        yield found


@pytest.fixture
def triton_client(everything: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(everything.url.removeprefix("http://")) as found:
        yield found


def triton_inputs(arrays: dict[str, Any], *, binary: bool) -> list[Any]:
    kinds = {"i": "INT64", "O": "BYTES"}
    found = []
    for name, array in arrays.items():
        one = triton.InferInput(name, list(array.shape), kinds[array.dtype.kind])
        found.append(one.set_data_from_numpy(array, binary_data=binary))
    return found


def tensor(name: str, array: Any) -> dict[str, Any]:
    array = np.asarray(array)
    return {"name": name, "shape": list(array.shape), "datatype": "INT64", "data": array.reshape(-1).tolist()}


def several(**named: list[str]) -> dict[str, Any]:
    return {"inputs": [one for name, values in named.items() for one in texts(*values, name=name)["inputs"]]}


def tensors(**changes: Any) -> dict[str, Any]:
    return {"inputs": [tensor(name, array) for name, array in (FEEDS | changes).items()]}


def texts(*values: str, name: str = "text") -> dict[str, Any]:
    return {"inputs": [{"name": name, "shape": [len(values)], "datatype": "BYTES", "data": list(values)}]}


def infer(client: httpx.Client, model: str, body: Any, **options: Any) -> httpx.Response:
    return client.post(f"/v2/models/{model}/infer", json=body, **options)


def refused(response: httpx.Response, status: int = 400) -> str:
    """The one line that a refusal says."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    told = response.json()["error"]
    assert "\n" not in told
    assert "Traceback" not in told
    assert len(told) < 500
    return str(told)


def test_triton_finds_the_server_and_its_models(triton_client: Any) -> None:
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert triton_client.is_model_ready("sentences")
    assert triton_client.get_server_metadata()["name"] == "hasten"
    assert "binary_tensor_data" in triton_client.get_server_metadata()["extensions"]
    found = triton_client.get_model_metadata("sentiment")
    assert [(one["name"], one["datatype"], one["shape"]) for one in found["inputs"]] == [
        ("input_ids", "INT64", [-1, -1]),
        ("attention_mask", "INT64", [-1, -1]),
        ("text", "BYTES", [-1]),
        ("text_pair", "BYTES", [-1]),
    ]
    assert [(one["name"], one["datatype"], one["shape"]) for one in found["outputs"]] == [
        ("logits", "FP32", [-1, 3]),
        ("label", "BYTES", [-1]),
        ("score", "FP32", [-1]),
        ("scores", "FP32", [-1, 3]),
    ]
    version = found["versions"][0]
    assert triton_client.is_model_ready("sentiment", version)
    assert triton_client.get_model_metadata("sentiment", version) == found


@pytest.mark.parametrize("sent", [True, False], ids=["sent binary", "sent JSON"])
@pytest.mark.parametrize("back", [True, False], ids=["back binary", "back JSON"])
def test_triton_runs_tensors(triton_client: Any, sent: bool, back: bool) -> None:
    inputs = triton_inputs(FEEDS, binary=sent)
    outputs = [triton.InferRequestedOutput("logits", binary_data=back)]
    found = triton_client.infer("sentiment", inputs, outputs=outputs, request_id="42")
    assert found.get_response()["id"] == "42"
    # float32, eight terms: a few roundings of 1e-7 each.
    np.testing.assert_allclose(found.as_numpy("logits"), classifier().oracle(FEEDS)["logits"], rtol=1e-5, atol=1e-6)


def test_triton_asks_for_no_output_and_gets_all_as_binary_data(triton_client: Any) -> None:
    found = triton_client.infer("plain", triton_inputs(FEEDS, binary=True))
    assert found.get_response()["outputs"][0]["parameters"]["binary_data_size"] == 2 * 8 * 4
    expected = embedder().oracle(FEEDS)["sentence_embedding"]
    np.testing.assert_allclose(found.as_numpy("sentence_embedding"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_triton_sends_texts_and_gets_labels(triton_client: Any, binary: bool) -> None:
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "scores", "score")]
    found = triton_client.infer("sentiment", triton_inputs({"text": TEXTS}, binary=binary), outputs=outputs)
    scores = found.as_numpy("scores")
    names = [one.decode() if isinstance(one, bytes) else one for one in found.as_numpy("label")]
    assert names == [LABELS["text-classification"][index] for index in scores.argmax(1)]
    np.testing.assert_allclose(scores.sum(1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(found.as_numpy("score"), scores.max(1))


def test_texts_and_their_tokens_give_the_same(client: httpx.Client) -> None:
    ids = np.array([[VOCABULARY.index(word) for word in ("[CLS]", "the", "cat", "[SEP]")]])
    by_text = infer(client, "sentences", texts("the cat")).json()["outputs"][0]
    by_ids = infer(client, "sentences", tensors(input_ids=ids, attention_mask=np.ones_like(ids))).json()["outputs"][0]
    assert (by_text["name"], by_text["shape"]) == ("embedding", [1, 8])
    np.testing.assert_allclose(by_text["data"], by_ids["data"], rtol=1e-5, atol=1e-6)


def test_pairs_of_texts(client: httpx.Client) -> None:
    body = several(text=["the cat"], text_pair=["a dog"])
    paired = infer(client, "sentiment", body).json()["outputs"]
    alone = infer(client, "sentiment", texts("the cat")).json()["outputs"]
    assert paired[2]["data"] != alone[2]["data"]
    ids = [[VOCABULARY.index(word) for word in ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]]]
    logits = classifier().oracle({"input_ids": np.array(ids), "attention_mask": np.ones((1, 7), np.int64)})["logits"]
    np.testing.assert_allclose(paired[2]["data"], softmax(logits)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "body"),
    [
        ("places", texts("paris is a city")),
        ("mask", texts("the [MASK] is red")),
        ("answers", several(question=["where"], context=["paris is a city"])),
    ],
)  # fmt: skip
def test_other_tasks_answer_texts_with_json(client: httpx.Client, model: str, body: Any) -> None:
    (output,) = infer(client, model, body).json()["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("result", "BYTES", [1])
    assert isinstance(json.loads(output["data"][0]), dict)


@pytest.mark.parametrize("model", ["plain", "sentences"])
def test_a_large_request_in_both_forms(client: httpx.Client, triton_client: Any, model: str) -> None:
    """In one piece for plain tensors, in portions for a model of texts."""
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(5, 40, (512, 100)), "attention_mask": np.ones((512, 100), np.int64)}
    body = {"inputs": [tensor(name, array) for name, array in feeds.items()]}
    by_json = np.array(infer(client, model, body).json()["outputs"][0]["data"]).reshape(512, 8)
    by_bytes = triton_client.infer(model, triton_inputs(feeds, binary=True)).as_numpy("sentence_embedding")
    np.testing.assert_allclose(by_json, by_bytes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_bytes, embedder().oracle(feeds)["sentence_embedding"], rtol=1e-4, atol=1e-5)


def test_outputs_that_would_be_too_large_are_refused(client: httpx.Client, triton_client: Any) -> None:
    """16 MB of token ids ask for 500 MB of logits; 2.4 MB for 70 MB, which are 700 MB of JSON."""
    ids = np.ones((16_300, 128), np.int64)
    with pytest.raises(InferenceServerException, match=r"\[400\] the outputs would have \d+ bytes"):
        triton_client.infer("mask", triton_inputs({"input_ids": ids}, binary=True))
    some = triton_inputs({"input_ids": ids[:2600]}, binary=True)
    with pytest.raises(InferenceServerException, match="too much for JSON"):
        triton_client.infer("mask", some, outputs=[triton.InferRequestedOutput("logits", binary_data=False)])


def test_curl(everything: Server) -> None:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("there is no curl here")
    body = json.dumps(texts("the cat"))
    url = f"{everything.url}/v2/models/sentiment/infer"
    found = subprocess.run([program, "-sS", "--fail", "-d", body, url], capture_output=True, check=True, timeout=30)
    assert json.loads(found.stdout)["outputs"][0]["data"][0] in LABELS["text-classification"]


def test_binary_answers_say_where_their_json_ends(client: httpx.Client) -> None:
    body = tensors() | {"parameters": {"binary_data_output": True}}
    response = infer(client, "plain", body)
    size = int(response.headers["inference-header-content-length"])
    assert response.headers["content-type"] == "application/octet-stream"
    assert json.loads(response.content[:size])["model_name"] == "plain"
    assert len(response.content) - size == 2 * 8 * 4


def test_a_version_is_its_bundle(client: httpx.Client) -> None:
    version = client.get("/v2/models/plain").json()["versions"][0]
    assert client.get("/v1/models/plain").json()["digest"].startswith(f"sha256:{version}")
    assert client.post(f"/v2/models/plain/versions/{version}/infer", json=tensors()).json()["model_version"] == version
    assert "has no version '1'" in refused(client.post("/v2/models/plain/versions/1/infer", json=tensors()), 404)


def test_unknown_models_and_methods(client: httpx.Client) -> None:
    for path in ("/v2/models/nobody", "/v2/models/nobody/ready", "/v2/models/nobody/infer/ready"):
        assert "nobody" in refused(client.get(path), 404)
    refused(infer(client, "nobody", tensors()), 404)
    refused(infer(client, "..%2f..%2fetc", tensors()), 404)
    refused(infer(client, "a" * 5000, tensors()), 404)
    refused(client.get("/v2/models/plain/infer"), 405)
    refused(client.get("/v2/nothing"), 404)
    assert client.post("/v2").status_code == 405


def test_language_models_show_what_they_are_and_are_used_elsewhere(client: httpx.Client) -> None:
    assert client.get("/v2/models/stories").json()["inputs"][0]["name"] == "input_ids"
    assert "/v1/chat/completions" in refused(infer(client, "stories", texts("once")))


WRONG: dict[str, tuple[str, Any, str]] = {
    "unknown input": ("plain", tensors(more=MASK), "has no input 'more'"),
    "missing input": ("plain", {"inputs": [tensor("input_ids", IDS)]}, "input 'attention_mask' is missing"),
    "text for plain tensors": ("plain", texts("a"), "has no input 'text'"),
    "unknown output": ("plain", tensors() | {"outputs": [{"name": "y"}]}, "give no output 'y'"),
    "output of texts for tensors": ("sentiment", tensors() | {"outputs": [{"name": "label"}]}, "no output 'label'"),
    "output of tensors for texts": ("sentiment", texts("a") | {"outputs": [{"name": "logits"}]}, "give no output"),
    "texts and tensors": ("sentences", {"inputs": [*tensors()["inputs"], *texts("a")["inputs"]]}, "both sent"),
    "pair alone": ("sentiment", texts("a", name="text_pair"), "input 'text' is missing"),
    "pairs of other length": ("sentiment", several(text=["a", "b"], text_pair=["c"]), "different lengths"),
    "batches that differ": ("plain", tensors(attention_mask=MASK[:1]), "both are 'batch'"),
    "lengths that differ": ("plain", tensors(attention_mask=MASK[:, :3]), "both are 'length'"),
    "another rank": ("plain", tensors(attention_mask=MASK[0]), "has the shape [4]"),
    "longer than the model": ("sentences", tensors(input_ids=LONG, attention_mask=LONG), "129 tokens"),
    "ids of no token": ("plain", tensors(input_ids=IDS + 10**9), "does not run on these tensors"),
    "text without a mask": ("mask", texts("the cat"), "has no mask"),
    "timeout": ("plain", tensors() | {"parameters": {"timeout": -1}}, "parameter timeout is -1"),
    "priority": ("plain", tensors() | {"parameters": {"priority": "high"}}, "parameter priority is 'high'"),
    "sequence": ("plain", tensors() | {"parameters": {"sequence_id": 7}}, "sequences are not kept"),
    "a list": ("plain", [], "not a JSON object"),
    "nothing": ("plain", {}, "inputs is no list"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_told_in_one_line(client: httpx.Client, name: str) -> None:
    model, body, told = WRONG[name]
    assert told in refused(infer(client, model, body))


def test_bytes_that_lie(client: httpx.Client) -> None:
    def post(body: dict[str, Any], raw: bytes, size: str | None = None, **headers: str) -> httpx.Response:
        text = json.dumps(body).encode()
        headers = {"inference-header-content-length": size or str(len(text)), **headers}
        return client.post("/v2/models/plain/infer", content=text + raw, headers=headers)

    def claims(shape: list[int], size: int) -> dict[str, Any]:
        one = {"name": "input_ids", "shape": shape, "datatype": "INT64", "parameters": {"binary_data_size": size}}
        return {"inputs": [one, tensor("attention_mask", MASK)]}

    assert post(claims([2, 4], 64), IDS.tobytes()).status_code == 200
    assert "takes 8796093022208" in refused(post(claims([1 << 20, 1 << 20], 64), IDS.tobytes()))
    assert "more than" in refused(post(claims([1 << 40, 1 << 40], 64), IDS.tobytes()))
    assert "extent -2" in refused(post(claims([-2, -4], 64), IDS.tobytes()))
    assert "63 bytes are left" in refused(post(claims([2, 4], 64), IDS.tobytes()[:-1]))
    assert "belong to no input" in refused(post(claims([2, 4], 64), IDS.tobytes() + b"\0"))
    assert "Inference-Header-Content-Length" in refused(post(claims([2, 4], 64), b"", "99999999"))
    assert "Inference-Header-Content-Length" in refused(post(claims([2, 4], 64), b"", "-1"))
    assert "not JSON" in refused(post(claims([2, 4], 64), IDS.tobytes(), "10"))
    packed = gzip.compress(json.dumps(tensors()).encode())
    response = client.post("/v2/models/plain/infer", content=packed, headers={"content-encoding": "gzip"})
    assert "compressed" in refused(response)
    raw = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}}]}
    text = json.dumps(raw).encode()
    headers = {"inference-header-content-length": str(len(text))}
    content = text + struct.pack("<I", 2) + b"\xff\xfe"
    assert "not UTF-8" in refused(client.post("/v2/models/sentences/infer", content=content, headers=headers))


def test_triton_sees_what_is_wrong(triton_client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"\[404\] there is no model 'nobody'"):
        triton_client.get_model_metadata("nobody")
    with pytest.raises(InferenceServerException, match=r"\[400\] input 'attention_mask' is missing"):
        triton_client.infer("plain", triton_inputs({"input_ids": IDS}, binary=True))


def test_time_that_is_too_short_is_refused(triton_client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"\[(429|504)\]"):
        triton_client.infer("plain", triton_inputs(FEEDS, binary=True), timeout=1)
    found = triton_client.infer("plain", triton_inputs(FEEDS, binary=True), timeout=30_000_000, priority=1)
    assert found.as_numpy("sentence_embedding").shape == (2, 8)


def test_classify(client: httpx.Client) -> None:
    found = client.post("/classify", json={"model": "sentiment", "texts": ["the cat", ["the cat", "a dog"]]}).json()
    assert [one["label"] in LABELS["text-classification"] for one in found["results"]] == [True, True]
    assert found["results"][0]["scores"] != found["results"][1]["scores"]
    assert found["usage"]["tokens"] == 4 + 7
    direct = infer(client, "sentiment", texts("the cat")).json()["outputs"][2]["data"]
    np.testing.assert_allclose(list(found["results"][0]["scores"].values()), direct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"model": "sentences", "texts": ["a"]}, "it gives no labels"),
        ({"texts": ["a"]}, "no model was named"),
        ({"model": "sentiment", "texts": []}, "texts"),
        ({"model": "sentiment", "texts": "a"}, "texts"),
        ({"model": "sentiment", "texts": [7]}, "texts"),
        ({"model": "sentiment", "texts": [["a", "b", "c"]]}, "texts"),
        ({"model": "sentiment", "text": ["a"]}, "texts"),
        ({"model": "sentiment", "texts": ["a"], "top_k": 3}, "top_k"),
        ({"model": "sentiment", "texts": ["a"], "priority": 11}, "priority"),
        ([], "object"),
    ],
)
def test_what_cannot_be_classified(client: httpx.Client, body: Any, told: str) -> None:
    response = client.post("/classify", json=body)
    assert response.status_code in (400, 404)
    assert told in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]


def test_what_clients_send_is_not_in_the_log(everything: Server, client: httpx.Client) -> None:
    infer(client, "sentences", texts("a secret elephant"))
    infer(client, "mask", texts("a secret elephant"))
    client.post("/classify", json={"model": "sentiment", "texts": ["a secret elephant"]})
    client.get("/healthz")
    everything.wait_for("request", path="/classify")
    assert "elephant" not in "".join(everything.lines)


def test_no_file_of_the_machine_is_told(client: httpx.Client, tmp_path: Path) -> None:
    for path in ("/v2/models/plain", "/v2/models/stories", "/load"):
        assert str(tmp_path.parent.parent) not in client.get(path).text
