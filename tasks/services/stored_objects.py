"""What DVC stores by content, compared with what its names say.

DVC trusts its local cache when it lays files out, and believes of a remote that what
was pushed once is still there, and is what it was. Both are looked at here. A store is
DVC's own (`HashFileDB`); it is handed in, so nothing of DVC is imported.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.whole import whole_file

_MD5 = re.compile(r"[0-9a-f]{32}")


def place(cache: Any, name: str) -> Path:
    """Path of an object in the local cache."""
    return Path(cache.oid_to_path(name))


def listed(cache: Any, name: str) -> dict[str, str]:
    """Path by object of what a version of a folder consists of; a file has no such list.

    Raises:
        OSError, ValueError: the version's list is not in the cache, or is none.
    """
    if not name.endswith(".dir"):
        return {}
    content = json.loads(place(cache, name).read_bytes())
    return {entry["md5"]: entry["relpath"] for entry in content}


def drop_damaged(cache: Any, names: Iterable[str]) -> list[str]:
    """Remove from the local cache what is not what its name says; the names of those.

    DVC then takes them from a remote, or makes them again, as it does with what it
    never had.
    """
    spoilt = []
    for name in names:
        path = place(cache, name)
        if path.is_file() and _md5(path) != name.removesuffix(".dir"):
            path.unlink()
            spoilt.append(name)
    return spoilt


def drop_damaged_version(cache: Any, name: str) -> list[str]:
    """Do the same with a version of a file or a folder, and all that it consists of."""
    spoilt = drop_damaged(cache, [name])
    try:
        return spoilt + drop_damaged(cache, listed(cache, name))
    except (OSError, ValueError):
        return spoilt


def put_back(cache: Any, folder: Path, name: str) -> None:
    """Fill the gaps in a cached version from the folder, where that has the same bytes."""
    for digest, relative in listed(cache, name).items():
        source, target = folder / relative, place(cache, digest)
        if not target.exists() and source.is_file() and _md5(source) == digest:
            with whole_file(target) as temporary:
                shutil.copyfile(source, temporary)
                temporary.chmod(0o444)


def send_again(cache: Any, remote: Any, name: str) -> list[str]:
    """Send what a remote lacks of a version, or holds damaged; the names of those.

    One listing tells: where it gives MD5 sums as etags, as S3 does for what is sent in
    one piece, those are compared; a folder of this machine is read; of others the size
    must do.

    Raises:
        OSError: the remote does not answer, or the cache lacks an object too.
    """
    remote.fs.fs.invalidate_cache()
    stored = {"".join(Path(path).parts[-2:]): info for path, info in _find(remote).items()}
    sent = []
    for wanted in (*listed(cache, name), name):
        if wanted not in stored or not _is_sound(remote, stored[wanted], cache, wanted):
            remote.fs.put_file(os.fspath(place(cache, wanted)), remote.oid_to_path(wanted))
            sent.append(wanted)
    return sent


def _find(remote: Any) -> dict[str, Any]:
    """Facts by path; a folder of this machine gives none."""
    found = remote.fs.fs.find(remote.path, detail=True)
    return found if isinstance(found, dict) else {path: {} for path in found}


def _is_sound(remote: Any, info: Any, cache: Any, name: str) -> bool:
    etag = str(info.get("ETag", "")).strip('"')
    if _MD5.fullmatch(etag):
        return etag == name.removesuffix(".dir")
    if remote.fs.protocol == "local":
        return _md5(Path(remote.oid_to_path(name))) == name.removesuffix(".dir")
    return bool(info.get("size") == place(cache, name).stat().st_size)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
