"""Where MLflow's files lie, and with which credentials it reaches them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.services.addresses import S3Address

PREFIX = "mlflow"


def place_of(artifacts: Path | S3Address | None, experiment: str) -> str | None:
    """Return the URI below which an experiment's files lie.

    Args:
        artifacts: a folder, a bucket, or None to let MLflow's server decide.
        experiment: its name.
    """
    if isinstance(artifacts, S3Address):
        return f"s3://{artifacts.bucket}/{PREFIX}/{experiment}"
    return artifacts.resolve().as_uri() if artifacts else None


@contextmanager
def credentials_of(artifacts: Path | S3Address | None, login: str | None = None) -> Iterator[None]:
    """Show MLflow what opens a bucket, and its own server, for as long as the block lasts.

    It looks for that in the environment only; DVC, in the same process, may have other keys.

    Args:
        artifacts: a bucket's endpoint and keys are shown.
        login: `user:password` of MLflow's server; None leaves the environment's own.
    """
    ours = artifacts.environment() if isinstance(artifacts, S3Address) else {}
    if login:
        ours |= zip(
            ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
            login.split(":", 1),
            strict=True,
        )
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text
