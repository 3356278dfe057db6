"""README.md of an artifact: how to use the folder on a machine with a GPU, and the rules for calls of the network."""

from __future__ import annotations

from pathlib import Path

from h1export.targets.tensorrt.network.layout import PREFILL_TOKENS
from h1export.targets.tensorrt.options import RuntimeName, TensorRTOptions
from h1export.targets.tensorrt.sdk import NAMES

README = "README.md"
TEXT = """# Falcon-H1 for {name}

Made by h1export; `manifest.json` says from what and how. This h1export was checked without a GPU.

## On a machine with an NVIDIA GPU

{first}```bash
h1export validate . MODEL --kernels native    # MODEL is the checkpoint it was built from
h1export generate . "def main():" --kernels native
```

h1export needs PyTorch's build for CUDA there. An engine runs code: `trt build-engine`, `validate` and `generate` first
check `requirements` in `manifest.json` (runtime and version, compute capability, sha256 of engine and plugin). Without
a GPU `validate . MODEL` executes `model.onnx` on the CPU.

## Without h1export

{build}Load `plugin/libh1export_plugin.so` into TensorRT's plugin registry before the engine. Calls of it:

- Profile 0 takes one token, profile 1 up to {tokens}; longer prompts come in several calls. Batch up to {batch}.
- `input_ids` int64 [batch, sequence]; `write_indices` int64 [batch], the tokens before this call, pads included;
  `attention_mask` int64 [batch, {context}], 1 for each real token so far, with pads on the left only.
- `past_key_values.N.*` are buffers, zero before the first token, and `present.N.*` must be bound to the same memory:
  states are updated in place.
"""
FIRST: dict[RuntimeName, str] = {
    "rtx": "`model.engine` is built.\n\n",
    "tensorrt": "```bash\nh1export trt build-engine .    # builds model.engine with the installed TensorRT\n```\n\n",
}
BUILD: dict[RuntimeName, str] = {
    "rtx": "",
    "tensorrt": "`sh trtexec.sh` builds the engine with TensorRT's own command, from the same recipe.json.\n",
}


def write(folder: Path, runtime: RuntimeName, options: TensorRTOptions) -> None:
    """Write README.md into ``folder``."""
    text = TEXT.format(
        name=NAMES[runtime],
        first=FIRST[runtime],
        build=BUILD[runtime],
        tokens=min(PREFILL_TOKENS, options.max_context),
        batch=options.max_batch,
        context=options.max_context,
    )
    (folder / README).write_text(text, encoding="utf-8")
