"""The error of a compiler that people see, among all that it and the build tool print."""

from __future__ import annotations

import sys

import pytest

from h1export.runtime.compilers import CompilerFailedError, first_error, run_compiler

MAKE = "gmake[2]: *** [CMakeFiles/p.dir/build.make:79: CMakeFiles/p.dir/a.cc.o] Error 1"
GCC = "{}a.cc:1:13: error: 'void unused()' defined but not used [-Werror=unused-function]"
CASES = {
    "gcc": ([GCC.format("/long/way/to/"), "cc1plus: all warnings being treated as errors", MAKE], GCC.format("")),
    "make first": ([MAKE, GCC.format("/long/way/to/")], GCC.format("")),
    "no folder": ([GCC.format("")], GCC.format("")),
    "missing header": (
        ["", "b.cc:2:10: fatal error: x.h: No such file", MAKE],
        "b.cc:2:10: fatal error: x.h: No such file",
    ),
    "cmake": (
        ["-- Configuring", "CMake Error at CMakeLists.txt:3 (find):", "not found"],
        "CMake Error at CMakeLists.txt:3 (find):",
    ),
    "no word of an error": (["one", "/usr/bin/ld: cannot find -lx", "  "], "ld: cannot find -lx"),
    "nothing": ([], ""),
}


@pytest.mark.parametrize(("lines", "expected"), CASES.values(), ids=CASES)
def test_the_first_error(lines: list[str], expected: str) -> None:
    assert first_error("\n".join(lines)) == expected


def test_a_failure_has_its_code_and_a_success_its_output() -> None:
    assert run_compiler([sys.executable, "-c", "print(input.__name__)"]).strip() == b"input"
    program = "import sys; print('a.cc:1: error: what', file=sys.stderr); sys.exit(7)"
    with pytest.raises(CompilerFailedError, match=r"exit code 7: a\.cc:1: error: what"):
        run_compiler([sys.executable, "-c", program])
