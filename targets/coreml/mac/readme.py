"""The writer of an artifact's files for a Mac: README.md, mac.json, verify_on_mac.py, golden.npz and Generate.swift."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from h1export.errors import H1ExportError
from h1export.targets.coreml.mac.verify_on_mac import GOLDEN, SETTINGS, Settings

README = "README.md"
COPIED = ("verify_on_mac.py", "Generate.swift")

TEXT = """# Falcon-H1 for Core ML

This artifact was made by h1export; `manifest.json` records the source and the options. `model.mlpackage` needs macOS 15
or iOS 18.

**Not run by us on Apple hardware.** The package was built on Linux, where Core ML does not run. Whether it loads, how
precise and fast it is and how much memory it takes on a device is not known, so please check it first:

```
pip install coremltools numpy
python verify_on_mac.py
```

The script runs the cases of `golden.npz` on every compute unit, prints errors and milliseconds, and writes
`report.json`. Exit code 0 means passed, 1 failed, and 2 that the check could not be run. `CPU_ONLY` and `{compute}`
must pass; the other units are for information.

## The package

The package has two functions, which share their weights and {shared}. It runs one sequence at a time.

| function | inputs | logits |
|---|---|---|
| `prefill` | `input_ids` int32 [1, {chunk}], `position` int32 [1], `n_valid` int32 [1]{state_inputs} | {logits} |
| `decode` | `input_ids` int32 [1, 1], `position` int32 [1]{state_inputs} | [1, 1, vocabulary] |

- `position` is the number of tokens before this call. Each call continues where the last one ended, because recurrent
  states cannot be rewound; a new sequence starts at position 0 with {fresh}.
- `n_valid` is the number of the {chunk} ids that are tokens, from 1 to {chunk}. Pads of id 0 follow the tokens.
  {pads}
- **`position` + {chunk} must not exceed {max_context}** in prefill, whatever `n_valid` is. Beyond that, feed the tokens
  one by one to `decode`, where `position` must stay below {max_context}.
{states}
## Compute units

Made for `{compute}`. int4 with a scale for each 32 columns is meant for `CPU_AND_GPU`: others have found the results
of such scales to be wrong on the Neural Engine, without an error. `verify_on_mac.py` shows the results of each unit of
your Mac.

## Python

```python
import coremltools as ct
import numpy as np

units = ct.ComputeUnit.{compute}
prefill = ct.models.MLModel("model.mlpackage", function_name="prefill", compute_units=units)
decode = ct.models.MLModel("model.mlpackage", function_name="decode", compute_units=units)
{python_start}

def call(model, ids, position, **more):
{python_call}
    return int(outputs["logits"][0, min(more.get("n_valid", [1])[0], outputs["logits"].shape[1]) - 1].argmax())

prompt = [1, 2, 3]  # token ids: see tokenizer.json
position, chunk, max_context = 0, {chunk}, {max_context}
while position < len(prompt):
    if position + chunk <= max_context:
        ids = prompt[position : position + chunk]
        token = call(prefill, ids + [0] * (chunk - len(ids)), position, n_valid=np.array([len(ids)], np.int32))
    else:
        ids = prompt[position : position + 1]
        token = call(decode, ids, position)
    position += len(ids)
for _ in range(20):
    print(token)
    token = call(decode, [token], position)
    position += 1
```

## Swift

`Generate.swift` does the same with MLModel{swift_state}. It was not compiled or run by us.
"""

STATE_START = "state = prefill.make_state()  # zeros; decode continues with the same state"
STATE_CALL = """\
    feeds = {"input_ids": np.array([ids], np.int32), "position": np.array([position], np.int32), **more}
    outputs = model.predict(feeds, state=state)"""
IO_START = """\
described = next(f for f in decode.get_spec().description.functions if f.name == "decode")
inputs = {x.name: tuple(x.type.multiArrayType.shape) for x in described.input}
past = {name: np.zeros(shape, np.float32) for name, shape in inputs.items() if name.startswith("past_key_values_")}
"""
IO_CALL = """\
    feeds = {"input_ids": np.array([ids], np.int32), "position": np.array([position], np.int32), **more}
    outputs = model.predict({**feeds, **past})
    past.update({name: outputs[name.replace("past_key_values_", "present_")] for name in past})"""
IO_STATES = """\
- `past_key_values_N_key`, `_value`, `_conv_state` and `_recurrent_state` of every layer N are zeros before the
  first token, and later the outputs `present_N_key` and so on of the call before, whichever function it was.
"""
STATES = """\
- Both functions declare the same states, and verify_on_mac.py passes the result of `prefill.make_state()` to
  `decode`. If a system refuses that, the script reports it, and decode must process the prompt too.
"""


def text(settings: Settings) -> str:
    """Return the text of README.md."""
    io = settings.state_io
    chunk = settings.chunk
    return TEXT.format(
        **dataclasses.asdict(settings) | {"state_io": ""},
        shared="states, which are inputs and outputs" if io else "states",
        state_inputs=", `past_key_values_N_*`" if io else "",
        logits="[1, 1, vocabulary] of the last valid token" if settings.last_logits else f"[1, {chunk}, vocabulary]",
        fresh="states of zeros" if io else "a new state",
        pads="No later call reads them." + ("" if settings.last_logits else " Their logits are meaningless."),
        states=IO_STATES if io else STATES,
        python_start=IO_START.rstrip() if io else STATE_START,
        python_call=IO_CALL if io else STATE_CALL,
        swift_state="" if io else " and MLState",
    )


def write(folder: Path, settings: Settings, golden: bytes) -> None:
    """Write all files for a Mac into ``folder``; ``golden`` is the result of ``golden.golden``.

    Raises:
        H1ExportError: a chunk has no token, or the context has no room for a chunk and the token after it.
    """
    if not 0 < settings.chunk < settings.max_context:
        what = f"a context of {settings.max_context} tokens and chunks of {settings.chunk} do not fit together"
        raise H1ExportError(
            "CoreML", what, "choose chunks of at least one token, and a context of more tokens than a chunk"
        )
    for name in COPIED:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    (folder / README).write_text(text(settings), encoding="utf-8")
    (folder / SETTINGS).write_text(
        json.dumps(dataclasses.asdict(settings), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    (folder / GOLDEN).write_bytes(golden)
