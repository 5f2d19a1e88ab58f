"""Whether a storage honours conditional writes, which every move of the champion rests on."""

import contextlib
import uuid
from collections.abc import Callable

from tasks.errors import ServiceError
from tasks.services.addresses import shown
from tasks.services.storage import Storage
from tasks.services.storage_errors import ChangedError


def check_conditions(storage: Storage) -> None:
    """Raise `ServiceError` unless the endpoint honours conditional writes.

    Some S3-compatible services take `If-None-Match` and `If-Match` without a word and
    write all the same. The champion would then be whoever wrote last, so it is tried on
    an object of its own, which is removed again.
    """
    probe = f"probes/{uuid.uuid4().hex}"
    etag = storage.put_if_absent(probe, b"first")
    try:
        honoured = {
            "If-None-Match": not _takes(lambda: storage.put_if_absent(probe, b"second")),
            "If-Match": _takes(lambda: storage.put_if_match(probe, b"third", etag))
            and not _takes(lambda: storage.put_if_match(probe, b"fourth", etag)),
        }
    finally:
        with contextlib.suppress(ServiceError):
            storage.remove(probe)
    if ignored := [header for header, holds in honoured.items() if not holds]:
        raise ServiceError(
            f"S3 at {shown(storage.address.endpoint_url)} does not honour conditional writes, so "
            f"two promotions at once could undo each other. Received: {' and '.join(ignored)} "
            "without effect. Use a service, or a version of it, that keeps to them."
        )


def _takes(write: Callable[[], str]) -> bool:
    try:
        write()
    except ChangedError:
        return False
    return True
