"""The page of examples/browser in headless Chromium: the text of `generate`, and no requests but for its own files."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chromium import FLAGS, SOFTWARE_GPU, Browser

from h1export.artifact.artifact import Artifact
from h1export.commands.generate import generate_text
from h1export.runtime.generation import Sampling

pytestmark = [pytest.mark.ort, pytest.mark.node, pytest.mark.chromium]

Build = Callable[..., Artifact]
PROMPT = "import os\nimport sys\n\nclass Foo(object):"
TOKENS = 96
UNTIL = """new Promise((resolve) => {{
  const look = () => {{
    const state = document.body.dataset.state;
    if ({states}.includes(state)) resolve(state + ": " + document.getElementById("status").textContent);
    else setTimeout(look, 50);
  }};
  look();
}})"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def served(node: Callable[..., str], tmp_path: Path) -> Iterator[Callable[[Artifact, str], str]]:
    """served(artifact, "name") -> the address of the page over this artifact."""
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def serve(artifact: Artifact, name: str) -> str:
            node("browser/collect.mjs", artifact.folder, tmp_path / name)
            return f"http://127.0.0.1:{server.server_address[1]}/{name}/"

        yield serve
        server.shutdown()


def generated(browser: Browser, address: str, device: str, *, tokens: int = TOKENS) -> dict[str, str]:
    """Press the page's button on ``device``, and return what it shows and measures."""
    browser.open(f"{address}?device={device}")
    states = json.dumps(["ready", "failed"])
    assert browser.value(UNTIL.format(states=states)).startswith("ready"), browser.events
    browser.value(f"document.getElementById('prompt').value = {json.dumps(PROMPT)}")
    browser.value(f"document.getElementById('tokens').value = {tokens}")
    browser.value("document.querySelector('button').click()")
    states = json.dumps(["done", "failed"])
    assert browser.value(UNTIL.format(states=states)).startswith("done"), browser.events
    text = browser.value("document.getElementById('text').textContent")
    data = json.loads(browser.value("JSON.stringify({...document.body.dataset})"))
    assert {one.split("?")[0].startswith(address) for one in browser.requests() if not one.startswith("data:")} == {
        True
    }
    return {"text": text, **data}


def test_the_text_is_that_of_generate_and_unpacked_weights_are_faster(
    tiny: Path, build: Build, browser: Browser, served: Callable[[Artifact, str], str]
) -> None:
    """MatMulNBits unpacks every weight in every call: ten times as slow on this model, and at least twice."""
    found = {}
    for graph in ("wasm", "cpu"):
        artifact = build(tiny, "int4", graph=graph, layout="transformers.js")
        truth = "".join(generate_text(artifact.folder, PROMPT, TOKENS, sampling=Sampling(), kernels="stock"))
        found[graph] = generated(browser, served(artifact, graph), "wasm")
        assert found[graph]["text"] == PROMPT + truth, graph
        print(graph, {name: value for name, value in found[graph].items() if name != "text"})
    assert float(found["cpu"]["fastest"]) > 2 * float(found["wasm"]["fastest"])


def test_webgpu_without_float16_has_the_text_of_generate(
    tiny: Path, build: Build, served: Callable[[Artifact, str], str], tmp_path: Path
) -> None:
    """The adapter is software (SwiftShader); a token takes it long, so there are few."""
    artifact = build(tiny, "int4", graph="wasm", layout="transformers.js")
    browser = Browser(tmp_path / "profile", (*(flag for flag in FLAGS if flag != "--disable-gpu"), *SOFTWARE_GPU))
    try:
        found = generated(browser, served(artifact, "webgpu"), "webgpu", tokens=20)
    finally:
        browser.close()
    assert found["adapter"] == "true"
    truth = "".join(generate_text(artifact.folder, PROMPT, 20, sampling=Sampling(), kernels="stock"))
    assert found["text"] == PROMPT + truth
