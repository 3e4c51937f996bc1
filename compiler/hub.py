"""Fetch a model from the Hugging Face hub, or say clearly why not."""

from __future__ import annotations

import os
import re
from pathlib import Path

from artifacts.errors import InstallationError, SourceError

from .quiet import quiet

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LIGHT = ("*.json", "*.txt", "*.model", "bpe.codes")
_SKIPPED = ("onnx/*", "openvino/*", "*.onnx", "runs/*", "checkpoint-*/*", "coreml/*")
_TIMEOUT = 10.0  # seconds to the first answer of the hub


def looks_like_hub_id(text: str) -> bool:
    """``name`` or ``owner/name``, and no file name."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".onnx", ".safetensors", ".bin", ".json"))


def download(hub_id: str) -> Path:
    """The local snapshot of a model: from the cache, else downloaded (only the files that a compile reads).

    Raises:
        SourceError: No network, no such model, or no access.
        InstallationError: The ``compile`` extra is not installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            HTTPError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise InstallationError(f"{error.name} is not installed", "pip install 'hasten[compile]'") from error
    folder_hint = "Download the model elsewhere and pass its folder: hasten compile ./folder"
    try:
        with quiet():
            if constants.HF_HUB_OFFLINE:
                return _cached(hub_id)
            return _fetch(hub_id)
    except GatedRepoError as error:
        remedy = "Accept it there and log in with `hf auth login`"
        raise SourceError(f"the licence of {hub_id} was not accepted on the hub", remedy) from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"neither a path nor a public hub model: {hub_id}", "Check the name") from error
    except HFValidationError as error:
        raise SourceError(f"{hub_id} is neither a path nor a hub id", "Pass a folder or an .onnx file") from error
    except HfHubHTTPError as error:
        raise SourceError(f"the hub refused {hub_id}: {error}", folder_hint) from error
    except (OSError, ValueError, HTTPError) as error:
        raise SourceError(f"{hub_id} is no path, and the Hugging Face hub cannot be reached", folder_hint) from error


def _fetch(hub_id: str) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        info = hub.HfApi().model_info(hub_id, timeout=_TIMEOUT)
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):
            raise  # the hub answered
        return _cached(hub_id)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin"
    return Path(_snapshot(hub_id, weights, local_files_only=False))


def _cached(hub_id: str) -> Path:
    # A pytorch_model.bin lies in the same folder if it was downloaded; asking for it could only fail.
    return Path(_snapshot(hub_id, "*.safetensors", local_files_only=True))


def _snapshot(hub_id: str, weights: str, *, local_files_only: bool) -> str:
    import huggingface_hub as hub

    # No revision: only then does the cache note what "main" is, and serve it offline later.
    return str(
        hub.snapshot_download(
            hub_id,
            allow_patterns=[*_LIGHT, weights],
            ignore_patterns=list(_SKIPPED),
            local_files_only=local_files_only,
        )
    )
