"""A reference interpreter of saved Core ML programs (.mlpackage, iOS 18 mlProgram) on any machine.

It reads the protobuf and weight.bin with none of coremltools' op code; `h1export coreml` is its command line. A call
flows through these files:

1. package.py opens an .mlpackage; parse.py turns its messages into the dataclasses of program.py, and blob.py reads
   tensors from weight.bin.
2. compiler.py resolves a function once: names become slots, constants become arrays (constants.py), operations become
   the steps of steps.py.
3. evaluator.py runs the steps over a flat list of arrays. dtypes.py defines how fp16 is held and rounded.
4. ops/ has the function of every MIL op, one file per family of the MIL specification.

To add an op, write a function in the file of its family under ops/; its parameters, named as in the MIL specification,
are the schema of the op. Add it to the file's TABLE with `computes`, or with `moves` if it only moves values, and test
it against PyTorch or coremltools in tests/targets/coreml/evaluator. ops/base.py describes the rules.
"""

from __future__ import annotations

from h1export.targets.coreml.evaluator.evaluator import Evaluator
from h1export.targets.coreml.evaluator.package import Package

__all__ = ["Evaluator", "Package"]
