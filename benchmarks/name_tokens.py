"""A copy of a GGUF file that names every token, for programs of llama.cpp that stop where a file has no vocabulary.

    python benchmarks/name_tokens.py model-Q4_0.gguf named-Q4_0.gguf

A checkpoint of benchmarks/make_checkpoint.py has random weights, and names for its tokens that no tokenizer of
llama.cpp splits a text into. Token n gets the name " tn", so that an answer of any tokens has a text. Prompts have to
be token ids. Needs the package gguf.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf


def copy_named(source: Path, out: Path) -> None:
    """Write the tensors and keys of ``source`` to ``out``, with a vocabulary of placeholders."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    for name, field in reader.fields.items():
        own = name.startswith(("GGUF.", "tokenizer.")) or name == gguf.Keys.General.ARCHITECTURE
        if not own:
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    (count,) = {tensor.shape[1] for tensor in reader.tensors if tensor.name == "token_embd.weight"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"Ġt{token}" for token in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * int(count))
    writer.add_token_merges(["Ġ t"])  # llama.cpp wants one
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    copy_named(args.source, args.out)


if __name__ == "__main__":
    main()
