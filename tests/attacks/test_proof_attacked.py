"""The MUSTs of docs/format.md on proof.json alone, broken; and the page held to the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bundle_builders import a_proof, sealed

from artifacts.errors import SchemaError
from artifacts.proof import Proof


def a_payload() -> dict[str, Any]:
    return json.loads(a_proof().to_json())["payload"]


def refuse_proof(payload: dict[str, Any], match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        Proof.parse(sealed(payload))


def test_p1_altered_proof():
    data = a_proof().to_json()
    assert b'"golden_error": 1e-06' in data
    for old, new in ((b"1e-06", b"2e-06"), (b'"samples": 500', b'"samples": 501'), (b'"sha256": "', b'"sha256": "0')):
        with pytest.raises(SchemaError, match="sha256"):
            Proof.parse(data.replace(old, new, 1))
    Proof.parse(json.dumps(json.loads(data)).encode())  # the form of the document around it is free


def test_p3_variants_of_a_proof():
    payload = a_payload()
    payload["variants"] *= 2
    refuse_proof(payload, r"variants\[1\]: the variant 'cpu-int8' stands twice")
    for key, value in (("status", "excellent"), ("variant", "A B"), ("size", -1)):
        payload = a_payload()
        payload["variants"][0][key] = value
        refuse_proof(payload, rf"payload.variants\[0\].{key}")
    payload = a_payload()
    payload["variants"][0]["fidelity"][0]["samples"] = -1
    refuse_proof(payload, "samples")


def test_the_page_and_the_attacks_name_each_other():
    page = (Path(__file__).parents[2] / "docs/format.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("a*/test_*.py"))
    musts = re.findall(r"^- \*\*([A-Z]\d+)\*\*", page, re.MULTILINE)
    named = re.findall(r"`(test_\w+)`", page)
    assert len(musts) == len(set(musts))
    assert {name.split("_")[1].upper() for name in named if re.match(r"test_[jmptk]\d", name)} == {
        must for must in musts if must[0] in "JMPTK"
    }
    for name in named:
        assert f"def {name}(" in tests, name
    for must in re.findall(r"def test_([jmptk]\d+)_", tests):
        assert must.upper() in musts
