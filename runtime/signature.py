"""Ed25519 signatures of bundles.

A manifest contains the SHA-256 of every file, so a signature of ``bundle.json`` covers the bundle. A manifest's hash of
itself only detects damage: anyone who can edit the file can write a new hash. A signature needs the private key. Keys
are PEM files in the format of ``openssl genpkey -algorithm ed25519``.
"""

from pathlib import Path
from typing import Any

from wan22.bundle import MANIFEST, kind_of, open_bundle
from wan22.errors import UserError
from wan22.files import write_file

SIGNATURE = "bundle.json.sig"  # 64 bytes
PEM_MAX_BYTES = 64 * 1024
PUBLIC_OF = "openssl pkey -in {} -pubout -out public.pem, then give public.pem"
PRIVATE_FOR = "give the private key that it belongs to"
MAKE_KEYS = "openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out public.pem"


def sign(folder: Path, private_key: Path) -> Path:
    """Check every hash of the bundle at ``folder`` and write the signature next to its manifest.

    Raises:
        UserError: the bundle is missing or differs from its manifest, or the key is not a private Ed25519 key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    open_bundle(folder, kind_of(folder), full_check=True)
    key = _load(private_key, "private", lambda pem: load_pem_private_key(pem, password=None))
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{private_key}: a {type(key).__name__}", "an Ed25519 private key", MAKE_KEYS)
    path = folder / SIGNATURE
    write_file(path, key.sign((folder / MANIFEST).read_bytes()), "the signature")
    return path


def check_signature(folder: Path, public_key: Path) -> None:
    """Check that the owner of ``public_key`` signed the manifest of the bundle at ``folder``.

    The caller opens the bundle, which compares the files with the manifest.

    Raises:
        UserError: the signature is missing or does not match, or the key is not a public Ed25519 key.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = _load(public_key, "public", load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{public_key}: a {type(key).__name__}", "an Ed25519 public key", MAKE_KEYS)
    remedy = f"run wan-trt bundle sign {folder} --key PRIVATE, or do not use this bundle"
    try:
        signature = (folder / SIGNATURE).read_bytes()
        key.verify(signature, (folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing", "a signed bundle", remedy) from None
    except InvalidSignature:
        raise UserError(f"{folder / SIGNATURE} does not match", f"a signature by {public_key}", remedy) from None


def _load(path: Path, kind: str, load: Any) -> Any:
    """The key in the PEM file at ``path``."""
    from cryptography.exceptions import UnsupportedAlgorithm

    expected = f"an Ed25519 {kind} key as PEM"
    if not path.is_file():
        raise UserError(f"{path} is not a file", expected, MAKE_KEYS)
    try:
        with path.open("rb") as file:
            content = file.read(PEM_MAX_BYTES)
        return load(content)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # damaged, of another kind, or with a passphrase
        other = "public" if kind == "private" else "private"
        if f"{other} key-----".upper().encode() in content:
            remedy = PRIVATE_FOR if kind == "private" else PUBLIC_OF.format(path)  # and not a new key in its place
            raise UserError(f"{path}: a {other} key", f"an Ed25519 {kind} key", remedy) from None
        reason = str(error).partition("\n")[0][:80]
        raise UserError(f"{path}: {reason}", f"{expected}, without a passphrase", MAKE_KEYS) from None
