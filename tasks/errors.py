"""What can go wrong, as one tree.

    HandsignsError
    ├── ParamsError          params.yaml has an unknown, missing or out-of-range key
    ├── SettingsError        an environment setting is missing or contradicts another
    ├── DataError            photos or labels that nothing sound can be trained on
    │   ├── SourceError      an import source is refused as a whole
    │   └── ImageError       one file is set aside; the import goes on
    ├── BackboneError        ImageNet weights cannot be had, or are not what they claim
    ├── ModelError           weights or features do not fit the architecture
    ├── StageError           a stage failed, or its inputs changed while it ran
    ├── BusyError            somebody else holds DVC's lock
    ├── ServiceError         S3, MLflow or Prefect does not answer
    ├── ReleaseError         a release is missing, incomplete or not what its manifest says
    └── PromotionError       the champion was not moved
        └── OvertakenError   because another promotion was faster

Every message says what was wrong, the value received, and what to do next, in
that order. The command line prints it as one line and exits with 1.
"""


class HandsignsError(Exception):
    """Root of everything this project raises on purpose."""


class ParamsError(HandsignsError):
    """`params.yaml` cannot be used as it is."""


class SettingsError(HandsignsError):
    """The environment's settings cannot be used as they are."""


class DataError(HandsignsError):
    """The photos are not fit to train on."""


class SourceError(DataError):
    """An import source is refused as a whole; nothing was taken from it."""


class ImageError(DataError):
    """One file is not a usable photo; it is set aside with this reason.

    Args:
        reason: `kind: detail`, without the file's name.
        name: the file, as the message calls it.
    """

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{reason}. Received: '{name}'." if name else reason)
        self.reason = reason


class BackboneError(HandsignsError):
    """The ImageNet weights cannot be had, or are not what they claim to be."""


class ModelError(HandsignsError):
    """Weights or features do not fit the architecture."""


class StageError(HandsignsError):
    """A stage failed, or its inputs changed under it."""


class BusyError(HandsignsError):
    """Another run holds the pipeline's lock."""


class ServiceError(HandsignsError):
    """S3, MLflow or Prefect does not answer."""


class ReleaseError(HandsignsError):
    """A release is missing, incomplete or not what its manifest says."""


class PromotionError(HandsignsError):
    """The champion was not moved."""


class OvertakenError(PromotionError):
    """Another promotion moved the champion since the decision was made."""


def first_fault(error: Exception) -> str:
    """Say in one line what is wrong with a file, without showing what it holds.

    Args:
        error: of pydantic, or of whatever read the file.

    Returns:
        The first fault and its place, without a full stop.
    """
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    fault = error.errors(include_input=False)[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
