"""`data.dvc`: the version of the photos that is recorded."""

from dataclasses import dataclass
from typing import Any, Literal

import yaml

from tasks.errors import DataError, StageError
from tasks.io import atomic_write
from tasks.project import Project

DataSource = Literal["sample", "photos"]


@dataclass(frozen=True)
class DataRecord:
    """DVC's hash of `data/`, and whether a fresh clone can render what it cannot pull."""

    version: str
    source: DataSource


def read_record(project: Project) -> DataRecord | None:
    """Read `data.dvc`; None where there is none, `DataError` if it is not what DVC writes."""
    if not project.data_file.is_file():
        return None
    content, meta = _read(project)
    source: DataSource = "sample" if meta.get("source") == "sample" else "photos"
    return DataRecord(content["outs"][0]["md5"], source)


def record_source(project: Project, source: DataSource) -> str:
    """Add to what DVC has just written where the photos came from; the version's hash."""
    content, meta = _read(project)
    content["meta"] = {**meta, "source": source}
    with atomic_write(project.data_file) as path:
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(content["outs"][0]["md5"])


def check_trained_on(project: Project, version: str) -> None:
    """Check that `data.dvc` and the stages in `dvc.lock` name this version of the photos."""
    record = read_record(project)
    try:
        stages = yaml.safe_load(project.lock.read_text(encoding="utf-8"))["stages"].values()
        used = {dep["md5"] for one in stages for dep in one["deps"] if dep["path"] == "data"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise StageError("dvc.lock is damaged. Take it back from git and run again.") from error
    if record is None or record.version != version or used != {version}:
        raise StageError(
            f"The photos changed during this run, which began with version {version} of data/. "
            "Nothing was published; run again."
        )


def _read(project: Project) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content and metadata; a team may note any value there."""
    try:
        content = yaml.safe_load(project.data_file.read_text(encoding="utf-8"))
        if not isinstance(content["outs"][0]["md5"], str):
            raise TypeError(content["outs"][0]["md5"])
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise DataError(
            "data.dvc is not what DVC writes. Take it back from git, "
            "or remove it and import the photos again."
        ) from error
    meta = content.get("meta")
    return content, meta if isinstance(meta, dict) else {}
