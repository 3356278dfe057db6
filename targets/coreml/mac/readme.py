"""What an artifact holds for people with a Mac: README.md, mac.json, verify_on_mac.py, golden.npz, Generate.swift."""

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

Made by h1export; `manifest.json` says from what and how. `model.mlpackage` needs macOS 15 or iOS 18.

**Not run by us on Apple hardware.** It was built on Linux, where Core ML does not run: whether it loads, what its numbers are there, how
fast it is and how much memory it takes is not known. So check it first:

```
pip install coremltools numpy
python verify_on_mac.py
```

This runs the cases of `golden.npz` on every compute unit, prints errors and milliseconds, and writes `report.json`. Exit code 0: passed;
1: failed; 2: could not be run. `CPU_ONLY` and `{compute}` have to pass; the others are for information.

## The package

Two functions over the same weights and {shared}. One sequence at a time.

| function | inputs | logits |
|---|---|---|
| `prefill` | `input_ids` int32 [1, {chunk}], `position` int32 [1], `n_valid` int32 [1]{state_inputs} | {prefill_logits} |
| `decode` | `input_ids` int32 [1, 1], `position` int32 [1]{state_inputs} | [1, 1, vocabulary] |

- `position`: how many tokens came before this call. Calls go on where the last one ended: the recurrent states cannot be rewound, so a new
  sequence starts at position 0 with {fresh}.
- `n_valid`: how many of the {chunk} ids are tokens, from 1 to {chunk}; pads of id 0 fill the rest, after the tokens.
  {pads}
- **`position` + {chunk} must not exceed {max_context}** in prefill, whatever `n_valid` is: from there on, take tokens in one by one with
  `decode`. `position` stays below {max_context} there; that is all the room there is.
{states}
## Compute units

Made for `{compute}`. int4 with a scale for each 32 columns is meant for `CPU_AND_GPU`: with scales by block, others have found the Neural
Engine wrong without an error. `verify_on_mac.py` shows what each unit makes of this package on your Mac.

## Python

```python
import coremltools as ct
import numpy as np

units = ct.ComputeUnit.{compute}
prefill, decode = (ct.models.MLModel("model.mlpackage", function_name=name, compute_units=units) for name in ("prefill", "decode"))
{python_start}

def call(model, ids, position, **more):
{python_call}
    return int(found["logits"][0, min(more.get("n_valid", [1])[0], found["logits"].shape[1]) - 1].argmax())

prompt, position, chunk, max_context = [1, 2, 3], 0, {chunk}, {max_context}  # token ids: see tokenizer.json
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

`Generate.swift` does the same with MLModel{swift_state}: not compiled or run by us.
"""

STATE_START = "state = prefill.make_state()  # zeros; decode goes on in it"
STATE_CALL = """\
    feeds = {"input_ids": np.array([ids], np.int32), "position": np.array([position], np.int32), **more}
    found = model.predict(feeds, state=state)"""
IO_START = """\
described = next(f for f in decode.get_spec().description.functions if f.name == "decode")
inputs = {x.name: tuple(x.type.multiArrayType.shape) for x in described.input}
past = {name: np.zeros(shape, np.float32) for name, shape in inputs.items() if name.startswith("past_key_values_")}
"""
IO_CALL = """\
    feeds = {"input_ids": np.array([ids], np.int32), "position": np.array([position], np.int32), **more}
    found = model.predict({**feeds, **past})
    past.update({name: found[name.replace("past_key_values_", "present_")] for name in past})"""
IO_STATES = """- `past_key_values_N_key`, `_value`, `_conv_state`, `_recurrent_state` of every layer N: zeros before the first token, then
  the outputs `present_N_key` and so on of the call before, whichever function that was.
"""
STATES = """- Both functions declare the same states, and verify_on_mac.py passes what `prefill.make_state()` gave to `decode`. Should a
  system refuse that, it says so, and decode has to take the prompt in too.
"""


def text(settings: Settings) -> str:
    """README.md."""
    io = settings.state_io
    chunk = settings.chunk
    return TEXT.format(
        **dataclasses.asdict(settings) | {"state_io": ""},
        shared="states, which are inputs and outputs" if io else "states",
        state_inputs=", `past_key_values_N_*`" if io else "",
        prefill_logits="[1, 1, vocabulary] of the last valid token"
        if settings.last_logits
        else f"[1, {chunk}, vocabulary]",
        fresh="states of zeros" if io else "a new state",
        pads="No later call sees them."
        if settings.last_logits
        else "No later call sees them; their logits mean nothing.",
        states=IO_STATES if io else STATES,
        python_start=IO_START.rstrip() if io else STATE_START,
        python_call=IO_CALL if io else STATE_CALL,
        swift_state="" if io else " and MLState",
    )


def write(folder: Path, settings: Settings, golden: bytes) -> None:
    """Write every file of this page into ``folder``; ``golden`` is what ``golden.golden`` gave.

    Raises:
        H1ExportError: chunks of no token, or a context that has no room for a chunk and the token after it.
    """
    if not 0 < settings.chunk < settings.max_context:
        what = f"a context of {settings.max_context} tokens and chunks of {settings.chunk}"
        raise H1ExportError(
            "CoreML", what, "a chunk has at least one token, and the context room for one more than a chunk"
        )
    for name in COPIED:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    (folder / README).write_text(text(settings), encoding="utf-8")
    (folder / SETTINGS).write_text(
        json.dumps(dataclasses.asdict(settings), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    (folder / GOLDEN).write_bytes(golden)
