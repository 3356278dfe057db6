"""Every file that may come from a stranger, mutated: what reads it reads it, or says in one short line why not.

``MUTATIONS`` of the environment says how many variants of each file are tried; `nox -s fuzz` tries 20,000.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_files import build
from fuzz_table import READERS, write_weights
from mutations import MARK, mutated
from odd_files import ODD, bounded
from released_config import RELEASED

from h1export.errors import MOST_SHOWN, H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

COUNT = int(os.environ.get("MUTATIONS", "150"))
SECONDS = 2.0  # of one reading


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder that a reader reads without an error."""

    def prepare(name: str) -> Path:
        folder = tmp_path_factory.mktemp("fuzz") / "out"
        build(folder, FalconH1Config.from_config(dict(RELEASED)))
        if name == "manifest":  # options that the target has
            data = json.loads((folder / "manifest.json").read_text())
            data["target"] = "ort"
            data["options"] = {"accuracy_level": 4, "graph": "cpu", "logits": "all", "activations": "fp16"}
            (folder / "manifest.json").write_text(json.dumps(data))
        if name == "index":
            write_weights(folder / "a.safetensors")
        if name == "calibration":
            READERS["tokenizer"].write(folder / READERS["tokenizer"].file)
        READERS[name].write(folder / READERS[name].file)
        return folder

    return prepare


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_neither_waited_for_nor_loaded(
    name: str, odd: str, prepared: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(name)
    file = folder / READERS[name].file
    file.unlink()
    ODD[odd](file)
    message = ""
    with bounded():
        try:
            READERS[name].read(folder)
        except H1ExportError as error:
            message = str(error)
    assert message or odd not in {"8 GB of nothing", "device"} or not READERS[name].refuses
    assert "\n" not in message
    assert len(message) <= MOST_SHOWN + len(str(file))


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused_in_one_line(name: str, prepared: Callable[[str], Path]) -> None:
    folder = prepared(name)
    reader = READERS[name]
    file = folder / reader.file
    content = file.read_bytes()
    shutil.copy(file, folder.parent / "original")
    reader.read(folder)
    chance = random.Random(f"{name} 1")
    refused = 0
    for number in range(COUNT):
        variant = mutated(content, chance)
        file.write_bytes(variant)
        (folder.parent / "variant").write_bytes(variant)  # what failed, for whoever looks
        began = time.process_time()  # which other work on the machine does not lengthen
        try:
            reader.read(folder)
        except H1ExportError as error:
            refused += 1
            message = str(error)
        else:
            message = ""
        assert time.process_time() - began < SECONDS, f"variant {number}"
        assert "\n" not in message
        assert len(message) <= MOST_SHOWN + len(str(file)), f"variant {number}: {message}"
        assert MARK * 20 not in message, f"variant {number}: {message}"
    assert refused > COUNT // 10 or not reader.refuses
