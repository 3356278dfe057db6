"""README.md of a GPTQ folder: what is in it, how to load it, and which engines have run such a folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from h1export.targets.gptq.examine import TRIED
from h1export.targets.gptq.packed_set import PackedSet

README = "README.md"

TEXT = """# Falcon-H1 in GPTQ's layout

Made by h1export; `manifest.json` says from what and how. {packed}
µP multipliers stay in config.json, and engines apply them themselves.

## Engines

| engine | what h1export's authors have done with a folder of this layout |
|---|---|
| h1export (`validate`, `generate`, and `build` from this folder) | run; every integer is read back bit for bit |
| GPTQModel {tried}, on a CPU | run; `tools/check_gptq_folder.py` compares its logits and integers |
| transformers with GPTQModel | not run |
| vLLM | not run, its code was read: it has no integer head (build with `--unpacked head`) |
| SGLang | not run, its code was read: it has no integer Mamba projections (build with `--unpacked mamba`) |

```python
import torch
from gptqmodel import BACKEND, GPTQModel

model = GPTQModel.load(".", backend=BACKEND.TORCH, device="cpu", dtype=torch.float16, attn_implementation="eager")
ids = model.tokenizer("def main():", return_tensors="pt").input_ids
print(model.tokenizer.decode(model.model.generate(ids, max_new_tokens=32)[0]))
```
{kept}"""


def write(folder: Path, chosen: PackedSet) -> None:
    """Write README.md into ``folder``."""
    packed = "No weight is in integers."
    if chosen.precision is not None:
        size = chosen.precision.group_size
        groups = f"groups of {size} columns" if size else "a scale per row"
        packed = f"{len(chosen.tensors)} weights are int{chosen.precision.bits}, {groups}."
    kept = ""
    if chosen.reasons:
        lines = [f"- {count} x: {reason}\n" for reason, count in Counter(chosen.reasons.values()).items()]
        kept = "\n## Floats\n\nWeights that the build quantised elsewhere and that are floats here:\n\n" + "".join(
            lines
        )
    (folder / README).write_text(TEXT.format(packed=packed, tried=TRIED, kept=kept), encoding="utf-8")
