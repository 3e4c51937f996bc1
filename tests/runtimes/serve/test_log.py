"""Log lines: JSON or text, whole whatever a client put into a path, and never what a prompt says."""

from __future__ import annotations

import io
import json
import logging

import pytest

from runtimes.serve.log import Log

SECRET = "my prompt \x1b[2J"


def test_json_lines() -> None:
    stream = io.StringIO()
    Log("json", stream)("request", {"path": "/a\nb", "status": 200, "where": {1: 2}.keys()})
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert (found["event"], found["path"], found["status"], found["level"]) == ("request", "/a\nb", 200, "info")
    assert found["time"].endswith("Z")


def test_text_lines_are_one_line_and_say_nothing_that_a_terminal_obeys() -> None:
    stream = io.StringIO()
    Log("text", stream)("request", {"path": "/a\x1b[2J\n\u202eb c", "status": 200, "key": "", "none": None})
    (line,) = stream.getvalue().splitlines()
    assert line.split(" ", 1)[1] == 'request path="/a\\u001b[2J\\n\\u202eb c" status=200'


def test_a_bug_is_told_without_its_text() -> None:
    stream = io.StringIO()
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        Log("json", stream).bug(error, {"id": "req-1"})
    found = json.loads(stream.getvalue())
    assert found["error"] == "KeyError"
    assert found["at"][-1].startswith("test_log.py:")
    assert "prompt" not in stream.getvalue()


def test_warnings_of_libraries_are_taken_over_without_their_arguments() -> None:
    stream = io.StringIO()
    log = Log("json", stream)
    log.forward("hasten.test.library")
    logger = logging.getLogger("hasten.test.library")
    logger.info("not this")
    logger.warning("this %s", SECRET)
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(one["event"], one["message"], one["level"]) for one in found] == [("library", "this %s", "warning")]
    try:
        raise ValueError(SECRET)
    except ValueError:
        logger.exception("went wrong")
    assert "prompt" not in stream.getvalue()
    assert '"error":"ValueError"' in stream.getvalue()


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_stream_that_is_gone_ends_nothing(form: str) -> None:
    stream = io.StringIO()
    stream.close()
    Log(form, stream)("request", {})  # type: ignore[arg-type]
