"""DVC: the pipeline's stages and the versions of the photos."""

import hashlib
import importlib
import logging
import shlex
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import stamina
import yaml

from tasks.errors import BusyError, DataError, HandsignsError, ServiceError, StageError
from tasks.io import atomic_write
from tasks.params import load_params
from tasks.project import Project
from tasks.services.s3 import drop_damaged_version, put_back, redact_url, send_again
from tasks.stage import Context, Progress, silent


class InProcess:
    """Called by DVC as it would call its own `cmd_run`.

    Args:
        project: the checkout.
        sources: digests of every module below `tasks/` when this process began to import them.
        progress: told how far the stage is.
    """

    def __init__(self, project: Project, sources: dict[str, str], progress: Progress) -> None:
        self.ran = False
        self._project = project
        self._sources = sources
        self._progress = progress

    def __call__(self, stage: Any, dry: bool = False, run_env: Any = None) -> None:
        words = shlex.split(stage.cmd)
        if words[:2] != ["python", "-m"] or not words[2].startswith("tasks."):
            raise StageError(
                f"A stage's cmd must be `python -m tasks.<module> [item]`. "
                f"Received: '{stage.cmd}' ({stage.addressing}). Mend dvc.yaml."
            )
        before = {str(dep): dep.get_hash() for dep in stage.deps}
        function = importlib.import_module(words[2]).run
        context = Context(self._project, load_params(self._project.params), self._progress)
        self._refuse_edited_sources(stage)
        function(context, words[3] if len(words) > 3 else None)
        self.ran = True
        self._refuse_edited_sources(stage)
        for dep in stage.deps:
            if dep.get_hash() != before[str(dep)]:
                raise StageError(
                    f"'{dep}' changed while stage {stage.addressing} ran, so its result belongs "
                    "to neither version. Run again."
                )

    def _refuse_edited_sources(self, stage: Any) -> None:
        """What was imported must be what DVC hashes."""
        if source_digests(self._project.root) != self._sources:
            raise StageError(
                f"A module of tasks/ was edited since this run began, before {stage.addressing} "
                "was done. Run again, so that the code that ran is the code on record."
            )


def source_digests(root: Path) -> dict[str, str]:
    """SHA-256 of each module of `tasks/` below `root`, by its path there."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "tasks").rglob("*.py"))
    }


DataSource = Literal["sample", "photos"]


@dataclass(frozen=True)
class DataRecord:
    """The version of `data/` that is on record.

    Args:
        version: DVC's hash of the folder.
        source: whether a fresh clone can render what it cannot pull.
    """

    version: str
    source: DataSource


def read_record(project: Project) -> DataRecord | None:
    """Read `data.dvc`; None where there is none.

    Raises:
        DataError: it is not what DVC writes.
    """
    content = _content(project)
    if content is None:
        return None
    source = _meta(content).get("source")
    return DataRecord(content["outs"][0]["md5"], "sample" if source == "sample" else "photos")


def note_source(project: Project, source: DataSource) -> str:
    """Add to what DVC has just written where the photos came from; the version's hash."""
    content = _content(project)
    if content is None:
        raise DataError("DVC wrote no data.dvc. Run `dvc doctor` and see what it says.")
    content["meta"] = {**_meta(content), "source": source}
    with atomic_write(project.data_file) as path:
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(content["outs"][0]["md5"])


def _content(project: Project) -> dict[str, Any] | None:
    if not project.data_file.is_file():
        return None
    try:
        content = yaml.safe_load(project.data_file.read_text(encoding="utf-8"))
        if not isinstance(content["outs"][0]["md5"], str):
            raise TypeError(content["outs"][0]["md5"])
    except (ValueError, yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            "data.dvc is not what DVC writes. Take it back from git, "
            "or remove it and import the photos again."
        ) from error
    return dict(content)


def _meta(content: dict[str, Any]) -> dict[str, Any]:
    """What a team notes there is its own affair; DVC takes any value."""
    meta = content.get("meta")
    return meta if isinstance(meta, dict) else {}


Outcome = Literal["unchanged", "restored", "ran"]
REMOTE = "handsigns"

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Remote:
    """Where DVC pushes to, when it is not the one in `.dvc/config`.

    Args:
        url: as DVC takes it, such as `s3://dvc`.
        options: further keys of DVC's remote section, credentials among them.
        late: gives those that are known only while its server runs; asked for before a
            transfer.
    """

    url: str
    options: dict[str, str] = field(repr=False)
    late: Callable[[], dict[str, str]] = dict


class Pipeline:
    """One checkout's stages and data.

    Args:
        project: the checkout, which must be the working directory: DVC asks for it.
        remote: overrides the default remote of `.dvc/config`.
        lock_timeout: seconds to wait for somebody else's lock before giving up.
    """

    def __init__(
        self, project: Project, remote: Remote | None = None, lock_timeout: float = 600.0
    ) -> None:
        from dvc.exceptions import DvcException, NotDvcRepoError
        from dvc.repo import Repo

        # What DVC advises a person to type next is not for those who run this.
        logging.getLogger("dvc").setLevel(logging.WARNING)
        self._project = project
        self._lock_timeout = lock_timeout
        self._remote = remote
        self._section: dict[str, str] = {}
        config: dict[str, Any] = {}
        if remote is not None:
            self._section = section = {"url": remote.url, **remote.options}
            if remote.url.startswith("s3://"):
                # Without it a damaged remote object is pulled with no complaint.
                section["verify"] = "true"
                # By default a silent remote is waited for a minute, five times.
                section.update(connect_timeout="5", read_timeout="20")
            config = {"core": {"remote": REMOTE}, "remote": {REMOTE: section}}
        try:
            self._repo = Repo(str(project.root), config=config)
        except NotDvcRepoError as error:
            raise DataError(
                f"DVC knows no project here. Received: '{project.root}'. "
                "Run from the checkout's root, where dvc.yaml lies."
            ) from error
        except DvcException as error:
            raise DataError(
                f"DVC cannot open the project ({_one_line(error)}). Received: '{project.root}'. "
                "Check HANDSIGNS_DVC_REMOTE_URL and .dvc/config, and that the folder is in git."
            ) from error
        except sqlite3.Error as error:
            raise _unkept(error) from error
        self._sources = source_digests(project.root)

    def stages(self) -> list[str]:
        """Names of the stages, each after what it depends on."""
        import networkx

        order = reversed(list(networkx.topological_sort(self._repo.index.graph)))
        return [stage.name for stage in order if stage.cmd]

    def changed(self) -> dict[str, list[Any]]:
        """What is out of date, by stage; empty when there is nothing to do."""
        return dict(self._locked(self._repo.status))

    def run(self, name: str, force: bool = False, progress: Progress = silent) -> Outcome:
        """Bring one stage up to date, given that those before it are.

        Args:
            name: as in `stages()`, such as `train@base`.
            force: run it even if nothing changed.
            progress: told how far the stage is.

        Returns:
            Whether it ran, was restored from DVC's run cache, or needed neither.

        Raises:
            StageError: the stage failed, or a file it depends on changed while
                it ran.
            BusyError: another process holds the lock for too long.
        """
        runner = InProcess(self._project, self._sources, progress)

        def reproduce() -> list[Any]:
            with _in_process(runner):
                result: list[Any] = self._repo.reproduce(name, single_item=True, force=force)
                return result

        done = self._locked(reproduce)
        if runner.ran:
            return "ran"
        if done and not force and self._drop_damaged_results(done):
            return self.run(name, force=True, progress=progress)
        return "restored" if done else "unchanged"

    def _drop_damaged_results(self, stages: list[Any]) -> bool:
        """Whether what was restored from the cache is not what it was."""
        cache = self._repo.cache.local
        spoilt = [
            name
            for stage in stages
            for out in stage.outs
            if out.use_cache and out.hash_info.value
            for name in drop_damaged_version(cache, out.hash_info.value)
        ]
        if spoilt:
            _log.warning("%d objects in the local DVC cache were damaged.", len(spoilt))
        return bool(spoilt)

    def data_version(self) -> str | None:
        """DVC's hash of `data/` as recorded in `data.dvc`; None where there is none."""
        record = read_record(self._project)
        return None if record is None else record.version

    def data_source(self) -> DataSource | None:
        """Whether the recorded version is the rendered sample or imported photos."""
        record = read_record(self._project)
        return None if record is None else record.source

    def version_data(self, source: DataSource) -> str:
        """Record `data/` as it is now (`dvc add`).

        Args:
            source: kept in `data.dvc`, so that a fresh clone knows whether it can
                render what it cannot pull.

        Returns:
            The hash of the version.
        """
        if not self._project.data.is_dir():
            raise DataError("There is no data/ to version. Import photos, or render the sample.")
        self._locked(lambda: self._repo.add(str(self._project.data)))
        return note_source(self._project, source)

    def data_changed(self) -> bool:
        """Whether `data/` differs from the version in `data.dvc`."""
        return bool(self._locked(lambda: self._repo.status([self._project.data_file.name])))

    def has_remote(self) -> bool:
        """Whether there is anywhere to push to."""
        return bool(self._repo.config["core"].get("remote"))

    def push_data(self) -> int:
        """Send the present version of `data/` to the remote; number of files sent.

        What the remote holds damaged, or lost since it was sent, is sent again: DVC
        itself does not look at what it has pushed before.
        """

        def push() -> int:
            version = self._mended_cache()
            sent = int(self._repo.push([self._project.data_file.name]))
            remote = self._repo.cloud.get_remote_odb()
            if again := send_again(self._repo.cache.local, remote, version):
                _log.warning("%d objects were missing or damaged in the remote.", len(again))
            return sent + len(again)

        return self._transfer("pushed", push)

    def _mended_cache(self) -> str:
        """Make the cache hold the version of `data/` that is recorded; that version."""
        cache, version = self._repo.cache.local, self.data_version()
        if version is None:
            raise DataError("data/ has no version yet. Import photos, or render the sample.")
        if drop_damaged_version(cache, version):
            _log.warning("The local DVC cache was damaged; it is mended from data/.")
        if not cache.exists(version):
            version = self.version_data(self.data_source() or "photos")
        put_back(cache, self._project.data, version)
        return version

    def pull_data(self) -> int:
        """Fetch the version named in `data.dvc`; number of files fetched."""

        def pull() -> int:
            self._drop_damaged_data()
            result = self._repo.pull([self._project.data_file.name])
            return int(result.get("fetched", 0))

        return self._transfer("pulled", pull)

    def checkout_data(self) -> bool:
        """Lay out `data/` from the local cache, where it holds the version whole."""
        from dvc.exceptions import CheckoutError

        def checkout() -> bool:
            self._drop_damaged_data()
            try:
                self._repo.checkout([self._project.data_file.name], force=True)
            except CheckoutError:
                return False
            return self._project.data.is_dir()

        return self._locked(checkout)

    def _drop_damaged_data(self) -> None:
        """DVC lays out what the cache holds without looking at it."""
        version = self.data_version()
        if version and (spoilt := drop_damaged_version(self._repo.cache.local, version)):
            _log.warning("%d objects in the local DVC cache were damaged.", len(spoilt))

    def _transfer(self, verb: str, call: Callable[[], int]) -> int:
        from dvc.lock import LockError

        def transfer() -> int:
            try:
                if self._remote:  # DVC reads its configuration anew for each transfer
                    self._section.update(self._remote.late())
                with _unsaid("dvc", "dvc_data", "dvc_objects"):
                    return call()
            except (LockError, HandsignsError, sqlite3.Error):
                raise
            except Exception as error:  # of whatever library speaks to that remote
                known = self._repo.config["core"].get("remote")
                remote = redact_url(self._remote.url) if self._remote else known
                raise ServiceError(
                    f"data/ could not be {verb} ({_one_line(error)}). Received: remote "
                    f"'{remote}'. Check its address and credentials, then run again."
                ) from error

        return int(self._locked(transfer))

    def _locked(self, call: Callable[[], _Result]) -> _Result:
        """Call into DVC, waiting a bounded time for its locks."""
        from dvc.exceptions import DvcException
        from dvc.lock import LockError

        try:
            for attempt in stamina.retry_context(
                on=LockError, attempts=None, timeout=self._lock_timeout, wait_max=5.0
            ):
                with attempt:
                    if attempt.num == 2:
                        _log.warning(
                            "Another process works on this pipeline; waiting up to %.0f s.",
                            self._lock_timeout,
                        )
                    return self._despite_torn_locks(call)
        except LockError as error:
            raise BusyError(
                f"Another process held DVC's lock for {self._lock_timeout:.0f} s: "
                f"{_one_line(error)} Wait for it to end, then run again."
            ) from error
        except sqlite3.Error as error:
            raise _unkept(error) from error
        except DvcException as error:
            advice = "" if "dvc.lock" not in str(error) else " Take dvc.lock back from git."
            raise StageError(f"DVC stopped: {_one_line(error)}{advice}") from error
        raise AssertionError("a retry context either returns or raises")

    def _despite_torn_locks(self, call: Callable[[], _Result]) -> _Result:
        """Begin DVC's list of locks anew where a process was killed while it wrote it."""
        from dvc.rwlock import RWLOCK_FILE, RWLockFileCorruptedError

        try:
            return _unwrapped(call)
        except RWLockFileCorruptedError:
            # DVC writes and reads it under a guard: nobody is writing it now.
            _log.warning("DVC's list of locks was left half written; it is begun anew.")
            Path(self._repo.tmp_dir, RWLOCK_FILE).unlink(missing_ok=True)
            return _unwrapped(call)


def _unkept(error: sqlite3.Error) -> StageError:
    return StageError(
        f"DVC cannot keep its notes. Received: {_one_line(error)}, which mostly means a full disk. "
        "Free some room, then run again; what was there before is whole."
    )


def _unwrapped(call: Callable[[], _Result]) -> _Result:
    """What a stage raised, without the sentence that DVC puts around it."""
    from dvc.exceptions import ReproductionError

    try:
        return call()
    except ReproductionError as error:
        raise (error.__cause__ or error) from None


@contextmanager
def _in_process(runner: InProcess) -> Iterator[None]:
    import dvc.stage.run as dvc_run

    original = dvc_run.cmd_run
    dvc_run.cmd_run = runner
    try:
        yield
    finally:
        dvc_run.cmd_run = original


@contextmanager
def _unsaid(*names: str) -> Iterator[None]:
    """Leave out a line for each file that fails; what is raised in the end tells why."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
