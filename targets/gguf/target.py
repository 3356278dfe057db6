"""The target "gguf": one file for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from h1export.artifact.artifact import Artifact
from h1export.artifact.stage import Stage
from h1export.checkpoint.chat_template import ChatTemplate
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.program import Program
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import INPUT_IDS, LOGITS, SEQUENCE
from h1export.progress import Progress
from h1export.quantize.grid import OwnTensor
from h1export.quantize.methods.prequantized import need_symmetric
from h1export.quantize.source import QuantizedWeights
from h1export.targets.base import Finding, Lowered
from h1export.targets.gguf import examine, metadata, modelfile, readme, refuse, sdk
from h1export.targets.gguf.options import GgufOptions
from h1export.targets.gguf.read_back import GgufFile
from h1export.targets.gguf.tensors import tensors_of
from h1export.targets.gguf.vocabulary import VOCABULARY, IdsOnly, vocabulary_of
from h1export.targets.gguf.writer import MODEL, write

ZERO_POINTS = "give a symmetric checkpoint, or build for --target ort"
OWN_INTEGERS = "own integers"


class GgufTarget:
    """GGUF: see Target."""

    name = "gguf"
    packages = ("gguf", "numpy", "torch")

    def check(self, config: FalconH1Config, options: GgufOptions) -> None:
        """See SelectiveTarget."""
        refuse.check_model(config)
        if config.tie_word_embeddings and "auto" not in (options.head, options.embedding):
            raise H1ExportError("--head, --embedding", "name one tensor, which this model has as both", "give one")

    def own_tensors(
        self, program: Program, store: WeightStore, integers: QuantizedWeights, *, options: GgufOptions
    ) -> Mapping[str, OwnTensor]:
        """See HasOwnFormats."""
        sdk.gguf()
        need_symmetric(integers, "GGUF", next_step=ZERO_POINTS)
        tensors = tensors_of(program, store, integers, options=options)
        return {t.expr.only.tensor: own for t in tensors if t.expr is not None and (own := t.own(store)) is not None}

    def lower(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        *,
        options: GgufOptions,
        stage: Stage,
        progress: Progress,
    ) -> Lowered:
        sdk.gguf()
        self.check(program.config, options)
        need_symmetric(integers, "GGUF", next_step=ZERO_POINTS)
        tensors = tensors_of(program, store, integers, options=options)
        vocabulary = vocabulary_of(stage.folder, program.config, options.vocabulary)
        progress.stage("weights", store.nbytes)

        def add_keys(writer: Any) -> None:
            metadata.add_keys(writer, program.config, tensors)
            vocabulary.add_keys(writer, program.config.vocab_size)

        write(stage, tensors, add_keys, store=store, integers=integers)
        why = vocabulary.why if isinstance(vocabulary, IdsOnly) else ""
        own = metadata.own_integers(tensors)
        readme.write(stage.folder, ids_only=why, own=own)
        if not isinstance(vocabulary, IdsOnly):
            text = modelfile.text(vocabulary, ChatTemplate.read(stage.folder))
            (stage.folder / modelfile.MODELFILE).write_text(text, encoding="utf-8")
        said: Mapping[str, Any] = {
            VOCABULARY: f"token ids only: {why}" if why else "whole",
            **({OWN_INTEGERS: list(own)} if own else {}),
        }
        ports: Mapping[str, tuple[str, tuple[int | str, ...]]] = {INPUT_IDS: ("INT32", (SEQUENCE,))}
        positions = 1 if options.last_logits else SEQUENCE
        logits: Mapping[str, tuple[str, tuple[int | str, ...]]] = {
            LOGITS: ("FLOAT", (positions, program.config.vocab_size))
        }
        stored = tuple(weight for tensor in tensors if (weight := tensor.stored()) is not None)
        return Lowered(ports, logits, stored, weights_file=MODEL, requirements=said)

    def operations(self, artifact: Artifact) -> dict[str, dict[str, int]]:
        """Return the number of tensors of each type: the operations are llama.cpp's own, and in no file."""
        return {MODEL: GgufFile(artifact.folder / MODEL).counts}

    def examine(self, artifact: Artifact, *, build: bool, progress: Progress) -> Iterator[Finding]:
        return examine.examine(artifact)


target = GgufTarget()
