"""DVC: stages and versions of the photos. Its `Repo` is undocumented, so its version is pinned."""

import json
import logging
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import stamina
import yaml

from tasks.errors import BusyError, DataError, HandsignsError, ServiceError, StageError, first_fault
from tasks.io import atomic_write, folder_size, read_json, sha256, write_json
from tasks.project import Project
from tasks.services.s3 import redact_url
from tasks.stage import Progress, run_command, silent

DataSource = Literal["sample", "photos"]
Outcome = Literal["unchanged", "restored", "ran"]
DataState = Literal["missing", "clean", "edited", "outdated"]
"""Of `data/`: not there; the recorded version; changed by somebody; an earlier version."""

REMOTE = "handsigns"
# Without `verify` a damaged remote object is pulled with no complaint, and by default a silent
# remote is waited for a minute, five times.
S3_OPTIONS = {"verify": "true", "connect_timeout": "5", "read_timeout": "20"}
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Remote:
    """Where photos are pushed, instead of the remote in `.dvc/config`."""

    url: str
    options: Callable[[], dict[str, str]] = dict  # called before a transfer, once a server is up


class Pipeline:
    """Stages and data of the checkout in the working directory, where DVC looks for it."""

    def __init__(
        self, project: Project, remote: Remote | None = None, lock_timeout: float = 600.0
    ) -> None:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        # What DVC logs line by line is not for users: the error in the end says why.
        for name in ("dvc", "dvc_data", "dvc_objects", "stamina"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._project = project
        self._memory = project.local / "data_version.json"
        self._lock_timeout = lock_timeout
        self._remote = remote
        self._section: dict[str, str] = {}
        config: dict[str, Any] = {}
        if remote is not None:
            ours = S3_OPTIONS if remote.url.startswith("s3://") else {}
            self._section = {"url": remote.url, **ours}
            config = {"core": {"remote": REMOTE}, "remote": {REMOTE: self._section}}
        try:
            self._repo = Repo(str(project.root), config=config)
        except DvcException as error:
            raise DataError(
                f"DVC cannot open '{project.root}' ({first_fault(error)}). Check that it is a "
                "checkout of this project, HANDSIGNS_DVC_REMOTE_URL and .dvc/config."
            ) from error
        except sqlite3.Error as error:
            raise _full(error) from error
        self._sources = _digests(project.root)

    def stages(self) -> list[str]:
        """Names of the stages, each after what it depends on."""
        import networkx

        self.data_version()  # DVC would not say what to do about a damaged data.dvc
        graph = self._locked(lambda: self._repo.index.graph)
        names = [s.name for s in reversed(list(networkx.topological_sort(graph))) if s.cmd]
        if not names:
            raise StageError("dvc.yaml names no stage. Take it back from git.")
        return names

    def changed(self) -> dict[str, list[Any]]:
        """What is out of date, by stage; empty when there is nothing to do."""
        self.stages()
        return dict(self._locked(self._repo.status))

    def run(self, name: str, force: bool = False, progress: Progress = silent) -> Outcome:
        """Bring one stage, such as `train@base`, up to date; those before it must be.

        DVC has no public way to run a stage in this process, and a process for each would import
        TensorFlow again, which takes longer than most stages: its `cmd_run` is replaced meanwhile.
        """
        import dvc.stage.run as dvc_run

        ran = []

        def run_here(stage: Any, dry: bool = False, run_env: Any = None) -> None:
            ran.append(stage)
            before = {str(dep): dep.get_hash() for dep in stage.deps}
            # What was imported must be what DVC hashes; from here on the deps say so.
            if _digests(self._project.root) != self._sources:
                raise StageError(
                    f"A module of tasks/ was edited since this run began, before {name} ran. Run "
                    "again, so that the code that ran is the code on record."
                )
            run_command(stage.cmd, self._project, progress)
            for dep in stage.deps:
                if dep.get_hash() != before[str(dep)]:
                    raise StageError(
                        f"'{dep}' changed while stage {name} ran, so its result belongs to "
                        "neither version. Run again."
                    )

        def reproduce() -> bool:
            original, dvc_run.cmd_run = dvc_run.cmd_run, run_here
            try:
                return bool(self._repo.reproduce(name, single_item=True, force=force))
            finally:
                dvc_run.cmd_run = original

        done = self._locked(reproduce)
        return "ran" if ran else "restored" if done else "unchanged"

    def data_version(self) -> str | None:
        """DVC's hash of `data/` as recorded in `data.dvc`; None where there is none."""
        return read_record(self._project)[0]

    def data_source(self) -> DataSource | None:
        """Whether the recorded version is the rendered sample or imported photos."""
        return read_record(self._project)[1]

    def data_state(self) -> DataState:
        """How `data/` compares with `data.dvc`; `DataError` if both changed."""
        recorded = self.data_version()
        if not any(self._project.data.glob("*/*/*")):
            if recorded:  # what is put there next is newer than that
                self._remember_version(recorded)
            return "missing"
        if recorded is None:
            return "edited"
        (out,) = self._locked(lambda: self._repo.stage.load_one(self._project.data_file.name).outs)
        present = str(self._locked(out.get_hash).value)
        if present == recorded:
            self._remember_version(recorded)
            return "clean"
        laid_out = read_json(self._memory)
        if laid_out is None:
            laid_out = present if self._repo.cache.local.exists(present) else recorded
        if laid_out == recorded:
            return "edited"
        if laid_out == present:
            return "outdated"
        raise DataError(
            f"data/ and data.dvc both changed since version {laid_out} was laid out. To keep the "
            "photos in data/, run `dvc add data`; to take those of data.dvc, `dvc pull --force "
            "data.dvc`; to have both, copy data/ away first, then import the copy."
        )

    def version_data(self, source: DataSource) -> str:
        """Record `data/` as it is now (`dvc add`), and where it came from; its hash."""
        if not self._project.data.is_dir():
            raise DataError("There is no data/ to version. Import photos, or render the sample.")
        file = self._project.data_file
        self._locked(lambda: self._repo.add(str(self._project.data)))
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        kept = content.get("meta")  # a team may note any value there
        content["meta"] = {**(kept if isinstance(kept, dict) else {}), "source": source}
        with atomic_write(file) as path:
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        version = str(content["outs"][0]["md5"])
        self._remember_version(version)
        return version

    def remote_url(self) -> str | None:
        """Where photos are pushed, without secrets; None where nothing is set."""
        return redact_url(self._target()[1]) or None

    def push_data(self) -> int:
        """Send the present version of `data/` to the remote; number of files sent."""
        _log.info("data/ is pushed to %s.", self.remote_url())
        target = self._project.data_file.name
        # Takes from data/ what the cache lost.
        self._locked(lambda: self._repo.commit(target, relink=False))

        def push(name: str) -> int:
            sent = int(self._repo.push([target], remote=name))
            remote = self._repo.cloud.get_remote_odb(name)
            if again := _send_missing(self._repo.cache.local, remote, str(self.data_version())):
                _log.warning("%d objects were missing in the remote; they are sent again.", again)
            return sent + again

        return self._transfer("pushed to", push)

    def pull_data(self) -> int:
        """Fetch and lay out the version in `data.dvc`; number of files fetched."""

        def pull(name: str) -> int:
            result = self._repo.pull([self._project.data_file.name], remote=name, force=True)
            self._remember_version(self.data_version())
            return int(result.get("fetched", 0))

        return self._transfer("pulled from", pull)

    def checkout_data(self) -> bool:
        """Lay out the version in `data.dvc` if the local cache has all of it."""
        from dvc.exceptions import CheckoutError

        target = self._project.data_file.name
        try:
            self._locked(lambda: self._repo.checkout([target], force=True))
        except StageError as error:
            if isinstance(error.__cause__, CheckoutError):
                return False
            raise
        self._remember_version(self.data_version())
        return self._project.data.is_dir()

    def remove_unused(self, kept: Sequence[str], dry_run: bool = False) -> int:
        """Remove cached files that no branch, tag, `kept` data.dvc nor `data/` needs; the bytes."""
        from dvc.repo import Repo

        cache = Path(self._repo.cache.local.path)
        before = folder_size(cache)
        with tempfile.TemporaryDirectory() as temporary:
            other = Path(temporary)
            Repo.init(temporary, no_scm=True).close()
            config = f"[cache]\n    dir = {cache.parent.parent}\n"
            (other / ".dvc/config.local").write_text(config, encoding="utf-8")
            for number, content in enumerate(kept):
                (other / str(number)).mkdir()
                (other / f"{number}/data.dvc").write_text(content, encoding="utf-8")
            needed = {"workspace": True, "all_branches": True, "all_tags": True}
            needed |= {"force": True, "dry": dry_run}
            self._locked(lambda: self._repo.gc(**needed, repos=[temporary]))
        return before - folder_size(cache)

    def _target(self) -> tuple[str, str]:
        """Name and URL of our remote or the repository's; the user's or machine's gets no photo."""
        if self._remote:
            return REMOTE, self._remote.url
        name, urls = "", dict[str, str]()
        for level in ("repo", "local"):
            own = self._repo.config.load_one(level)
            name = str(own["core"].get("remote", name))
            urls |= {key: one["url"] for key, one in own["remote"].items() if "url" in one}
        return name, urls.get(name, "")

    def _transfer(self, what: str, call: Callable[[str], int]) -> int:
        from dvc.lock import LockError

        name, _ = self._target()

        def transfer() -> int:
            try:
                if self._remote:  # DVC reads its configuration for each transfer
                    self._section.update(self._remote.options())
                return call(name)
            except (LockError, HandsignsError, sqlite3.Error):
                raise
            except Exception as error:  # of whatever library speaks to that remote
                raise ServiceError(
                    f"data/ could not be {what} {self.remote_url()} ({first_fault(error)}). Check "
                    "the remote's address and credentials, then run again."
                ) from error

        return self._locked(transfer)

    def _remember_version(self, version: str | None) -> None:
        """Note the version that was last laid out or recorded in this checkout."""
        if version != read_json(self._memory):
            write_json(self._memory, version)

    def _locked(self, call: Callable[[], _Result], again: bool = True) -> _Result:
        """Call into DVC, waiting a bounded time for its locks."""
        from dvc.exceptions import DvcException, ReproductionError
        from dvc.lock import LockError
        from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError

        wait = self._lock_timeout
        try:
            for attempt in stamina.retry_context(LockError, attempts=None, timeout=wait):
                with attempt:
                    if attempt.num == 2:
                        _log.warning("Another process uses DVC; waiting up to %.0f s.", wait)
                    try:
                        return call()
                    except ReproductionError as error:  # DVC's words around what a stage raised
                        raise (error.__cause__ or error) from None
        except LockError as error:
            raise BusyError(
                f"Another process held DVC's lock for {wait:.0f} s: {first_fault(error)} Wait for "
                "it to end, then run again."
            ) from error
        except sqlite3.Error as error:
            raise _full(error) from error
        except (RWLockFileCorruptedError, RWLockFileFormatError, UnicodeDecodeError) as error:
            # DVC reads its list of locks under a lock, so nobody is just writing it.
            if not again:
                raise StageError(f"DVC stopped: {first_fault(error)}") from error
            _log.warning("DVC's list of locks was half written; a new one begins.")
            (self._project.root / ".dvc/tmp/rwlock").unlink(missing_ok=True)
            return self._locked(call, again=False)
        except DvcException as error:
            advice = "" if "dvc.lock" not in str(error) else " Take dvc.lock back from git."
            raise StageError(f"DVC stopped: {first_fault(error)}{advice}") from error
        raise AssertionError("unreachable")


def read_record(project: Project) -> tuple[str, DataSource] | tuple[None, None]:
    """Version and source in `data.dvc`, if there is one; `DataError` if DVC did not write it."""
    if not project.data_file.is_file():
        return None, None
    try:
        content = yaml.safe_load(project.data_file.read_text(encoding="utf-8"))
        version, meta = content["outs"][0]["md5"], content.get("meta")
        if not isinstance(version, str):
            raise TypeError(version)
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise DataError(
            "data.dvc is not what DVC writes. Take it back from git, "
            "or remove it and import the photos again."
        ) from error
    rendered = isinstance(meta, dict) and meta.get("source") == "sample"
    return version, "sample" if rendered else "photos"


def check_trained_on(project: Project, version: str) -> None:
    """Check that `data.dvc` and the stages in `dvc.lock` name this version of the photos."""
    try:
        stages = yaml.safe_load(project.lock.read_text(encoding="utf-8"))["stages"].values()
        used = {dep["md5"] for one in stages for dep in one["deps"] if dep["path"] == "data"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise StageError("dvc.lock is damaged. Take it back from git and run again.") from error
    if read_record(project)[0] != version or used != {version}:
        raise StageError(
            f"The photos changed during this run, which began with version {version} of data/. "
            "Nothing was published; run again."
        )


def _digests(root: Path) -> dict[str, str]:
    return {str(path): sha256(path) for path in (root / "tasks").rglob("*.py")}


def _send_missing(cache: Any, remote: Any, version: str) -> int:
    """Send what a remote lost since it was pushed: DVC does not look for that."""
    listed = json.loads(Path(cache.oid_to_path(version)).read_bytes())
    remote.fs.fs.invalidate_cache()
    # A folder of this machine is listed without details.
    found = remote.fs.fs.find(remote.path, detail=True)
    details = found if isinstance(found, dict) else {path: {} for path in found}
    sizes = {"".join(Path(path).parts[-2:]): info.get("size") for path, info in details.items()}
    missing = 0
    for name in (*{entry["md5"] for entry in listed}, version):
        path = Path(cache.oid_to_path(name))
        if name not in sizes or sizes[name] not in (None, path.stat().st_size):
            remote.fs.put_file(str(path), remote.oid_to_path(name))
            missing += 1
    return missing


def _full(error: Exception) -> StageError:
    return StageError(
        f"DVC cannot keep its notes ({error}), which mostly means a full disk. Free some room, "
        "then run again; nothing was lost."
    )
