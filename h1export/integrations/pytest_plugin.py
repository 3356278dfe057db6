"""The pytest plugin: another repository tests its exports with the fixtures below.

It loads nothing heavy until one is used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from h1export.integrations.pytest_comparison import Exported, Truth
    from h1export.model.falcon_h1.states import Array, Ids

ARTIFACT = "h1_artifact"
CHECKPOINT = "h1_checkpoint"
SETTINGS = {
    ARTIFACT: "folder that h1export build has made",
    CHECKPOINT: "checkpoint that it was built from: folder or Hub id [default: h1export's own]",
}


def pytest_addoption(parser: Any) -> None:
    """Add --h1-artifact and --h1-checkpoint, and settings of the same names to the configuration file.

    Paths in the file are relative to it.
    """
    group = parser.getgroup("h1export")
    for name, text in SETTINGS.items():
        group.addoption("--" + name.replace("_", "-"), default=None, help=text)
        parser.addini(name, text, default="")


def _setting(config: Any, name: str) -> str | None:
    given = config.getoption(name)
    if given is None and (written := config.getini(name)):
        place = (config.inipath.parent if config.inipath else config.rootpath) / written
        return str(place) if place.exists() or name == ARTIFACT else str(written)  # a Hub id is no path
    return given or None


def _failing(make: Callable[[], Any]) -> Any:
    """Return what ``make`` returns; fail the test without a traceback where it raises an error for users."""
    from h1export.errors import H1ExportError

    try:
        return make()
    except H1ExportError as error:
        message = str(error)
    return pytest.fail(f"h1export: {message}", pytrace=False)


@pytest.fixture(scope="session")
def h1_artifact(request: pytest.FixtureRequest) -> Exported:
    """Return the artifact that --h1-artifact or the setting h1_artifact names.

    It has ``ids(text)``, ``logits(ids)``, ``runner`` and ``exact``.
    """
    folder = _setting(request.config, ARTIFACT)
    if folder is None:
        pytest.fail(
            "h1export: no artifact; give --h1-artifact FOLDER, or h1_artifact in the configuration file", pytrace=False
        )
    assert folder is not None  # fail raises
    from h1export.integrations.pytest_comparison import Exported

    found: Exported = _failing(lambda: Exported.open(Path(folder)))
    return found


@pytest.fixture(scope="session")
def h1_reference(request: pytest.FixtureRequest, h1_artifact: Exported) -> Truth:
    """Return PyTorch's model on the checkpoint of h1_artifact, with the weights that the artifact stores.

    It has ``logits(ids)``.
    """
    from h1export.checkpoint import resolve
    from h1export.integrations.pytest_comparison import Truth

    checkpoint = _setting(request.config, CHECKPOINT)
    found: Truth = _failing(lambda: Truth(resolve.resolve(checkpoint), h1_artifact))
    return found


@pytest.fixture(scope="session")
def assert_logits_close(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return the check of logits; its arguments are ``found, truth, ids=None, tolerance=None``.

    It asserts that logits [seq, vocab] are within ``tolerance`` of the truth's range. The default is the tolerance that
    `validate` has for h1_artifact. The message shows the tokens of ``ids``.
    """

    def check(found: Array, truth: Array, ids: Ids | None = None, tolerance: float | None = None) -> None:
        __tracebackhide__ = True
        from h1export.integrations.pytest_comparison import Tolerance, difference

        exported: Exported = request.getfixturevalue("h1_artifact")
        allowed = exported.tolerance if tolerance is None else Tolerance(tolerance, "that the test gives")
        message = _failing(lambda: difference(found, truth, allowed, tokenizer=exported.tokenizer, ids=ids))
        if message:
            raise AssertionError(message)

    return check
