"""The exceptions of this project; a message is one line: what is wrong, and what to do."""


class HandsignsError(Exception):
    """Base class of all errors that this project raises on purpose."""


class ParamsError(HandsignsError):
    """`params.yaml` has an unknown, missing or out-of-range key."""


class SettingsError(HandsignsError):
    """An environment setting is missing or contradicts another."""


class DataError(HandsignsError):
    """The photos cannot be trained on."""


class SourceError(DataError):
    """An import source is refused; nothing was imported from it."""


class ImageError(DataError):
    """One file is not a usable photo; `reason` is `kind: detail`, without its name."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{reason} ('{name}')" if name else reason)
        self.reason = reason


class ModelError(HandsignsError):
    """Weights or features are missing, or do not fit the architecture."""


class StageError(HandsignsError):
    """A stage failed, or its inputs changed while it ran."""


class BusyError(HandsignsError):
    """Another process holds a lock."""


class ServiceError(HandsignsError):
    """S3, MLflow or Prefect does not answer."""


class ReleaseError(HandsignsError):
    """A release is missing, incomplete or not what its manifest says."""


class PromotionError(HandsignsError):
    """The champion was not moved."""


class OvertakenError(PromotionError):
    """Another promotion moved the champion first."""


def first_fault(error: Exception) -> str:
    """An error on one line; of validation the first one, with its location, without the input."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return " ".join(str(error).split()) or type(error).__name__
    fault = error.errors(include_input=False)[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
