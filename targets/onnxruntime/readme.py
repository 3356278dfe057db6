"""README.md of an artifact: how to run the folder, and what its clients cannot do with this model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from h1export.model.falcon_h1.states import KEPT, StateKind
from h1export.targets.onnxruntime import int8_rows
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.state_layout import StateLayout

README = "README.md"

TEXT = """# Falcon-H1 for {runtime}

Made by h1export; `manifest.json` says from what and how.

## onnxruntime-genai

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer, stream = og.Tokenizer(model), og.Tokenizer(model).create_stream()
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=256)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("def main():"))
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```

Works: greedy search and sampling, a prompt in several `append_tokens`, a batch of prompts of one length, and
`rewind_to(0)`.

Does not work, because the recurrent states hold no history and cannot be reordered:

- **Beam search** (`num_beams` above 1) gives wrong results without an error: beams keep each other's recurrent states.
- **`rewind_to(n)`** with n above 0 raises an error: start again, or keep a generator for each continuation.
- **Prompts of different lengths in one batch** give wrong results without an error: the client pads on the right, and
  the recurrent states would see the pads. Run them one by one, or sort them by length.

## {session}

`input_ids` int64 [batch, sequence]; `attention_mask` int64 [batch, past + sequence], 1 for real tokens, pads on the
left only; `past_key_values.N.*`: zeros before the first token (keys and values with past 0), then the `present.N.*` of
the previous call.
{kept}{notes}"""

KEPT_POSITIONS = f"""`{KEPT}` int64, a number that may be left out: n gives the logits of the last n tokens of each
row, 0 those of all.
"""

ROW_BY_ROW = "A batch of several rows takes several tokens at once only from empty states (GroupQueryAttention).\n"
PORTABLE = """
The graph has operators of ai.onnx only. ONNX Runtime on CPUs turns its integer products into a kernel that rounds
activations to int8 unless the session option `session.qdq_matmulnbits_accuracy_level` is "0"; genai_config.json sets it
to "{level}", as built.
"""
NARROW = """
Keys and values are float16, everything else float32. ONNX Runtime's own attention is slower with float16 after some
thousand tokens; `h1export build --kv fp32` makes them float32.
"""
INT8 = f"""
Keys and values are int8, everything else float32: for each head and token head_dim codes, and behind them two bytes for
the scale of each {int8_rows.BLOCK} codes, 1.0625 bytes a number. A scale is bits 15 to 30 of a float32, whose other
bits are 0, least significant byte first; a number is its code times its scale. `model.onnx` converts all of them to
float32 for each call, which takes time and memory at a great depth; h1export's own kernels read them as they are.
"""
CUDA = """
Keys, values and the convolution state are {half}, the recurrent state and the logits float32. Needs the package
onnxruntime-gpu (or onnxruntime-genai-cuda) and the CUDAExecutionProvider.
"""


TRANSFORMERS_JS = """# Falcon-H1 for transformers.js

Made by h1export; `manifest.json` says from what and how. The folder is what transformers.js 4 loads as it is, in Node
and in browsers; `config.json` tells it the name of the precision ({dtype}) and that the weights are in a file of their
own.

```js
{script}```

- A batch is padded on the left; the tokenizer of this folder does so.
- The recurrent states hold no history: a cache (`past_key_values`) can be continued, and not cut back.
- `generate` asks for the logits of the last token, by the input `num_logits_to_keep`, and a call of the model for all.
{notes}- In a browser the file of the weights is read whole. In WebAssembly it has to fit into 4 GB together with what
  the session makes of it.
"""

FUSED = """- On CPUs, ONNX Runtime turns the integer products into a kernel that rounds activations to int8. The build's
  accuracy level is {level}: to have that one, give `from_pretrained`
  `session_options: {{ extra: {{ session: {{ qdq_matmulnbits_accuracy_level: "{level}" }} }} }}`.
"""

WITH_TOKENIZER = """import {{ AutoModelForCausalLM, AutoTokenizer, env }} from "@huggingface/transformers";

env.localModelPath = "/path/to/the/folder/above/";
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained("{name}");
const model = await AutoModelForCausalLM.from_pretrained("{name}");
const inputs = tokenizer("def main():");
const output = await model.generate({{ ...inputs, max_new_tokens: 32, do_sample: false }});
console.log(tokenizer.decode(output.tolist()[0]));
"""

IDS_ONLY = """import {{ AutoModelForCausalLM, Tensor, env }} from "@huggingface/transformers";

// the checkpoint has no tokenizer.json: the folder takes token ids
env.localModelPath = "/path/to/the/folder/above/";
env.allowRemoteModels = false;
const model = await AutoModelForCausalLM.from_pretrained("{name}");
const input_ids = new Tensor("int64", [1n, 2n, 3n], [1, 3]);
const attention_mask = new Tensor("int64", [1n, 1n, 1n], [1, 3]);
const output = await model.generate({{ input_ids, attention_mask, max_new_tokens: 32, do_sample: false }});
console.log(output.tolist()[0]);
"""


def write_transformers_js(folder: Path, options: OrtOptions, *, dtype: str, has_tokenizer: bool) -> None:
    """Write the README.md of a folder for transformers.js into ``folder``."""
    script = (WITH_TOKENIZER if has_tokenizer else IDS_ONLY).format(name="this-folder")
    notes = FUSED.format(level=options.accuracy_level) if options.graph == "portable" else f"- {ROW_BY_ROW}"
    text = TRANSFORMERS_JS.format(dtype=dtype, script=script, notes=notes)
    (folder / README).write_text(text, encoding="utf-8")


def write(folder: Path, options: OrtOptions, states: StateLayout) -> None:
    """Write README.md into ``folder``, of a graph that stores states by ``states``."""
    runtime = "ONNX Runtime on CPUs"
    session = "onnxruntime"
    notes = ROW_BY_ROW + {np.float16: NARROW, np.int8: INT8}.get(states.dtype(StateKind.KEY), "")
    kept = KEPT_POSITIONS if options.asks_for_logits else ""
    if options.graph == "portable":
        runtime = "any ONNX runtime"
        session = "onnxruntime, or another runtime"
        notes = PORTABLE.format(level=options.accuracy_level)
    elif options.graph == "wasm":
        runtime = "ONNX Runtime in WebAssembly"
    elif options.graph == "cuda":
        runtime = "ONNX Runtime on CUDA"
        notes = ROW_BY_ROW + CUDA.format(half={"fp16": "float16", "bf16": "bfloat16"}[options.activations])
    (folder / README).write_text(
        TEXT.format(runtime=runtime, session=session, kept=kept, notes=notes), encoding="utf-8"
    )
