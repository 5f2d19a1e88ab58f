"""Start and stop the whole service of a checkout; honcho runs what the Procfile lists."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from flows.deploy import declared_deployments
from flows.local import member
from flows.local.servers import Server, choose_ports, remember_ports
from flows.local.stack import (
    FILE,
    LOCK,
    Running,
    check_reachable,
    find_running,
    hold,
    is_held,
    keep_running,
)
from flows.settings import Settings
from tasks.errors import BusyError, ServiceError
from tasks.project import Project

PROCFILE = "Procfile"
LOG = "logs/service.log"
START_SECONDS = 300.0
STOP_SECONDS = 60.0
RUN_SECONDS = 15.0
"""A run that is told to stop says so, and who is named is told."""
POLL_SECONDS = 0.2


def up(project: Project, settings: Settings) -> tuple[Running, bool]:
    """Start what the environment does not name, wait until each answers, register flows.

    Args:
        project: the checkout; the working directory.
        settings: services that exist already are used as they are.

    Returns:
        Where each part answers, and whether it was started now.

    Raises:
        BusyError: a run of this checkout has one of the servers.
        SettingsError: `prefect.yaml` cannot be used; nothing was started.
        ServiceError: a part did not start; all others are stopped again.
    """
    from flows.deploy import asking, deploy, mark_lost_runs, wait_for_worker

    folder = project.local.resolve()
    lock = hold(folder)
    if lock is None:
        if found := find_running(folder):
            return found, False
        raise BusyError(
            "The service of this checkout is being started or stopped. "
            f"Received: a lock on {folder / LOCK}. Wait a moment, or run `handsigns down`."
        )
    names = _local_members(settings)
    try:
        declared_deployments(project)
        check_reachable(settings)
        _prepare(folder, names, settings)
        honcho = _start(project, folder, names, lock)
    finally:
        os.close(lock)
    try:
        running = _await(folder, names, settings, honcho)
        api = str(settings.prefect_api_url or running.prefect)
        deploy(project, settings, api)
        with asking(api):
            if running.prefect:
                mark_lost_runs(project)
            keep_running(folder, running)  # for which the worker waits
            wait_for_worker(START_SECONDS)
    except BaseException:
        down(project)
        raise
    return running, True


def down(project: Project) -> bool:
    """Stop the service and all that it started; return once nothing of it is left.

    The runs go first: a worker that is stopped kills them, and they could not say so.

    Returns:
        Whether anything ran.

    Raises:
        ServiceError: something is still there after 60 s.
    """
    folder = project.local.resolve()
    if not folder.is_dir() or not is_held(folder):
        return False
    _stop_runs(_holder(folder, "worker"))
    _signal(_holder(folder, "worker"))
    _wait(partial(_is_free, folder, "worker"), "the worker")
    with suppress(OSError, ValueError):
        _signal(int((folder / LOCK).read_text(encoding="utf-8")))
    # If the process runner was killed, its members go on; then they are told one by one.
    _wait(lambda: not is_held(folder), "the process runner", strict=False)
    for name in member.PORTS:
        _signal(_holder(folder, name))
    for name in member.PORTS:
        _wait(partial(_is_free, folder, name), name)
    _wait(lambda: not is_held(folder), "the process runner")
    (folder / FILE).unlink(missing_ok=True)
    return True


def _stop_runs(worker: int | None) -> None:
    """Let a worker's runs end by themselves."""
    import psutil

    below: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(worker).children(recursive=True) if worker else []
    runs = []
    for one in below:
        with suppress(psutil.NoSuchProcess):  # one that ends meanwhile spares no other
            if "prefect.engine" in one.cmdline():
                one.terminate()
                runs.append(one)
    psutil.wait_procs(runs, RUN_SECONDS)


def _local_members(settings: Settings) -> list[str]:
    named = {
        "seaweedfs": settings.s3_endpoint_url,
        "mlflow": settings.mlflow_tracking_uri,
        "prefect": settings.prefect_api_url,
    }
    return [name for name in named if not named[name]] + ["worker"]


def _prepare(folder: Path, names: list[str], settings: Settings) -> None:
    """Refuse what another run keeps; choose ports, so that every part knows all of them."""
    (folder / FILE).unlink(missing_ok=True)  # a machine that lost power left it
    for name in names:
        if holder := _holder(folder, name, patience=member.PATIENCE):
            raise BusyError(
                f"A run of this checkout has its {name} server. Received: process {holder}. "
                "Let it end, or stop it, and run again."
            )
        if name in member.PORTS:
            remember_ports(folder, name, choose_ports(folder, name, member.PORTS[name]))
    if settings.database_url:
        from flows.local.servers import make_databases

        make_databases(settings.database_url.get_secret_value())


def _start(
    project: Project, folder: Path, names: list[str], lock: int
) -> "subprocess.Popen[bytes]":
    log = folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "honcho", "--env", os.devnull, "--no-colour"]
    command += ["--procfile", PROCFILE, "start", *names]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with log.open("wb") as output:
        honcho = subprocess.Popen(  # noqa: S603, the command is ours
            command,
            cwd=project.root,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    (folder / LOCK).write_text(f"{honcho.pid}\n", encoding="utf-8")
    return honcho


def _await(
    folder: Path, names: list[str], settings: Settings, honcho: "subprocess.Popen[bytes]"
) -> Running:
    running = Running(pid=honcho.pid)
    waiting: dict[str, Server] = {}
    if "seaweedfs" in names:
        waiting["seaweedfs"], address = member.seaweedfs(settings, folder)
        running.s3 = address.endpoint_url
    if "mlflow" in names:
        waiting["mlflow"], running.mlflow = member.mlflow(settings, folder)
    if "prefect" in names:
        waiting["prefect"], running.prefect = member.prefect(settings, folder)
    if settings.database_url:
        from flows.local.servers import shown_database

        running.database = shown_database(settings.database_url.get_secret_value())
    deadline = time.monotonic() + START_SECONDS
    for name, server in waiting.items():
        while not server.ready():
            if honcho.poll() is not None or time.monotonic() > deadline:
                raise ServiceError(
                    f"The local {name} server is not ready. {server.advice()} "
                    f"See {folder / LOG} too."
                )
            time.sleep(POLL_SECONDS)
    return running


def _holder(folder: Path, name: str, patience: float = 0) -> int | None:
    """Process that keeps a server of this checkout, or None."""
    lock = folder / f"{name}.lock"
    if not lock.exists():
        return None
    with suppress(Timeout), FileLock(lock).acquire(timeout=patience):
        return None
    with suppress(OSError, ValueError):
        return int(Path(f"{lock}.pid").read_text(encoding="utf-8"))
    return None


def _is_free(folder: Path, name: str) -> bool:
    return _holder(folder, name) is None


def _signal(pid: int | None) -> None:
    with suppress(ProcessLookupError):
        if pid:
            os.kill(pid, signal.SIGTERM)


def _wait(done: Callable[[], bool], what: str, strict: bool = True) -> None:
    seconds = STOP_SECONDS if strict else 10.0
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            if not strict:
                return
            raise ServiceError(
                f"A part of the service does not stop. Received: {what} after {seconds:.0f} s. "
                "Look at .local/logs/ and stop it by hand."
            )
        time.sleep(POLL_SECONDS)
