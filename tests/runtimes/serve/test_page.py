"""The built-in page: what it may do, what it polls, and how it works in a real browser."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import httpx
import pytest
import serving
from browser import Browser
from serving import Server
from task_builders import processor
from task_graphs import LABELS, classifier, write_bundle

from runtimes.serve.auth import new_key
from runtimes.serve.page import FILES, POLICY, LoadAnswer

STATIC = resources.files("runtimes.serve").joinpath("static")
LOADED = "document.body.dataset.loaded === 'yes'"
SLY = "<b>sly</b>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(browser: Browser, everything: Server) -> Iterator[Browser]:
    """The page, open and drawn; its console stays silent."""
    browser.said.clear()
    browser.go(everything.url)
    browser.wait(LOADED)
    yield browser
    assert browser.said == []


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server that asks for a key, and the key; its model has a label that is HTML."""
    folder = tmp_path_factory.mktemp("locked")
    text = processor(labels=(SLY, "so so", "good"))
    write_bundle(folder / "bundle", "text-classification", classifier(), text=text)
    key = new_key(folder / "keys", "reader")
    words = (folder / "bundle", "--api-keys", folder / "keys", "--workers", "1")
    with serving.serving(*words) as server:
        yield server, key


def choose(page: Browser, model: str) -> None:
    page.run(f"document.querySelector('#model').value = '{model}'")
    page.run("document.querySelector('#model').dispatchEvent(new Event('change'))")


class Tags(HTMLParser):
    """Every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_its_files_are_served_with_a_strict_policy(everything: Server) -> None:
    with httpx.Client(base_url=everything.url, timeout=30.0) as client:
        for path, (name, kind) in FILES.items():
            response = client.get(path)
            assert response.content == STATIC.joinpath(name).read_bytes()
            assert response.headers["content-type"] == kind
            assert response.headers["content-security-policy"] == POLICY
            assert response.headers["x-content-type-options"] == "nosniff"
            again = client.get(path, headers={"if-none-match": response.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.head(path).status_code == 200
        assert client.get("/static/../page.py").status_code == 404
        assert client.get("/static/page.py").status_code == 404


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    html = STATIC.joinpath("index.html").read_text()
    for tag, attributes in Tags(html).found:
        assert tag != "style"
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert tag != "script" or attributes["src"] == "/static/page.js"
        for name in ("src", "href"):
            assert re.match(r"/|#|data:image/svg", attributes.get(name) or "/"), attributes
    css, script = STATIC.joinpath("page.css").read_text(), STATIC.joinpath("page.js").read_text()
    assert "url(" not in css
    assert "@import" not in css
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|cookie|https?:", script
    )
    assert "unsafe" not in POLICY
    assert "*" not in POLICY


def test_its_files_are_in_the_package() -> None:
    root = Path(__file__).resolve().parents[3]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for name, _ in FILES.values():
        assert f"*{Path(name).suffix}" in patterns


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(scheme: int) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1."""
    css = STATIC.joinpath("page.css").read_text()
    colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", css.split(":root")[1 + scheme]))
    pairs = [(ink, paper) for ink in ("ink", "soft") for paper in ("paper", "sheet", "wash")]
    pairs += [("accent", "accent-wash"), ("accent", "paper"), ("accent-ink", "accent"), ("bad", "sheet")]
    for front, back in [*pairs, ("ink", "accent-wash")]:
        light, dark = sorted((luminance(colors[front]), luminance(colors[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_load_is_what_its_schema_says(everything: Server) -> None:
    response = httpx.get(f"{everything.url}/load", timeout=30.0)
    assert response.headers["cache-control"] == "no-store"
    found = LoadAnswer.model_validate_json(response.content)
    assert found.ready
    assert {model.name: model.task for model in found.models}["answers"] == "question-answering"
    for model in found.models:
        assert [worker.state for worker in model.stats.workers] == ["ready"]
        assert any(line.startswith("because") for line in model.why)
        assert [one.variant for one in model.variants] == [model.stats.workers[0].variant]
    assert {model.name for model in found.models if model.chat} == {"stories"}


def test_it_shows_what_runs_where(page: Browser) -> None:
    assert page.text("#state .said") == "ready"
    for name in ("sentences", "sentiment", "places", "mask", "answers", "plain", "stories"):
        cards = (
            f"[...document.querySelectorAll('.card')].filter((one) => one.querySelector('h3').innerText === '{name}')"
        )
        card = page.run(f"{cards}[0]?.innerText")
        assert "CPU" in card
        assert "ready" in card
        assert "cpu-fp32" in card
        assert "the only candidate" in card
    assert page.text("#tiles .tile h3") == "Requests"


def test_load_moves_when_there_is_load(page: Browser, everything: Server) -> None:
    for _ in range(5):
        httpx.post(f"{everything.url}/classify", json={"model": "sentiment", "texts": ["the cat"]}, timeout=30.0)
    page.wait("Number(document.querySelectorAll('.value')[0].innerText) > 0")
    page.wait("Number(document.querySelectorAll('.value')[2].innerText) > 0")
    page.wait("document.querySelector('.spark .line').getAttribute('d').startsWith('M')")


def test_two_texts_are_compared(page: Browser) -> None:
    choose(page, "sentences")
    page.type("[name=first]", "the cat")
    page.type("[name=second]", "the cat")
    page.click("#panel button.main")
    page.wait("!!document.querySelector('.big')")
    assert page.text(".big").startswith("1.000 cosine similarity, of vectors with 8 numbers")
    page.type("[name=second]", "a red house")
    page.click("#panel button.main")
    page.wait("!document.querySelector('.big').innerText.startsWith('1.000')")
    assert "tokens" in page.text("#panel .told")


def test_a_text_is_classified(page: Browser) -> None:
    choose(page, "sentiment")
    page.type("#panel textarea", "the cat")
    page.click("#panel button.main")
    page.wait("!!document.querySelector('.bars')")
    shown = page.run("[...document.querySelectorAll('.bars .name')].map((one) => one.innerText)")
    assert sorted(shown) == sorted(LABELS["text-classification"])
    values = page.run(
        "[...document.querySelectorAll('.bars > span:nth-child(3n)')].map((one) => Number(one.innerText))"
    )
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1.0, abs=0.002)


def test_a_text_is_written_piece_by_piece(page: Browser) -> None:
    choose(page, "stories")
    page.run("document.querySelector('[name=tokens]').value = 12")
    page.type("#say", "hello")
    page.click("#panel button.main")
    page.wait("document.querySelector('#panel .told').innerText.includes('first token after')")
    assert page.text(".turn.user") == "hello"
    assert page.run("document.querySelectorAll('.turn').length") == 2
    assert page.text("#panel .told").count("token") >= 2
    assert not page.run("document.querySelector('button.stop').checkVisibility()")
    page.click("#panel .clear")
    assert page.run("document.querySelectorAll('.turn').length") == 0


def test_other_tasks_have_their_box(page: Browser) -> None:
    for model, word in (("mask", "fillings"), ("answers", "score"), ("places", "entities")):
        choose(page, model)
        page.click("#panel button.main")
        page.wait("!!document.querySelector('.result pre')")
        assert word in page.text(".result pre")
    choose(page, "plain")
    page.wait("document.querySelector('#panel pre').innerText.includes('input_ids')")
    page.click("#panel button.main")
    page.wait("!!document.querySelector('.result pre')")
    assert page.text(".result pre").startswith("sentence_embedding  FP32 [1, 8]")


def test_what_goes_wrong_is_told(page: Browser) -> None:
    choose(page, "mask")
    page.type("#panel textarea", "no mask here")
    page.click("#panel button.main")
    page.wait("!!document.querySelector('.told.bad')")
    assert "has no mask" in page.text(".told.bad")
    page.said.clear()  # the browser notes the 400


def test_every_field_has_a_label_and_nothing_is_wider_than_a_phone(page: Browser) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", size)
    try:
        for model in ("sentences", "sentiment", "stories", "plain", "answers"):
            choose(page, model)
            unnamed = (
                "[...document.querySelectorAll('input, textarea, select')].filter((one) => !one.labels.length).length"
            )
            assert page.run(unnamed) == 0
            assert page.run("document.documentElement.scrollWidth") <= 360
    finally:
        page.call("Emulation.setDeviceMetricsOverride", size | {"width": 1200, "height": 1000, "mobile": False})


def test_a_locked_server_asks_for_its_key(browser: Browser, locked: tuple[Server, str]) -> None:
    server, key = locked
    assert httpx.get(f"{server.url}/load", timeout=30.0).status_code == 401
    assert httpx.get(server.url, timeout=30.0).status_code == 200
    browser.go(server.url)
    browser.wait("document.querySelector('#key').open")
    assert browser.text("#state .said") == "locked"
    assert browser.run("document.querySelectorAll('.card').length") == 0
    asked = len([one for one in server.events if one.get("path") == "/load"])
    browser.run("new Promise((done) => setTimeout(done, 2500))")
    assert len([one for one in server.events if one.get("path") == "/load"]) == asked  # it waits for its reader
    browser.type("#key-value", "not the key")
    browser.click("#key button.main")
    browser.wait(
        "document.querySelector('#key').open && document.querySelector('#key-told').innerText.includes('does not know')"
    )
    browser.type("#key-value", key)
    browser.click("#key button.main")
    browser.wait(LOADED)
    assert not browser.run("document.querySelector('#key').open")
    browser.click("#panel button.main")
    browser.wait("!!document.querySelector('.bars')")
    kept = browser.run(
        "[document.cookie, localStorage.length, sessionStorage.length, document.querySelector('#key-value').value]"
    )
    assert kept == ["", 0, 0, ""]
    assert SLY in browser.run("[...document.querySelectorAll('.bars .name')].map((one) => one.innerText)")
    assert browser.run("document.querySelectorAll('main b').length") == 0
    browser.go(server.url)
    browser.wait("document.querySelector('#key').open")
    browser.said.clear()
