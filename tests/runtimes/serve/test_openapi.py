"""The OpenAPI document: every route is in it, and the running server keeps to it, fuzzed by schemathesis."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from serving import Server
from starlette.routing import Route

from runtimes.serve.app import routes_of
from runtimes.serve.metrics import Recorder
from runtimes.serve.models import Models
from runtimes.serve.openapi import OPERATIONS, document, routes
from runtimes.serve.options import ServeOptions

EXAMPLES = 8
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "unsupported_method", "allow_header_conformance"),
)
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
"""
"""503 and 504 are refusals: too busy to keep a timeout, and too late for it."""
ASKED = {
    "EmbeddingRequest": "feature-extraction",
    "CompletionRequest": "text-generation",
    "ChatRequest": "text-generation",
    "ClassifyRequest": "text-classification",
}
"""Schema of a request -> task of the models it is for."""


def test_every_route_is_in_the_document() -> None:
    models = Models({}, lambda path: pytest.fail("not made"))
    found = set()
    for route in [*routes_of(models, ServeOptions(), Recorder(), None), *routes(keys=False)]:
        assert isinstance(route, Route)
        methods = (route.methods or set()) - {"HEAD"}
        if "infer" in route.path and "GET" in methods:  # there to say that it takes POST
            continue
        found |= {(method.lower(), route.path.replace("{name:path}", "{name}")) for method in methods}
    assert found == {(one.method, one.path) for one in OPERATIONS}


def test_names_are_unique_and_schemas_are_there() -> None:
    told = document(keys=True)
    operations = [one for path in told["paths"].values() for one in path.values()]
    names = [one["operationId"] for one in operations]
    assert len(names) == len(set(names)) == len(OPERATIONS)
    text = str(told)
    for name in told["components"]["schemas"]:
        assert name.isalnum(), name
        assert f"#/components/schemas/{name}" in text
    assert {name for name, one in told["paths"].items() if "security" not in one.get("get", one.get("post"))} == {
        one.path for one in OPERATIONS if one.open
    }
    assert "security" not in str(document(keys=False))


def test_examples_are_what_their_schemas_take() -> None:
    from runtimes.serve import schemas
    from runtimes.serve.classify import ClassifyRequest

    checked = 0
    for one in OPERATIONS:
        if one.example is not None and one.asks is not None:
            assert issubclass(one.asks, BaseModel)
            one.asks.model_validate(one.example)
            checked += one.asks in (schemas.ChatRequest, schemas.EmbeddingRequest, ClassifyRequest)
    assert checked == 3


def test_the_server_serves_its_document(everything: Server) -> None:
    found = httpx.get(f"{everything.url}/openapi.json", timeout=30.0)
    assert found.json() == document(keys=False)
    assert found.json()["openapi"] == "3.1.0"


def told_of(everything: Server) -> dict[str, Any]:
    """The document with the names of the models that are there, so that what is made up reaches them."""
    told: dict[str, Any] = httpx.get(f"{everything.url}/openapi.json", timeout=30.0).json()
    found = httpx.get(f"{everything.url}/v1/models", timeout=30.0).json()["data"]
    tasks = {one["id"]: one["task"] for one in found}
    versions = [one["digest"].removeprefix("sha256:")[:12] for one in found if one["id"] == "sentences"]
    for path, methods in told["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                names = ["sentences"] if "/versions" in path or path.endswith("/infer") else sorted(tasks)
                parameter["schema"]["enum"] = versions if parameter["name"] == "version" else names
    schemas = told["components"]["schemas"]
    for schema, task in ASKED.items():
        schemas[schema]["properties"]["model"] = {"enum": [name for name in tasks if tasks[name] == task]}
        schemas[schema]["required"].append("model")
    fields = schemas["InputTensor"]["properties"]
    fields |= {"name": {"enum": ["text"]}, "datatype": {"enum": ["BYTES"]}, "shape": {"enum": [[1]]}}
    fields["data"] = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1}
    schemas["InputTensor"]["required"].append("data")
    return told


@pytest.mark.slow
def test_the_server_keeps_to_its_document(everything: Server, tmp_path: Path) -> None:
    """No 5xx, no status and no media type that is not in the document, and answers that fit their schemas."""
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(told_of(everything)))
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    report = tmp_path / "report.json"
    program = Path(sys.executable).with_name("schemathesis")
    options = (
        *("--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--generation-deterministic"),
        *("--checks", ",".join(CHECKS), "--continue-on-failure", "--request-timeout", "30", "--no-color"),
        *("--warnings", "off", "--report", "json", "--report-json-path", str(report)),
    )
    command = [str(program), "run", str(file), "--url", everything.url, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    assert f"{len(OPERATIONS)} selected / {len(OPERATIONS)} total" in ended.stdout
    for one in OPERATIONS:
        if one.works:
            path = re.escape(one.path).replace(r"\{name\}", "[^/]+").replace(r"\{version\}", "[^/]+")
            mine = [event for event in everything.events if re.fullmatch(path, str(event.get("path")))]
            assert any(event["status"] == 200 for event in mine), one.path
    assert httpx.get(f"{everything.url}/readyz", timeout=30.0).status_code == 200
