"""sbom.json: the software bill of materials of an artifact, in CycloneDX 1.6.

It says again, in the form that scanners read, what the manifest says: the packages that took part in the build, and
the checkpoint and adapters that the weights come from. It holds no time and no random number.
"""

from __future__ import annotations

import uuid

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from h1export.artifact.manifest import Manifest

SBOM = "sbom.json"


def sbom(manifest: Manifest) -> str:
    """Return the text of sbom.json for an artifact with this manifest."""
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"h1export:{manifest.key}"))
    bom.metadata.timestamp = None  # type: ignore[assignment]  # the same build gives the same bytes
    root = Component(
        name=f"falcon-h1-{manifest.target}",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=manifest.key,
        bom_ref="artifact",
    )
    source = Component(
        name="checkpoint",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="checkpoint",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=manifest.source)],
        description="h1export's fingerprint of the tensors, see docs/artifact.md",
    )
    urls = [PackageURL("pypi", name=name, version=version) for name, version in sorted(manifest.toolchain.items())]
    packages = [Component(name=url.name, version=url.version, purl=url, bom_ref=str(url)) for url in urls]
    bom.metadata.component = root
    for component in (source, *packages):
        bom.components.add(component)
    bom.register_dependency(root, [source, *packages])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"
