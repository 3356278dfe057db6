"""`h1export sign` and `h1export verify`."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from h1export.cli.common import answer, common, say

key_file = click.option(
    "--key", required=True, type=click.Path(path_type=Path), help="File with an Ed25519 key, in PEM or OpenSSH format."
)


@cloup.command(short_help="Sign an artifact.")
@click.argument("out", type=click.Path(path_type=Path))
@key_file
@common
def sign(out: Path, key: Path, quiet: bool, as_json: bool) -> int:
    """Sign the artifact OUT with a private key: manifest.json, and by its hashes every file.

    \b
    Examples:
      openssl genpkey -algorithm ed25519 -out private.pem
      openssl pkey -in private.pem -pubout -out public.pem
      h1export sign falcon-int4 --key private.pem
    """
    from h1export.artifact.signature import SIGNATURE
    from h1export.artifact.signature import sign as sign_artifact

    sign_artifact(out, key)
    say(f"wrote {out / SIGNATURE}", quiet or as_json)
    if as_json:
        answer({"signature": SIGNATURE})
    return 0


@cloup.command(short_help="Check the signature and every file of an artifact.")
@click.argument("out", type=click.Path(path_type=Path))
@key_file
@common
def verify(out: Path, key: Path, quiet: bool, as_json: bool) -> int:
    """Check that the owner of a public key has signed the artifact OUT, and that no file was changed since.

    \b
    Examples:
      h1export verify falcon-int4 --key public.pem
    """
    from h1export.artifact.signature import verify as verify_artifact

    artifact = verify_artifact(out, key)
    say(f"{out}: signed by this key, {len(artifact.manifest.files)} files unchanged", quiet or as_json)
    if as_json:
        answer({"signed": True, "files": sorted(artifact.manifest.files)})
    return 0
