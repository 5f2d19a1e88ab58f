"""One stack of local servers for each checkout: shared, supervised, and gone with its last user."""

import os
import shutil
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

from flows.local import supervisor
from flows.local.credentials import local_credentials
from flows.local.processes import (
    GRPC,
    LocalStack,
    Program,
    choose_ports,
    is_alive,
    read_state,
)
from flows.local.stack import embedded
from flows.settings import Settings
from tasks.errors import BusyError, ServiceError, SettingsError
from tasks.project import Project
from tasks.services.s3 import Storage
from tests.fixtures.photos import CHECKOUT

SETTINGS = Settings()


def shell(
    script: str, ready: Callable[[], bool] = lambda: True, **more: object
) -> Callable[[tuple[int, ...]], Program]:
    """A program that is a shell script; `sh` shows what happens to any."""
    made = Program("sh", ["sh", "-c", script], dict(os.environ), ready, **more)  # type: ignore[arg-type]
    return lambda ports: made


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


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
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


def test_s3_keeps_its_data_and_credentials_from_one_start_to_the_next(tmp_path: Path) -> None:
    with embedded(SETTINGS, Project(tmp_path)) as services:
        first = services.s3()
        Storage(first).put("a", b"kept")
    with pytest.raises(ServiceError):
        Storage(first).check()
    with (
        socket.create_server(("127.0.0.1", int(first.endpoint_url.rpartition(":")[2]))),
        embedded(SETTINGS, Project(tmp_path)) as services,
    ):
        second = services.s3()
        assert Storage(second).get("a") == b"kept"
    assert second.endpoint_url != first.endpoint_url
    assert second.secret_access_key == first.secret_access_key


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


def test_a_user_with_other_settings_is_refused(tmp_path: Path) -> None:
    with embedded(SETTINGS, Project(tmp_path)) as services:
        services.s3()
        other = SETTINGS.model_copy(update={"bucket": "others"})
        with (
            embedded(other, Project(tmp_path)) as others,
            pytest.raises(BusyError, match="seaweedfs server runs for another command"),
        ):
            others.s3()


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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_server_outlives_a_user_that_was_killed(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=CHECKOUT.root
    ) as run:
        assert run.stdout is not None
        process = listener(run.stdout.readline().strip())
        run.send_signal(how)
        run.wait(20)
    if how == signal.SIGKILL:
        assert eventually(lambda: gone(process))
    # Otherwise the next user comes at once, and takes over what still runs.
    with embedded(SETTINGS, Project(tmp_path)) as services:
        assert Storage(services.s3()).get("a") == b"kept"
    assert gone(process)
    assert not is_alive(tmp_path / ".local", "seaweedfs")


def test_a_server_whose_supervisor_was_killed_is_replaced_by_the_next_user(tmp_path: Path) -> None:
    project = Project(tmp_path)
    with embedded(SETTINGS, project) as services:
        process = listener(services.s3().endpoint_url)
        state = read_state(project.local, "seaweedfs")
        assert state
        os.kill(state["pid"], signal.SIGKILL)
        assert eventually(lambda: not is_alive(project.local, "seaweedfs"))
    assert not gone(process)
    with embedded(SETTINGS, project) as services:
        Storage(services.s3()).check()
        assert gone(process)


def test_a_program_that_ends_is_started_again(tmp_path: Path, stack: LocalStack) -> None:
    mark = tmp_path / "pids"
    stack.wait(stack.start("sh", 0, shell(f"echo $$ >> {mark}; exec sleep 600", written(mark))))
    (first,) = mark.read_text().split()
    os.kill(int(first), signal.SIGKILL)
    assert eventually(lambda: len(mark.read_text().split()) == 2)
    log = (tmp_path / "logs/sh.log").read_text()
    assert "sh ended with status -9; it starts again in 1 s." in log


def test_what_a_program_started_is_stopped_with_it(tmp_path: Path) -> None:
    marks = [tmp_path / "program", tmp_path / "child"]
    script = f"trap '' TERM; echo $$ > {marks[0]}; sleep 600 & echo $! > {marks[1]}; wait"
    stack = LocalStack(tmp_path)
    stack.wait(stack.start("sh", 0, shell(script, written(*marks))))
    stack.close()
    pids = [int(mark.read_text()) for mark in marks]
    assert eventually(lambda: all(map(gone, pids)), 1)


def test_a_program_that_stays_outlives_its_user_until_it_is_stopped(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path)
    stack.start("sh", 0, shell("exec sleep 600", stays=True))
    stack.close()
    time.sleep(0.5)
    state = read_state(tmp_path, "sh")
    assert state
    os.kill(state["pid"], signal.SIGTERM)
    assert eventually(lambda: not is_alive(tmp_path, "sh"))


FAILING = """
echo 'starting'
printf 'Traceback (most recent call last):\\n  File "x.py", line 1, in open_error\\n'
echo 'PermissionError: [Errno 13] Permission denied: the very disk'
echo 'RuntimeError: something that follows from it'
echo 'Server stopped!'
exit 3
"""


def test_a_failing_start_shows_the_first_error_of_its_log_and_the_path(stack: LocalStack) -> None:
    with pytest.raises(ServiceError, match="did not start") as caught:
        stack.wait(stack.start("sh", 0, shell(FAILING, lambda: False)))
    first = "First error: PermissionError: [Errno 13] Permission denied: the very disk. See "
    assert f"{first}{stack.folder / 'logs' / 'sh.log'}." in str(caught.value)


def test_an_error_is_never_cut_within_a_word(stack: LocalStack) -> None:
    long = " ".join(["immeasurable"] * 60)
    with pytest.raises(ServiceError, match=r"immeasurable …\. See ") as caught:
        stack.wait(stack.start("sh", 0, shell(f"echo Error: {long}; exit 1", lambda: False)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_program_that_is_not_installed_is_named(stack: LocalStack) -> None:
    missing = Program("sh", ["no-such-program"], {}, lambda: False)
    with pytest.raises(ServiceError, match="no-such-program"):
        stack.wait(stack.start("sh", 0, lambda ports: missing))


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


def test_starting_does_not_wait_until_the_server_is_ready(stack: LocalStack) -> None:
    began = time.monotonic()
    stack.start("sh", 0, shell("exec sleep 600", lambda: False))
    assert time.monotonic() - began < 1


def test_a_log_stays_beside_that_of_the_next_start_and_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word in ("first", "second"):
        stack = LocalStack(tmp_path)
        mark = tmp_path / word
        stack.wait(
            stack.start("sh", 0, shell(f"echo {word}; touch {mark}; sleep 600", mark.exists))
        )
        stack.close()
    log = tmp_path / "logs/sh.log"
    assert log.read_text() == "second\n"
    assert supervisor.previous_log(log).read_text() == "first\n"
    stack = LocalStack(tmp_path)
    stack.start("sh", 0, shell("exec yes some words that a server repeats for ever"))
    full = eventually(lambda: supervisor.previous_log(log).stat().st_size > 1_000_000, 30)
    stack.close()
    assert full
    assert log.stat().st_size < 40 * supervisor.LOG_BYTES


def test_the_local_store_listens_on_loopback_with_credentials(tmp_path: Path) -> None:
    with embedded(SETTINGS, Project(tmp_path)) as services:
        address = services.s3()
        process = psutil.Process(listener(address.endpoint_url))
        listening = {
            one.laddr.ip for one in process.net_connections("tcp") if one.status == "LISTEN"
        }
        arguments = " ".join(process.cmdline())
        sockets = {one.laddr for one in process.net_connections("unix") if one.laddr}
    assert listening == {"127.0.0.1"}
    assert str(address.secret_access_key) not in arguments
    assert "s3.sock" in sockets  # and not in /tmp, where it would belong to the first user


def test_a_limit_of_open_files_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", sys.executable, "-c", RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT.root,
    )
    assert "need 256 open files, and only 64 are allowed here." in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
def test_a_read_only_tmp_is_named(tmp_path: Path) -> None:
    script = 'mount --bind /tmp /tmp && mount -o remount,ro,bind /tmp && exec "$@"'
    root = Path("/var/tmp") / tmp_path.name  # not below the mount
    root.mkdir()
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", RUN, str(root)],
            capture_output=True,
            text=True,
            cwd=CHECKOUT.root,
        )
    finally:
        shutil.rmtree(root)
    assert "needs a folder /tmp that it may write to" in done.stderr


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


def test_ports_stay_the_same_while_they_are_free(tmp_path: Path) -> None:
    first = choose_ports(tmp_path, "seaweedfs", 3)
    assert len(set(first)) == 3
    assert choose_ports(tmp_path, "seaweedfs", 3) == first
    with socket.create_server(("127.0.0.1", first[1] + GRPC)):
        assert first[1] not in choose_ports(tmp_path, "seaweedfs", 3)
