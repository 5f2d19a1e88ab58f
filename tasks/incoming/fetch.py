"""Have `data/` in place: as it is, from a cache, from the remote, or rendered anew."""

from tasks.errors import DataError, ServiceError
from tasks.incoming.held import locked, recover
from tasks.layout import Layout
from tasks.progress import Progress, silent
from tasks.services.pipeline import Pipeline

WAIT = 60.0
"""Longest wait in seconds for an import that is running."""


def fetch_data(layout: Layout, pipeline: Pipeline, progress: Progress = silent) -> str:
    """Bring the photos that `data.dvc` names, unless photos are there already.

    Args:
        layout: the checkout.
        pipeline: its pipeline, which knows the version and the remote.
        progress: told how far rendering is.

    Returns:
        What was done, in words for the log.

    Raises:
        DataError: the version is nowhere to be had.
        ServiceError: there is a remote, and it does not answer.
        BusyError: an import runs for too long.
    """
    recover(layout)
    if any(layout.data.glob("*/*/*")):
        return "data/ is in place."
    version = pipeline.data_version()
    if version is None:
        raise DataError(
            "There are no photos yet. Run `handsigns import FOLDER` to bring in yours, "
            "or `handsigns sample` to render an example set."
        )
    if pipeline.checkout_data():
        return f"data/ {version} was laid out from the local DVC cache."
    pulled = _pull(pipeline, version)
    if pulled:
        return pulled
    if pipeline.data_source() != "sample":
        raise DataError(
            f"Photos of version {version} are not in the local DVC cache, and no DVC remote is "
            "set. Set HANDSIGNS_DVC_REMOTE_URL to where they were pushed, or import them again."
        )
    return render(layout, pipeline, progress)


def render(layout: Layout, pipeline: Pipeline, progress: Progress = silent) -> str:
    """Render the sample set into `data/` and version it; what was done, in words."""
    from tasks.rendering.sample import render_sample

    expected = pipeline.data_version() if pipeline.data_source() == "sample" else None
    with locked(layout, WAIT):
        render_sample(layout.data, progress)
    version = pipeline.version_data("sample")
    if expected in (None, version):
        return f"The sample set was rendered: data/ {version}."
    return (
        f"The sample set was rendered, but this machine's arithmetic gave other bytes: "
        f"data/ {version} instead of {expected}. It is versioned as such."
    )


def _pull(pipeline: Pipeline, version: str) -> str | None:
    if not pipeline.has_remote():
        return None
    try:
        pipeline.pull_data()
    except ServiceError:
        if pipeline.data_source() != "sample":
            raise
        return None
    return f"data/ {version} was pulled from the DVC remote."
