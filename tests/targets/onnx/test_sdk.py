"""The door to onnxruntime: which distribution an import gets, and which ones overwrite each other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from h1export.errors import H1ExportError
from h1export.targets.onnx import sdk

CPU, GPU = sdk.PACKAGES
Site = Mapping[str, str]  # distribution -> version; the empty name stands for a module without a distribution


@pytest.fixture
def no_onnxruntime() -> Iterator[None]:
    """Let an import look onnxruntime up anew, and put back what was imported."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == sdk.MODULE}
    for name in before:
        del sys.modules[name]
    sdk.onnxruntime.cache_clear()
    yield
    sdk.onnxruntime.cache_clear()
    sys.modules.pop(sdk.MODULE, None)
    sys.modules.update(before)


def install(site: Path, distributions: Site, module: bool = True) -> str:
    """Write a folder as pip leaves it, and return its entry of sys.path."""
    site.mkdir()
    for name, version in distributions.items():
        if name:
            info = site / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module and distributions:
        (site / sdk.MODULE).mkdir()
        (site / sdk.MODULE / "__init__.py").write_text("")
    return str(site)


@pytest.mark.usefixtures("no_onnxruntime")
@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ([], {}),
        ([{}], {}),
        ([{CPU: "1.31"}], {CPU: "1.31"}),
        ([{GPU: "1.31"}], {GPU: "1.31"}),
        ([{}, {CPU: "1.31"}], {CPU: "1.31"}),
        ([{GPU: "1.31"}, {CPU: "1.30"}], {GPU: "1.31"}),
        ([{CPU: "1.30"}, {GPU: "1.31"}], {CPU: "1.30"}),
        ([{CPU: "1.31"}, {CPU: "1.30"}], {CPU: "1.31"}),
        ([{CPU: "1.30", GPU: "1.31"}], {CPU: "1.30", GPU: "1.31"}),
        ([{}, {CPU: "1.30", GPU: "1.31"}], {CPU: "1.30", GPU: "1.31"}),
        ([{GPU: "1.32"}, {CPU: "1.30", GPU: "1.31"}], {GPU: "1.32"}),  # what is behind takes no part
        ([{CPU: "1.30", GPU: "1.31"}, {GPU: "1.32"}], {CPU: "1.30", GPU: "1.31"}),
        ([{"": ""}, {GPU: "1.31"}], {GPU: "1.31"}),  # an editable install: its distribution is elsewhere
        ([{"": ""}, {GPU: "1.31"}, {CPU: "1.30"}], {CPU: "1.30"}),
        ([{"": ""}], {}),
    ],
)
def test_only_what_shares_the_imported_folder_counts(
    sites: Sequence[Site], expected: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = [install(tmp_path / str(number), site) for number, site in enumerate(sites)]
    monkeypatch.setattr(sys, "path", [*path, *path])  # a folder may be on the path twice
    importlib.invalidate_caches()
    assert sdk.installed() == expected
    if len(expected) == 1:
        first = next(entry for entry, site in zip(path, sites, strict=True) if site)
        assert Path(str(sdk.onnxruntime().__file__)).parents[1] == Path(first)
        return
    says = "overwrite each other's files" if expected else r"is not installed; pip install 'h1export\[ort\]'"
    with pytest.raises(H1ExportError, match=says):
        sdk.onnxruntime()


@pytest.mark.usefixtures("no_onnxruntime")
def test_a_distribution_whose_files_are_gone_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninstalling one of two that overwrote each other leaves the other's metadata without a module."""
    monkeypatch.setattr(sys, "path", [install(tmp_path / "site", {CPU: "1.31"}, module=False)])
    importlib.invalidate_caches()
    with pytest.raises(H1ExportError, match="is not installed"):
        sdk.onnxruntime()


@pytest.mark.usefixtures("no_onnxruntime")
def test_a_link_to_the_folder_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "lib", {GPU: "1.31"})
    (tmp_path / "lib64").symlink_to("lib")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "lib64")])
    importlib.invalidate_caches()
    assert sdk.installed() == {GPU: "1.31"}


@pytest.mark.usefixtures("no_onnxruntime")
def test_a_module_in_the_place_of_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that a program made itself has no specification."""
    monkeypatch.setitem(sys.modules, sdk.MODULE, ModuleType(sdk.MODULE))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(H1ExportError, match="is not installed"):
        sdk.onnxruntime()
