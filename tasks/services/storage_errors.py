"""What S3's refusals mean, in words that name the place and never a secret."""

from typing import Any

from tasks.errors import HandsignsError, ServiceError
from tasks.services.addresses import S3Address, shown

BUCKET = "(bucket)"
"""Stands for the key in questions about the bucket itself."""


EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
"""Refusals of credentials that come with status 400."""
FULL = ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull")


class ChangedError(HandsignsError):
    """A conditional write found another object than the one expected."""

    retried = False
    """Whether an earlier attempt of the same write may have arrived."""


class MissingObjectError(HandsignsError):
    """The object does not exist."""


def explain(response: Any, address: S3Address, key: str) -> HandsignsError:
    """Return the error that an S3 answer stands for.

    Args:
        response: botocore's parsed answer with `Error` and `ResponseMetadata`.
        address: whom we asked.
        key: the object in question, or `BUCKET`.
    """
    code = str(response.get("Error", {}).get("Code", ""))
    facts = response.get("ResponseMetadata", {})
    status = facts.get("HTTPStatusCode", 0)
    uri = f"s3://{address.bucket}/"
    at = f"{uri} at {shown(address.endpoint_url)}"
    if status == 412 or code == "ConditionalRequestConflict":
        changed = ChangedError(f"{uri}{key} was changed meanwhile. Read it again.")
        changed.retried = facts.get("RetryAttempts", 0) > 0
        return changed
    if status in (401, 403) or code in EXPIRED:
        return ServiceError(
            f"S3 refuses the credentials for {at} ({code}). "
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, their rights and the clock."
        )
    if status == 507 or code in FULL:
        return ServiceError(
            f"S3 has no room left for {at} ({status} {code}). Free some, then run again."
        )
    if code == "NoSuchBucket" or (status == 404 and key == BUCKET):
        return ServiceError(
            f"The bucket {at} does not exist. Create it, or mend the setting that names it: "
            "HANDSIGNS_BUCKET, or HANDSIGNS_INBOX."
        )
    if status == 404:
        return MissingObjectError(f"{uri}{key} does not exist.")
    return ServiceError(
        f"S3 failed with {status} {code} for {at}. Look at the service, its log and its disk, "
        "then run again."
    )
