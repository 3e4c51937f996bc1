"""The Open Inference Protocol (v2) over HTTP, for any bundle: health, metadata and ``/infer``.

A model that has a text processor takes texts as well as the tensors of its graph: the BYTES inputs of `TEXT_INPUTS`
instead of all others, and answers with the outputs of `text_outputs` then. The version of a model is the beginning of
its bundle's digest, so a client that names one is told when the model was replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from artifacts.constraints import shown
from artifacts.errors import UsageError
from artifacts.manifest import TensorSpec

from ..engine.calls import MOST_PRIORITY, Call
from .exchange import exchange_of
from .infer import OPTIONAL, TEXT_INPUTS, apart, infer_tensors, infer_texts, text_outputs
from .models import Models, Served, UnknownModelError
from .tensors import DATATYPES, Output, Wanted, read_request, write_answer

EXTENSIONS = ("binary_tensor_data", "parameters", "schedule_policy")
GENERATES = "text-generation"
HEADER = "inference-header-content-length"
_VERSION_DIGITS = 12
_MOST_JSON = 64 << 20
_MOST_MICROSECONDS = 1 << 53


def routes(models: Models, *, timeout: float) -> list[BaseRoute]:
    """The paths under ``/v2``.

    Args:
        models: What is served.
        timeout: Longest seconds for an answer.
    """
    protocol = Protocol(models, timeout)
    model, versioned = "/v2/models/{name:path}", "/v2/models/{name:path}/versions/{version}"
    found: list[BaseRoute] = [
        Route("/v2", protocol.server),
        Route("/v2/health/live", protocol.live),
        Route("/v2/health/ready", protocol.ready),
    ]
    for path in (versioned, model):
        found.append(Route(f"{path}/infer", protocol.infer, methods=["POST"]))
        found.append(Route(f"{path}/infer", protocol.only_post))  # else it would be the metadata of "NAME/infer"
        found.append(Route(f"{path}/ready", protocol.model_ready))
        found.append(Route(path, protocol.model))
    return found


class Protocol:
    """Answers the requests of the protocol; what goes wrong is raised, and told by the application."""

    def __init__(self, models: Models, timeout: float) -> None:
        self._models = models
        self._timeout = timeout

    async def server(self, request: Request) -> Response:
        """Name, version and extensions."""
        try:
            number = version("hasten")
        except PackageNotFoundError:
            number = "0"
        return _json({"name": "hasten", "version": number, "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        """That the server answers."""
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """Whether every model can answer; 503 if not."""
        return _json({"ready": self._models.ready}, 200 if self._models.ready else 503)

    async def model_ready(self, request: Request) -> Response:
        """Whether a model can answer; 503 if not."""
        served = self._served(request)
        ready = served.engine.ready and not self._models.draining
        return _json({"name": served.name, "ready": ready}, 200 if ready else 503)

    async def model(self, request: Request) -> Response:
        """Versions, inputs and outputs of a model."""
        return _json(metadata(self._served(request)))

    async def infer(self, request: Request) -> Response:
        """What a model makes of tensors or texts.

        Raises:
            UsageError: The request makes no sense, or not for this model.
            HastenError: As `Engine.ask`.
        """
        served = self._served(request)
        if served.task == GENERATES:
            raise UsageError(
                f"{served.name} writes texts token by token, which is not done in one inference",
                "POST /v1/chat/completions or /v1/completions",
            )
        if request.headers.get("content-encoding", "identity") != "identity":
            raise UsageError("the body is compressed, which is not read here", "Send it as it is")
        body = await request.body()
        asked = await apart(len(body), read_request, body, request.headers.get(HEADER))
        call = call_of(asked.parameters, self._timeout)
        names = TEXT_INPUTS.get(served.task, ())
        exchange_of(request).note(model=served.name, inputs=len(asked.inputs))
        with self._models.use(served) as engine:
            if any(name in asked.inputs for name in names):
                outputs = await infer_texts(engine, asked, call)
            else:
                outputs = await infer_tensors(engine, asked, call)
        wanted = asked.outputs or tuple(Wanted(name, asked.binary) for name in outputs)
        head = {"model_name": served.name, "model_version": version_of(served)} | ({"id": asked.id} if asked.id else {})
        chosen = {one.name: outputs[one.name] for one in wanted}
        size = sum(_size(output) for output in chosen.values())
        if sum(_size(chosen[one.name]) for one in wanted if not one.binary) > _MOST_JSON:
            raise UsageError(f"the outputs have {size} bytes, which is too much for JSON", "Ask for binary_data_output")
        told, json_size = await apart(size, write_answer, head, chosen, frozenset(o.name for o in wanted if o.binary))
        if not json_size:
            return Response(told, media_type="application/json")
        return Response(told, media_type="application/octet-stream", headers={HEADER: str(json_size)})

    async def only_post(self, request: Request) -> Response:
        """Refuse to infer without a body.

        Raises:
            HTTPException: Always, 405.
        """
        raise HTTPException(405, headers={"Allow": "POST"})

    def _served(self, request: Request) -> Served:
        """The model of the path.

        Raises:
            UnknownModelError: There is none of that name or version.
        """
        name, asked = request.path_params["name"], request.path_params.get("version")
        served, adapter = self._models.find(name)
        if adapter:
            raise UnknownModelError(f"there is no model {shown(name)} here", "Adapters are used through /v1")
        if asked is not None and asked != version_of(served):
            raise UnknownModelError(
                f"{served.name} has no version {shown(asked)}", f"It has {version_of(served)}; or name none"
            )
        return served


def version_of(served: Served) -> str:
    """The version of a model: the first digits of its bundle's digest."""
    return served.engine.bundle.digest.removeprefix("sha256:")[:_VERSION_DIGITS]


def metadata(served: Served) -> dict[str, object]:
    """What a model takes and gives, as the protocol tells it; the parameter ``group`` says what belongs together."""
    manifest = served.manifest
    texts = TEXT_INPUTS.get(served.task, ())
    return {
        "name": served.name,
        "versions": [version_of(served)],
        "platform": "hasten_onnxruntime",
        "inputs": [*map(_described, manifest.inputs), *(_text(name, "BYTES", [-1]) for name in texts)],
        "outputs": [*map(_described, manifest.outputs), *(_text(*one) for one in text_outputs(manifest))],
    }


def call_of(parameters: Mapping[str, object], most: float) -> Call:
    """How a request is to be treated, by Triton's parameters: ``timeout`` in microseconds, ``priority`` from 1.

    1 is the most urgent, and larger numbers are less so: 1 is our 10, 11 our 0, 21 and more our -10; 0 is the default.

    Args:
        parameters: Of the request.
        most: Seconds that any request may take.

    Raises:
        UsageError: One is no whole number, or negative.
    """
    found = {name: parameters.get(name, 0) for name in ("timeout", "priority")}
    for name, value in found.items():
        if type(value) is not int or not 0 <= value <= _MOST_MICROSECONDS:
            raise UsageError(f"the parameter {name} is {shown(value)}", "Send a whole number from 0")
    microseconds, rank = (int(str(value)) for value in found.values())
    priority = max(-MOST_PRIORITY, MOST_PRIORITY + 1 - rank) if rank else 0
    return Call(priority, min(microseconds / 1e6, most) if microseconds else most)


def _described(spec: TensorSpec) -> dict[str, object]:
    shape = [extent if isinstance(extent, int) else -1 for extent in spec.shape]
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape, "parameters": {"group": "tensors"}}


def _text(name: str, datatype: str, shape: list[int]) -> dict[str, object]:
    parameters: dict[str, object] = {"group": "texts"} | ({"optional": True} if name == OPTIONAL else {})
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}


def _size(output: Output) -> int:
    return sum(map(len, output)) if isinstance(output, list) else output.nbytes


def _json(document: object, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status_code=status, media_type="application/json")
