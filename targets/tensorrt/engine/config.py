"""recipe.json: everything that a builder needs to make an engine of an artifact's network, and trtexec's line that says the same."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import BATCH, SEQUENCE
from h1export.targets.tensorrt.network.layout import MODEL, Ports, Profile, profiles
from h1export.targets.tensorrt.options import RuntimeName, TensorRTOptions

RECIPE = "recipe.json"
ENGINE = "model.engine"
TRTEXEC = "trtexec.sh"
LIBRARY = "plugin/libh1export_plugin.so"
ALIASED = "ALIASED_PLUGIN_IO_10_03"  # states are updated in place
RECORDABLE = "REQUIRE_USER_ALLOCATION"  # TensorRT-RTX: calls can be recorded as CUDA graphs
TRTEXEC_NAMES = {ALIASED: "aliasedPluginIO1003"}
VERSIONS: Mapping[RuntimeName, str] = {
    "rtx": ">=1.7,<2",
    "tensorrt": ">=10.15,<12",
}  # 10.15 brought TensorScatter and RotaryEmbedding
RTX_ARCHITECTURES = (80, 86, 89, 120)  # of the default; RTX has 75 and 121 too, and neither 90 nor 100

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """Of a profile: input -> its least, best and largest shape."""

    name: str
    inputs: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class EngineConfig:
    """How to build.

    Attributes:
        runtime: whose builder.
        versions: of it, as a version specifier; those of TensorRT are documented, and not run.
        architectures: compute capabilities that the engine is for; empty: that of the GPU at hand.
        preview_features, builder_flags: TensorRT's names of them.
        profiles: decode, and prefill.
        hashes: sha256 of the files that go in.
    """

    runtime: RuntimeName
    versions: str
    architectures: tuple[int, ...]
    profiles: tuple[Shapes, ...]
    hashes: Mapping[str, str]
    preview_features: tuple[str, ...] = (ALIASED,)
    builder_flags: tuple[str, ...] = ()
    network: str = MODEL
    plugin: str = LIBRARY
    engine: str = ENGINE

    @classmethod
    def of(
        cls,
        runtime: RuntimeName,
        architectures: tuple[int, ...],
        inputs: Ports,
        options: TensorRTOptions,
        hashes: Mapping[str, str],
    ) -> EngineConfig:
        """For a network with ``inputs``."""
        shapes = tuple(_shapes(profile, inputs) for profile in profiles(options.max_batch, options.max_context))
        of_rtx = runtime == "rtx"
        return cls(
            runtime,
            VERSIONS[runtime],
            architectures if of_rtx else (),
            profiles=shapes,
            hashes=hashes,
            builder_flags=(RECORDABLE,) if of_rtx else (),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> EngineConfig:
        """That of the artifact in ``folder``. Raises H1ExportError where it has none, or something else of that name."""
        path = folder / RECIPE
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            data["profiles"] = tuple(
                Shapes(str(one["name"]), {str(name): _three(shapes) for name, shapes in one["inputs"].items()})
                for one in data["profiles"]
            )
            for name in ("architectures", "preview_features", "builder_flags"):
                data[name] = tuple(data[name])
            return cls(**data)
        except OSError as error:
            raise H1ExportError(
                path, f"cannot be read ({error.strerror})", "give an artifact of --target trt"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise H1ExportError(path, f"is no recipe ({error!r})", "build the artifact again") from None

    def trtexec(self) -> str:
        """The line for TensorRT's own command, in the artifact's folder."""
        words = [
            "trtexec",
            f"--onnx={self.network}",
            f"--saveEngine={self.engine}",
            f"--staticPlugins={self.plugin}",
            "--stronglyTyped",
        ]
        words += [f"--preview=+{TRTEXEC_NAMES[feature]}" for feature in self.preview_features]
        for index, profile in enumerate(self.profiles):
            words.append(f"--profile={index}")
            for place, which in enumerate(("min", "opt", "max")):
                sizes = (
                    f"{name}:{'x'.join(map(str, shapes[place]))}" for name, shapes in sorted(profile.inputs.items())
                )
                words.append(f"--{which}Shapes={','.join(sizes)}")
        return shlex.join(words)


def _shapes(profile: Profile, inputs: Ports) -> Shapes:
    """Of the inputs whose shape is not fixed."""

    def of(dims: tuple[int | str, ...], batch: int, tokens: int) -> Shape:
        return tuple(dim if isinstance(dim, int) else {BATCH: batch, SEQUENCE: tokens}[dim] for dim in dims)

    least = (1, 1)
    best = (profile.batch, profile.usual)
    most = (profile.batch, profile.tokens)
    return Shapes(
        profile.name, {name: (of(dims, *least), of(dims, *best), of(dims, *most)) for name, (_, dims) in inputs.items()}
    )


def _three(shapes: Any) -> tuple[Shape, Shape, Shape]:
    least, best, most = (tuple(map(int, shape)) for shape in shapes)
    return least, best, most
