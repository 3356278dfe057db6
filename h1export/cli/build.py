"""`h1export build`."""

from __future__ import annotations

from typing import Any

import cloup

from h1export.cli.build_request import BuildRequest, build_options
from h1export.cli.common import answer, common, say
from h1export.cli.validate import VALIDATE_OPTIONS, run_validation


@cloup.command(short_help="Export a checkpoint to one or more targets.")
@build_options
@cloup.option("--force", is_flag=True, help="Replace an artifact at OUT.")
@cloup.option("--validate", "check", is_flag=True, help="Validate what was built.")
@VALIDATE_OPTIONS
@common
def build(request: BuildRequest, force: bool, check: bool, quiet: bool, as_json: bool, **checks: Any) -> int:
    """Export MODEL to one or more targets.

    \b
    Examples:
      h1export build --target ort --quant int4 --validate
      h1export build tiiuae/Falcon-H1-0.5B-Instruct --target ort --quant int4 --out falcon
      h1export build ./Falcon-H1-0.5B --target ort --graph portable --out falcon-onnx
      h1export build ./Falcon-H1-0.5B --target trt --max-context 4096 --out falcon-trt
    """
    from rich.filesize import decimal

    from h1export.cli.tables import ProgressBars
    from h1export.commands.build import build_artifact, ignored_in

    for line in () if quiet or as_json else ignored_in(request.checkpoint):
        say(line)
    built = []
    code = 0
    for target, place in request.places():
        with ProgressBars(quiet or as_json) as bars:
            artifact = build_artifact(
                request.checkpoint,
                target,
                place,
                scheme=request.scheme,
                options=request.options[target],
                force=force,
                progress=bars,
                jobs=request.jobs,
                calibration=request.calibration,
                adapters=request.adapters,
            )
        sizes = {name: size for name, (_, size) in artifact.manifest.files.items()}
        total = sum(sizes.values())
        say(f"built {place}  {decimal(total)}  source sha256 {artifact.manifest.source[:12]}", quiet or as_json)
        built.append({"target": target, "out": str(place), "bytes": total, "files": sizes})
        if check:
            report = run_validation(
                place, request.checkpoint, quiet, as_json=as_json, adapters=request.adapters, **checks
            )
            built[-1]["report"] = report
            code = max(code, 0 if report["passed"] else 1)
    if as_json:
        answer(built)
    return code
