"""README.md of an mlx-lm folder: how to run it, and how it differs from a published checkpoint."""

from __future__ import annotations

from pathlib import Path

from h1export.targets.mlx.options import MlxOptions
from h1export.targets.mlx.sdk import FOLDED_FOR

README = "README.md"

TEXT = """# Falcon-H1 for MLX

Made by h1export; `manifest.json` says from what and how.

```bash
pip install mlx-lm=={version}
mlx_lm.generate --model . --prompt "def main():" --max-tokens 64 --temp 0
```

All µP multipliers are folded into the weights, and the convolution weights are [channels, taps, 1], by which mlx-lm
knows that nothing is left to fold. (While it loads a published checkpoint, mlx-lm {version} forgets the multipliers of
keys and values.) Activations, scales and all other floats are {compute}.

h1export's authors have run folders like this one with mlx-lm {version} and MLX's CPU backend on Linux, not on Apple
hardware. `h1export validate` compares a folder with transformers wherever MLX runs.
"""


def write(folder: Path, options: MlxOptions) -> None:
    """Write README.md into ``folder``."""
    (folder / README).write_text(TEXT.format(version=FOLDED_FOR, compute=options.compute), encoding="utf-8")
