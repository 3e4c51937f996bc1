from __future__ import annotations

import io
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from session_graphs import linear

from artifacts.errors import BundleError, ProviderError
from artifacts.target import CPU_PROVIDER
from runtimes.client import Worker
from runtimes.golden import Golden, check_golden, golden_error, load_golden, relative_error
from runtimes.session import Session


class Canned:
    def __init__(self, **outputs):
        self.outputs = {name: np.asarray(value) for name, value in outputs.items()}

    def run(self, feeds):
        return self.outputs


@pytest.fixture
def bundle(make_bundle, recipe):
    return make_bundle({"only": recipe(linear)})


def test_session_and_child_have_the_same_error(bundle):
    golden = load_golden(bundle)
    assert (list(golden.feeds), list(golden.outputs)) == (["x"], ["y"])
    model, options = bundle.path / "only.onnx", bundle.variant("only").session
    here = golden_error(Session(model, CPU_PROVIDER, options=options, threads=1), golden)
    with Worker(model, CPU_PROVIDER, options=options, threads=1) as worker:
        assert golden_error(worker, golden) == here
    assert here < 8 * 2**-24


def test_relative_error():
    reference = np.array([3.0, 4.0])
    assert relative_error(np.array([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0.0
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_error(np.ones(2), np.zeros(2)) == math.inf
    assert relative_error(None, reference) == math.inf
    assert relative_error(np.ones(3), reference) == math.inf
    assert relative_error(np.array([np.nan, 4.0]), reference) == math.inf
    assert relative_error(np.array([np.inf, 4.0]), reference) == math.inf
    assert relative_error(np.array([1, 2]), np.array([1, 2])) == 0.0
    # Squares of these overflow float32, not float64.
    assert relative_error(np.full(2, 2e30, np.float32), np.full(2, 1e30, np.float32)) == pytest.approx(1.0)


def test_the_worst_output_counts():
    golden = Golden({}, {"a": np.array([1.0]), "b": np.array([10.0])})
    assert golden_error(Canned(a=[1.0], b=[11.0]), golden) == pytest.approx(0.1)
    assert golden_error(Canned(a=[1.0]), golden) == math.inf
    assert golden_error(Canned(), Golden({}, {})) == math.inf


def test_check_golden_names_the_loser():
    golden = Golden({}, {"a": np.array([1.0])})
    assert check_golden(Canned(a=[1.05]), golden, 0.1, "me") == pytest.approx(0.05)
    for wrong in (1.2, math.nan):
        with pytest.raises(ProviderError, match=r"me computes wrong results here: golden error .+, allowed 0\.1"):
            check_golden(Canned(a=[wrong]), golden, 0.1, "me")


def npy(array, **changes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    data = buffer.getvalue()
    for old, new in changes.values():
        assert old in data
        data = data.replace(old, new)
    return data


X, Y = np.zeros((16, 64), np.float32), np.zeros((16, 64), np.float32)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"input.x": npy(X)}, "lacks output.y"),
        ({"input.x": npy(X), "output.y": npy(Y), "output.z": npy(Y)}, "no input or output"),
        ({"input.x": npy(X.astype(np.float64)), "output.y": npy(Y)}, "the manifest says float32"),
        ({"input.x": npy(X[0]), "output.y": npy(Y)}, "the manifest says float32"),
        ({"input.x": npy(np.array([{}], object)), "output.y": npy(Y)}, "not a plain array"),
        ({"input.x": npy(np.asfortranarray(X + np.arange(64))), "output.y": npy(Y)}, "not a plain array"),
        ({"input.x": npy(X, size=(b"(16, 64)", b"(1600000, 64)")), "output.y": npy(Y)}, "cannot be read"),
        ({"input.x": npy(X, size=(b"(16, 64)", b"(99, 64)")), "output.y": npy(Y)}, "cannot be read|not a plain array"),
        ({"input.x": npy(X)[:40], "output.y": npy(Y)}, "cannot be read"),
        ({"input.x": b"noise", "output.y": npy(Y)}, "cannot be read"),
        ({"input.x": npy(X, version=(b"NUMPY\x01", b"NUMPY\x03")), "output.y": npy(Y)}, "version"),
    ],
)
def test_a_golden_file_that_breaks_the_format(bundle, members, said):
    with zipfile.ZipFile(bundle.path / "golden.npz", "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    with pytest.raises(BundleError, match=said):
        load_golden(bundle)


def test_no_compression_and_no_noise(bundle):
    path = bundle.path / "golden.npz"
    np.savez_compressed(path, **{"input.x": X, "output.y": Y})
    with pytest.raises(BundleError, match="is compressed"):
        load_golden(bundle)
    whole = path.read_bytes()
    for data in (b"", b"noise", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(BundleError, match=r"golden\.npz of .+ cannot be read"):
            load_golden(bundle)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        load_golden(bundle)


def test_the_same_name_twice(bundle):
    with zipfile.ZipFile(bundle.path / "golden.npz", "w") as archive:
        archive.writestr("input.x.npy", npy(X))
        archive.writestr("output.y.npy", npy(Y))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("input.x.npy", npy(X))
    with pytest.raises(BundleError, match="twice"):
        load_golden(bundle)


def test_a_giant_is_refused_unread(bundle, monkeypatch):
    monkeypatch.setattr("runtimes.golden.MAX_BYTES", 100)
    with pytest.raises(BundleError, match="larger than"):
        load_golden(bundle)


def test_a_manifest_that_asks_for_more(bundle):
    manifest = replace(bundle.manifest, inputs=(*bundle.manifest.inputs, replace(bundle.manifest.inputs[0], name="z")))
    with pytest.raises(BundleError, match=r"lacks input\.z"):
        load_golden(replace(bundle, manifest=manifest))
