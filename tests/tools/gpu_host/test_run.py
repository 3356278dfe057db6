"""run.py: time limits, results, choices; the GPU tests of the repository are those that section b runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_host import bundle, pack, page, results, run, wheels
from gpu_host.section import SECTIONS, TOTAL_S, Host, Row, Section
from gpu_host.sections import kernel_tests
from gpu_host.worker import line

ROOT = Path(__file__).parents[3]
LIMIT = 299  # seconds that pytest has
SLOW = Section("z", "slow", "a section that never ends", 1)
CODE = """
import subprocess, sys, time
from gpu_host.section import Row
def run(host):
    yield Row("first", True, {"us": 1.5})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (host.work / "child").write_text(str(child.pid))
    yield Row("second", False, detail="slow")
    time.sleep(600)
"""


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """A bundle with no group."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / bundle.FILE).write_text(json.dumps({"format": bundle.FORMAT, "revision": "abc", "shape": None}))
    return folder


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_limit_kills_the_children_and_keeps_the_rows(tmp_path: Path, joined: Path) -> None:
    package = tmp_path / "gpu_host" / "sections"
    package.mkdir(parents=True)
    (package / "slow.py").write_text(CODE)
    start = f"import gpu_host.sections; gpu_host.sections.__path__.append({str(package)!r})"
    (tmp_path / "sitecustomize.py").write_text(start)
    environ = run.environment(joined, tmp_path, "cpu")
    environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), str(ROOT / "tools"), str(tmp_path)])
    begun = time.monotonic()
    found = run.run_section(SLOW, joined, tmp_path, device="cpu", environ=environ, limit_s=6)
    assert time.monotonic() - begun < 30
    assert found["state"] == "timeout", found["log"]
    assert [row["name"] for row in found["rows"]] == ["first", "second"]
    assert found["rows"][0]["figures"] == {"us": 1.5}
    pid = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid)


@pytest.mark.parametrize("peers", [False, True])
@pytest.mark.parametrize("threads", [None, 3])
def test_peers_stand_on_the_path_of_the_section_that_compares_them_alone(
    peers: bool, threads: int | None, joined: Path, *, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers takes a peer's kernels wherever it finds them, and calls them on tensors of the CPU."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environ = run.environment(joined, tmp_path, "cuda", section=replace(SLOW, peers=peers, threads=threads))
    path = environ["PYTHONPATH"].split(os.pathsep)
    assert (str(tmp_path / run.PEERS_SITE) in path) is peers
    assert path[0] == str(tmp_path / run.SITE)  # before the host's own packages, and the peers' too
    assert environ.get("OMP_NUM_THREADS") == (None if threads is None else "3")
    assert [section.letter for section in SECTIONS if section.peers] == ["e"]


def test_each_wheel_is_unpacked_into_the_folder_of_its_kind(joined: Path, tmp_path: Path) -> None:
    for folder, package in ((bundle.WHEELS, "own"), (bundle.PEERS, "mamba_ssm")):
        (joined / folder).mkdir()
        with zipfile.ZipFile(joined / folder / f"{package}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{package}/__init__.py", "")
    work = tmp_path / "work"
    for wheels_, site in ((bundle.WHEELS, run.SITE), (bundle.PEERS, run.PEERS_SITE)):
        run.install(joined / wheels_, work / site)
    found = {file.relative_to(work).as_posix() for file in work.glob("site*/*/__init__.py")}
    assert found == {"site/own/__init__.py", "site-peers/mamba_ssm/__init__.py"}


def test_half_a_line_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(line(Row("a", True)) + line(Row("b"))[:20])
    assert [row["name"] for row in run.read_rows(tmp_path / "rows")] == ["a"]


def test_default_sections_end_within_the_limit() -> None:
    assert sum(section.limit_s for section in SECTIONS if not section.on_demand) <= TOTAL_S
    assert len({section.letter for section in SECTIONS}) == len(SECTIONS)
    assert len([section for section in SECTIONS if not section.on_demand]) + 1 <= 8  # files, with results.json


def test_only(joined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [section.letter for section in run.chosen("f,a")] == ["a", "f"]
    assert "g" not in [section.letter for section in run.chosen(None)]
    common = ["--bundle", str(joined), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert run.main([*common, "--only", "a,y"]) == 2
    assert capsys.readouterr().err == "run: --only: no section 'y'; one of a, s, b, c, d, e, f, g\n"
    assert run.main(["--bundle", str(tmp_path), "--device", "cpu"]) == 2
    assert "is not there or no JSON" in capsys.readouterr().err


def section(**changes: Any) -> dict[str, Any]:
    facts = {"device": "H100", "driver": "580", "cuda": "13.0", "date": "2027-01-02", "revision": "abc"}
    row = {"name": "scan", "passed": True, "figures": {"median_us": 12.5}, "detail": ""}
    whole = {"format": 1, "letter": "e", "title": "speed", "state": "done", "seconds": 1.0, "limit_s": 9, "log": ""}
    return {**whole, "rows": [row], "run": {**facts, "versions": {}, "dry": False}, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "fine"},
        {"rows": None},
        {"rows": [{"name": "x"}]},
        {"rows": [{"name": "x", "passed": "yes", "figures": {}, "detail": ""}]},
        {"rows": [{"name": "x", "passed": True, "figures": {"a": [1]}, "detail": ""}]},
        {"run": {}},
        {"format": 2},
        {"more": 1},
    ],
)
def test_the_schema_is_checked(changes: dict[str, Any]) -> None:
    assert results.problems(section()) == []
    assert results.problems(section(**changes))


def test_a_section_passes_only_with_rows_that_do(tmp_path: Path) -> None:
    failed = {"name": "x", "passed": False, "figures": {}, "detail": "why"}
    assert results.passed(section())
    assert not results.passed(section(rows=[]))
    assert not results.passed(section(state="timeout"))
    assert not results.passed(section(rows=[failed]))
    assert "FAILED x: why" in results.table([section(rows=[failed])])


def test_the_page_is_what_the_results_say(tmp_path: Path) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.committed(page.RESULTS)) == text
    (tmp_path / "gpu-1.json").write_text(json.dumps({"format": 1, "sections": [section()]}))
    filled = page.filled(text, page.committed(tmp_path))
    assert "| H100 | 580 | 13.0 | 2027-01-02 | abc | passed: 1 of 1 rows |" in filled
    assert "median\\_us 12.5" in filled
    assert filled.count("| not run | | | | | not run |") == len(SECTIONS) - 1
    dry = section(run={**section()["run"], "dry": True})
    (tmp_path / "gpu-2.json").write_text(json.dumps({"format": 1, "sections": [dry]}))
    with pytest.raises(SystemExit, match="dry run"):
        page.committed(tmp_path)


def test_the_page_tells_what_failed_why_and_what_limits_a_figure(tmp_path: Path) -> None:
    why = "H1ExportError: | onnxruntime " + "is not what it should be " * 20
    failing = [{"name": f"test{n}", "passed": False, "figures": {}, "detail": f"{why}\nin a file"} for n in range(3)]
    slow = {"name": "prefill", "passed": False, "figures": {"median_us": 9.0, "roofline_share": 0.3}, "detail": "alone"}
    sections = [section(letter="b", rows=failing), section(state="timeout", rows=[slow]), section(letter="g")]
    text = "".join(f"<!-- {name} -->\n<!-- end -->\n" for name in ("ran", "failed", "figures"))
    filled = page.filled(text, sections)
    assert "| not passed: 0 of 3 rows |" in filled
    assert "| killed at its limit of 9 s: 0 of 1 rows |" in filled
    assert "- b, 3 rows, such as test0: H1ExportError: \\| onnxruntime is not" in filled
    assert "- e, 1 rows, such as prefill: less than the share" in filled
    assert "| e | prefill | median\\_us 9, roofline\\_share 0.3 | alone | H100 | 2027-01-02 |" in filled
    assert "| g | scan | median\\_us 12.5 |" in filled
    assert max(map(len, filled.splitlines())) < 300
    assert page.filled(filled, sections) == filled


def gpu_tests(*paths: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {text for text in done.stdout.splitlines() if "::" in text}


@pytest.mark.trt
def test_every_gpu_test_is_run_or_named_with_the_reason() -> None:
    """Files that import a runtime of another row hold no GPU test, which their text shows."""
    marked = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "tests").rglob("*.py")
        if "mark.gpu" in file.read_text(encoding="utf-8") and file != Path(__file__)
    }
    # a conftest.py marks tests of its folder
    places = {name if Path(name).name.startswith("test_") else str(Path(name).parent) for name in marked}
    files = kernel_tests.files(ROOT)
    everything = gpu_tests(*sorted(places | {"tests/plugins", "tests/targets/tensorrt", *files}))
    ran = {test for test in everything if test.split("::")[0] in files}
    named = {test for test in everything if test.split("::")[0] in kernel_tests.CANNOT}
    assert ran
    assert named
    assert everything - named == ran
    assert {test.split("::")[0] for test in named} == set(kernel_tests.CANNOT)


def test_skips_are_failures_where_a_gpu_is(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    cases = '<testcase name="a"><skipped message="no"/></testcase><testcase name="b"><failure message="m">t</failure>'
    report.write_text(f'<testsuites><testsuite>{cases}</testcase><testcase name="c"/></testsuite></testsuites>')
    assert [row.passed for row in kernel_tests.rows(report, skips_pass=False)] == [False, False, True]
    assert [row.passed for row in kernel_tests.rows(report, skips_pass=True)] == [None, False, True]


@pytest.mark.parametrize("ended", [True, False])
def test_an_interrupted_pytest_leaves_the_rows_of_the_tests_that_ended(
    ended: bool, joined: Path, tmp_path: Path, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is up when the second test has begun, however long pytest takes to start."""
    begun = tmp_path / "begun"

    class Clocked(subprocess.Popen[str]):
        def communicate(self, input: Any = None, timeout: float | None = None) -> Any:
            while timeout == LIMIT and not ended and not begun.exists():
                assert self.poll() is None
                time.sleep(0.1)
            return super().communicate(input, 1 if timeout == LIMIT and not ended else timeout)

    monkeypatch.setattr(subprocess, "Popen", Clocked)
    monkeypatch.setattr(kernel_tests, "WORKERS", ("-n", "1"))
    tests = joined / bundle.TREE
    tests.mkdir()
    slow = "pass" if ended else f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"
    (tests / "test_x.py").write_text(f"def test_first():\n    pass\ndef test_second():\n    {slow}\n")
    host = Host(joined, tmp_path, "cuda")
    rows = list(kernel_tests.tested(host, ["test_x.py"], "not gpu", stop_s=LIMIT))
    names = {row.name.rpartition("::")[2]: row.passed for row in rows}
    assert names["test_first"] is True
    assert ("all tests in time" in names) is not ended
    assert names.get("test_second") is (True if ended else None)


def test_a_pytest_that_cannot_start_is_a_failure(joined: Path, tmp_path: Path) -> None:
    (joined / bundle.TREE).mkdir()
    (row,) = kernel_tests.tested(Host(joined, tmp_path, "cuda"), ["--no-such-option"], "gpu", stop_s=60)
    assert (row.name, row.passed) == ("pytest", False)
    assert "no-such-option" in row.detail


def test_what_a_host_lacks(tmp_path: Path) -> None:
    file = tmp_path / "host.txt"
    file.write_text("# the host\ntorch==2.11.0+cu130  # kept\nonnx-ir==1.0.0\nPyYAML==6.0.4\n")
    host = wheels.host_packages(file)
    wanted = ["torch>=2.13", "onnx-ir>=1.1", "pyyaml>=6", "cloup>=4", "pywin32; sys_platform == 'win32'"]
    assert [found.name for found in wheels.missing(wanted, host)] == ["onnx-ir", "cloup"]
    file.write_text("torch\n")
    with pytest.raises(SystemExit, match="line 1 is not NAME==VERSION"):
        wheels.host_packages(file)


@pytest.mark.parametrize("wrong", [["--groups", "core,all"], ["--groups", "core,core"], ["--part-mb", "41"]])
def test_pack_refuses(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert pack.main([str(tmp_path / "parts"), *wrong]) == 2
    assert capsys.readouterr().err.startswith("pack: --")
    assert not (tmp_path / "parts").exists()


def test_an_artifact_that_was_not_joined_is_named(joined: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="embedded-int4: is not complete"):
        bundle.artifact(Host(joined, tmp_path, "cpu"), "embedded", "int4")
