"""One stack of local servers for each checkout: shared, taken over, and gone with its last user."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from flows.local.clients import local_credentials
from flows.local.processes import LocalStack, Program, is_alive
from flows.local.stack import embedded
from flows.settings import Settings
from tasks.errors import BusyError, ServiceError, SettingsError
from tasks.project import Project
from tasks.services.s3 import Storage
from tests.fixtures.photos import CHECKOUT

SETTINGS = Settings()


def shell(
    script: str, ready: Callable[[], bool] = lambda: True
) -> Callable[[tuple[int, ...]], Program]:
    """A program that is a shell script; `sh` shows what happens to any."""
    return lambda ports: Program("sh", ["sh", "-c", script], dict(os.environ), ready, ports)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[LocalStack]:
    made = LocalStack(tmp_path, patience=1.0)
    yield made
    made.close()


def written(*files: Path) -> Callable[[], bool]:
    return lambda: all(file.exists() and file.read_text().strip() for file in files)


def listener(url: str) -> int:
    """Process that listens on the port of a URL."""
    port = int(url.rpartition(":")[2])
    return next(
        one.pid
        for one in psutil.net_connections("tcp")
        if one.status == "LISTEN" and one.laddr.port == port and one.pid
    )


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_configured_services_start_nothing(tmp_path: Path) -> None:
    address = "http://127.0.0.1:9"
    named = {"s3_endpoint_url": address, "mlflow_tracking_uri": address, "prefect_api_url": address}
    with embedded(SETTINGS.model_copy(update=named), Project(tmp_path)) as services:
        services.start_s3()
        assert services.s3().endpoint_url == address
        assert services.mlflow() == address
        assert services.mlflow_artifacts() is None
        assert services.prefect() == services.start_prefect() == address
    assert list((tmp_path / ".local").iterdir()) == []


def test_s3_keeps_data_credentials_and_a_free_port_from_one_start_to_the_next(
    tmp_path: Path,
) -> None:
    def use() -> tuple[str, str | None]:
        with embedded(SETTINGS, Project(tmp_path)) as services:
            address = services.s3()
            assert Storage(address).get("a") == b"kept"
        return address.endpoint_url, address.secret_access_key

    with embedded(SETTINGS, Project(tmp_path)) as services:
        address = services.s3()
        Storage(address).put("a", b"kept")
    with pytest.raises(ServiceError):
        Storage(address).check()
    assert use() == (address.endpoint_url, address.secret_access_key)
    with socket.create_server(("127.0.0.1", int(address.endpoint_url.rpartition(":")[2]))):
        url, secret = use()
    assert (url != address.endpoint_url, secret) == (True, address.secret_access_key)


def test_users_share_a_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    project = Project(tmp_path)
    with embedded(SETTINGS, project) as last:
        with embedded(SETTINGS, project) as first:
            address = first.s3()
            process = listener(address.endpoint_url)
            assert last.s3() == address
        Storage(address).check()
    assert gone(process)
    # Several at once, while it stops and starts: each has a server for as long as it needs it.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: _use(project, number), range(8)))
    assert not is_alive(project.local, "seaweedfs")


def _use(project: Project, number: int) -> None:
    with embedded(SETTINGS, project) as services:
        Storage(services.s3()).put(str(number), b"content")
        time.sleep(0.1 * (number % 3))


RUN = """
import signal, sys, time
from pathlib import Path
# As at a terminal, also where the tests were started in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
from flows.local.stack import embedded
from flows.settings import Settings
from tasks.project import Project
from tasks.services.s3 import Storage
with embedded(Settings(), Project(Path(sys.argv[1]))) as services:
    Storage(services.s3()).put("a", b"kept")
    print(services.s3().endpoint_url, flush=True)
    time.sleep(600)
"""


def _killed_user(root: Path, how: signal.Signals) -> int:
    """The server of a user that was ended while it used it."""
    command = [sys.executable, "-c", RUN, str(root)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=CHECKOUT.root
    ) as run:
        assert run.stdout is not None
        process = listener(run.stdout.readline().strip())
        run.send_signal(how)
        run.wait(20)
    return process


def test_an_interrupted_user_leaves_nothing_behind(tmp_path: Path) -> None:
    assert gone(_killed_user(tmp_path, signal.SIGINT))


def test_a_killed_users_server_is_taken_over_by_the_next_and_stopped_with_it(
    tmp_path: Path,
) -> None:
    process = _killed_user(tmp_path, signal.SIGKILL)
    with embedded(SETTINGS, Project(tmp_path)) as services:
        address = services.s3()
        assert listener(address.endpoint_url) == process
        assert Storage(address).get("a") == b"kept"
    assert gone(process)


def test_other_settings_replace_what_nobody_uses_and_are_refused_otherwise(tmp_path: Path) -> None:
    process = _killed_user(tmp_path, signal.SIGKILL)
    other = SETTINGS.model_copy(update={"bucket": "others"})
    with embedded(other, Project(tmp_path)) as others:
        others.s3()
        assert gone(process)
        with (
            embedded(SETTINGS, Project(tmp_path)) as services,
            pytest.raises(BusyError, match="seaweedfs server runs for another command"),
        ):
            services.s3()
        Storage(others.s3()).check()


PARENT = """
import os, subprocess, sys, time
print(os.getpid(), subprocess.Popen(['sleep', '600']).pid, file=open(sys.argv[1], 'w'), flush=True)
time.sleep(600)
"""


def test_a_program_that_ended_is_started_again_without_what_was_left_of_it(
    tmp_path: Path, stack: LocalStack
) -> None:
    def describe(ports: tuple[int, ...]) -> Program:
        command = [sys.executable, "-c", PARENT, str(mark)]
        return Program("parent", command, dict(os.environ), written(mark), ports)

    mark = tmp_path / "pids"
    first = stack.start("parent", 1, describe)
    stack.wait(first)
    leader, child = map(int, mark.read_text().split())
    os.kill(leader, signal.SIGKILL)
    while is_alive(tmp_path, "parent"):
        time.sleep(0.01)
    assert not gone(child)
    assert stack.start("parent", 1, describe).ports == first.ports
    assert gone(child)
    assert (tmp_path / "logs/parent.log.1").exists()


def test_what_a_program_started_is_stopped_with_it(tmp_path: Path) -> None:
    marks = [tmp_path / "program", tmp_path / "child"]
    script = f"trap '' TERM; echo $$ > {marks[0]}; sleep 600 & echo $! > {marks[1]}; wait"
    stack = LocalStack(tmp_path)
    stack.wait(stack.start("sh", 0, shell(script, written(*marks))))
    stack.close()
    assert all(gone(int(mark.read_text())) for mark in marks)


FAILING = """
echo 'starting'
printf 'ERROR: Traceback (most recent call last):\\n  File "x.py", line 1, in open_error\\n'
echo 'PermissionError: [Errno 13] Permission denied: the very disk {long}'
echo 'RuntimeError: something that follows from it'
echo 'Server stopped!'
exit 3
"""


def test_a_failing_start_shows_the_first_error_of_its_log_uncut_and_its_path(
    stack: LocalStack,
) -> None:
    began = time.monotonic()
    program = stack.start("sh", 0, shell(FAILING.format(long="immeasurable " * 60), lambda: False))
    assert time.monotonic() - began < 1  # it is not waited for
    with pytest.raises(ServiceError, match="did not start") as caught:
        stack.wait(program)
    said = str(caught.value)
    assert "First error: PermissionError: [Errno 13] Permission denied: the very disk imm" in said
    assert f"immeasurable …. See {stack.folder / 'logs' / 'sh.log'}." in said
    assert ("\n" in said, len(said) < 500) == (False, True)


def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.local.processes.START_SECONDS", 0.5)
    with embedded(SETTINGS, Project(tmp_path)) as services:
        process = psutil.Process(listener(services.s3().endpoint_url))
        process.suspend()
        try:
            with (
                embedded(SETTINGS, Project(tmp_path), patience=0.5) as others,
                pytest.raises(ServiceError, match="does not answer at http"),
            ):
                others.s3()
        finally:
            process.resume()


def test_credentials_are_generated_once_and_private(tmp_path: Path) -> None:
    folder = tmp_path / ".local"
    previous = os.umask(0)
    try:
        first = local_credentials(folder)
    finally:
        os.umask(previous)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert local_credentials(folder) == first
    user, _, password = first.login.partition(":")
    assert user == "handsigns"
    assert min(len(first.secret_access_key), len(password)) >= 32
    assert password not in repr(first)


@pytest.mark.parametrize(
    ("mode", "content"),
    [
        (0o644, None),
        (0o600, "{}"),
        (0o600, "nonsense"),
        (0o600, '{"access_key_id": "a", "secret_access_key": "b"}'),
    ],
)
def test_credentials_that_cannot_be_trusted_are_refused(
    tmp_path: Path, mode: int, content: str | None
) -> None:
    secret = local_credentials(tmp_path).secret_access_key
    (file,) = tmp_path.iterdir()
    if content is not None:
        file.write_text(content)
    file.chmod(mode)
    with pytest.raises(SettingsError, match="Remove the file") as caught:
        local_credentials(tmp_path)
    assert secret not in str(caught.value)
