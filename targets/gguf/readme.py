"""README.md of an artifact: how to run the file, and what was run of it."""

from __future__ import annotations

from pathlib import Path

from h1export.targets.gguf.writer import MODEL

README = "README.md"
TEXT = """# Falcon-H1 for llama.cpp

Made by h1export; `manifest.json` says from what and how. `h1export validate`, `generate` and `bench` run this folder in
llama.cpp itself, by xllamacpp.

{how}
{own}"""
WHOLE = """```bash
llama-cli -m {model} -p "def main():"
ollama create falcon-h1 -f Modelfile && ollama run falcon-h1
```

The file has the tokenizer and its chat template. The Modelfile was not run here: no Ollama was at hand.
"""
IDS = """The file takes token ids alone ({why}): `llama-cli` and Ollama cannot run it with text, and programs that call
llama.cpp's `llama_decode` can. `tokenizer.json` beside it has the ids.
"""
OWN = """
The integers of {names} are this file's own, and not those of artifacts for other runtimes.
"""


def write(folder: Path, *, ids_only: str, own: tuple[str, ...]) -> None:
    """Write README.md into ``folder``; ``ids_only`` says why the file has no tokenizer, and is empty where it has."""
    how = IDS.format(why=ids_only) if ids_only else WHOLE.format(model=MODEL)
    names = ", ".join(f"`{name}`" for name in own)
    (folder / README).write_text(TEXT.format(how=how, own=OWN.format(names=names) if own else ""), encoding="utf-8")
