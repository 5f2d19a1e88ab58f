"""Certificates that only the owner of a checkout has, for ports that know no password."""

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tasks.whole import whole_folder

_PARTS = ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT")
"""Whoever answers or asks over gRPC within SeaweedFS."""


@dataclass(frozen=True)
class Certificates:
    """Files in PEM.

    Args:
        authority: its certificate; its key was thrown away.
        certificate: of 127.0.0.1, to answer and to ask with.
        key: of that certificate, a secret.
    """

    authority: Path
    certificate: Path
    key: Path


def local_certificates(folder: Path) -> Certificates:
    """Return the certificates of the local servers, made on first use.

    Args:
        folder: the checkout's `.local/`; takes `certificates/`, for its owner alone.
    """
    kept = folder / "certificates"
    files = [kept / name for name in ("authority.pem", "certificate.pem", "key.pem")]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(folder / "certificates.lock"):
            if not all(file.exists() for file in files):
                _make(kept)
    return Certificates(*files)


def seaweedfs_guard(folder: Path) -> dict[str, str]:
    """Return the environment in which SeaweedFS's gRPC asks for the local certificate.

    Args:
        folder: the checkout's `.local/`.
    """
    files = local_certificates(folder)
    return {"WEED_GRPC_CA": str(files.authority)} | {
        f"WEED_GRPC_{part}_{what}": str(file)
        for part in _PARTS
        for what, file in (("CERT", files.certificate), ("KEY", files.key))
    }


def _make(kept: Path) -> None:
    import trustme

    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    with whole_folder(kept) as folder:
        folder.chmod(0o700)
        authority.cert_pem.write_to_path(folder / "authority.pem")
        issued.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        (folder / "key.pem").touch(mode=0o600)
        issued.private_key_pem.write_to_path(folder / "key.pem")
