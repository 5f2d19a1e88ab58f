import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread, Timer

import psutil
import pytest

from flows.local import stack
from flows.local.credentials import local_credentials
from flows.local.parent_bound import kept
from flows.local.servers import PAIR, Server, ask, choose_ports, remember_ports
from flows.local.stack import (
    Running,
    Services,
    check_reachable,
    embedded,
    hold,
    is_held,
    keep_running,
)
from flows.settings import Settings
from tasks.errors import BusyError, ServiceError, SettingsError
from tasks.project import Project
from tasks.services.s3 import Storage
from tests.fixtures.prefect_api import PrefectApi

NOTHING_SET = Settings.model_construct(
    s3_endpoint_url=None,
    s3_region="us-east-1",
    bucket="artifacts",
    mlflow_tracking_uri=None,
    prefect_api_url=None,
    aws_access_key_id=None,
    aws_secret_access_key=None,
    aws_session_token=None,
)
ALL_SET = NOTHING_SET.model_copy(
    update={
        "s3_endpoint_url": "http://127.0.0.1:9",
        "mlflow_tracking_uri": "http://127.0.0.1:9",
        "prefect_api_url": "http://127.0.0.1:9/api",
    }
)


def _server(folder: Path, script: str, ready: Callable[[], bool], **times: float) -> Server:
    """A server that is a shell script; `sh` shows what the tether does with any program."""
    return Server("sh", folder, ["sh", "-c", script], dict(os.environ), ready, (), **times)


def _written(*files: Path) -> Callable[[], bool]:
    return lambda: all(file.exists() and file.read_text().strip() for file in files)


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _gone_within(seconds: float, *pids: int) -> bool:
    deadline = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_configured_services_start_nothing(tmp_path: Path) -> None:
    with embedded(ALL_SET, Project(tmp_path)) as services:
        services.start_s3()
        services.start_prefect()
        assert services.s3().endpoint_url == "http://127.0.0.1:9"
        assert services.mlflow() == "http://127.0.0.1:9"
        assert services.mlflow_artifacts() is None
        assert services.prefect() == "http://127.0.0.1:9/api"
    assert list((tmp_path / ".local").iterdir()) == []


def test_nothing_starts_before_it_is_asked_for(tmp_path: Path) -> None:
    with embedded(NOTHING_SET, Project(tmp_path)) as services:
        assert services.mlflow() == f"sqlite:///{tmp_path / '.local' / 'mlflow.db'}"
    assert list((tmp_path / ".local").iterdir()) == []


def test_s3_keeps_its_data_and_credentials_and_stops_with_the_block(tmp_path: Path) -> None:
    with embedded(NOTHING_SET, Project(tmp_path)) as services:
        first = services.s3()
        Storage(first).put("a", b"kept")
    with pytest.raises(ServiceError):
        Storage(first).check()
    (tmp_path / ".local" / "ports.json").unlink()
    with embedded(NOTHING_SET, Project(tmp_path)) as services:
        second = services.s3()
        assert Storage(second).get("a") == b"kept"
    assert second.endpoint_url != first.endpoint_url
    assert second.secret_access_key == first.secret_access_key


def test_the_local_store_is_closed_to_others(tmp_path: Path) -> None:
    with embedded(NOTHING_SET, Project(tmp_path)) as services:
        address = services.s3()
        pid = _process_on(address.endpoint_url)
        listening = {
            one.laddr.ip
            for one in psutil.net_connections("tcp")
            if one.status == "LISTEN" and one.pid == pid
        }
        arguments = " ".join(psutil.Process(pid).cmdline())
    assert listening == {"127.0.0.1"}
    assert address.secret_access_key is not None
    assert address.secret_access_key not in arguments


def test_a_runs_own_prefect_asks_for_the_login(tmp_path: Path) -> None:
    with embedded(NOTHING_SET, Project(tmp_path)) as services:
        url = services.prefect()
        assert ask(f"{url}/admin/version") is None
        login = local_credentials(services.folder).login
        assert PrefectApi(url, login).ask("admin/version")


def _process_on(url: str) -> int:
    port = int(url.rpartition(":")[2])
    return next(
        one.pid
        for one in psutil.net_connections("tcp")
        if one.status == "LISTEN" and one.laddr.port == port and one.pid
    )


def test_what_speaks_another_protocol_is_named_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"SSH-2.0-nobody\r\n")

        thread = Thread(target=greet)
        thread.start()
        named = f"http://127.0.0.1:{port}/api"
        with pytest.raises(ServiceError, match=f"{port}.*SSH-2.0.*PREFECT_API_URL"):
            check_reachable(NOTHING_SET.model_copy(update={"prefect_api_url": named}))
        thread.join()


def test_a_dask_scheduler_that_is_gone_is_named() -> None:
    named = {"dask_address": "tcp://127.0.0.1:9"}
    with pytest.raises(ServiceError, match=r"Dask does not answer at tcp://127.0.0.1:9 "):
        check_reachable(NOTHING_SET.model_copy(update=named))


def test_what_is_no_dask_scheduler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "CHECK_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        named = {"dask_address": address}
        with pytest.raises(ServiceError, match=f"No Dask scheduler answers at {address}"):
            check_reachable(NOTHING_SET.model_copy(update=named))


def test_a_second_run_waits_and_then_names_the_first(tmp_path: Path) -> None:
    with embedded(NOTHING_SET, Project(tmp_path)) as first:
        first.s3()
        second = Services(NOTHING_SET, tmp_path / ".local", patience=0.5)
        with pytest.raises(BusyError, match=f"process {os.getpid()} after"):
            second.s3()
        second.stop()
        first.stop()
        third = Services(NOTHING_SET, tmp_path / ".local", patience=0.5)
        third.s3()
        third.stop()


def test_a_reader_uses_the_server_of_a_run_and_leaves_it_running(tmp_path: Path) -> None:
    with embedded(NOTHING_SET, Project(tmp_path)) as run:
        address = run.s3()
        with embedded(NOTHING_SET, Project(tmp_path), patience=0, share=True) as reader:
            assert reader.s3() == address
        Storage(address).check()
    with embedded(NOTHING_SET, Project(tmp_path), share=True) as alone:
        Storage(alone.s3()).check()
        assert _process_on(alone.s3().endpoint_url)


def test_the_server_of_the_service_is_waited_for_and_never_replaced(tmp_path: Path) -> None:
    project = Project(tmp_path)
    lock = hold(project.local)
    assert lock is not None
    with embedded(NOTHING_SET, project) as up:
        address = up.s3()
        process = psutil.Process(_process_on(address.endpoint_url))
        keep_running(project.local, Running(pid=os.getpid(), s3=address.endpoint_url))
        process.suspend()
        try:
            with embedded(NOTHING_SET, project, patience=0.5) as run:
                run.start_s3()
                with pytest.raises(
                    ServiceError, match=f"does not answer. Received: {address.endpoint_url}"
                ):
                    run.s3()
            with embedded(NOTHING_SET, project, patience=0) as look, pytest.raises(BusyError):
                look.s3()  # by whom looks again soon
            Timer(1.0, process.resume).start()
            with embedded(NOTHING_SET, project) as run:
                assert run.s3() == address
        finally:
            process.resume()
    os.close(lock)
    with embedded(NOTHING_SET, project) as alone:
        Storage(alone.s3()).check()


def test_two_who_look_at_once_do_not_take_each_other_for_the_service(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(lambda _: is_held(tmp_path), range(2000)))
    lock = hold(tmp_path)
    assert lock is not None
    assert is_held(tmp_path)
    os.close(lock)


def test_a_log_outlives_the_next_start(tmp_path: Path) -> None:
    for word in ("first", "second"):
        server = _server(tmp_path, f"echo {word}", lambda: True)
        server.start().wait(10)
    assert server.log.read_text() == "second\n"
    assert kept(server.log).read_text() == "first\n"


RUN = """
import signal, sys, time
from pathlib import Path
# As at a terminal, also where the tests were started in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
from flows.local.stack import embedded
from tests.test_local import NOTHING_SET
from tasks.project import Project
from tasks.services.s3 import Storage
with embedded(NOTHING_SET, Project(Path(sys.argv[1]))) as services:
    address = services.s3()
    Storage(address).put("a", b"kept")
    print(address.endpoint_url, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_takes_its_server_along(tmp_path: Path, how: signal.Signals) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout is not None
    weed = _process_on(run.stdout.readline().strip())
    run.send_signal(how)
    run.wait(20)
    run.stdout.close()
    # The next run does not wait until it is gone; its own start does.
    with embedded(NOTHING_SET, Project(tmp_path)) as services:
        assert Storage(services.s3()).get("a") == b"kept"
    assert _gone_within(5, weed)


def test_a_failing_block_still_stops_its_servers(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    server = _server(tmp_path, f"echo $$ > {mark}; sleep 600", _written(mark))

    class FailureError(Exception):
        pass

    def fail() -> None:
        with embedded(NOTHING_SET, Project(tmp_path)) as services:
            services._prefect = (server, "")
            server.wait()
            raise FailureError

    with pytest.raises(FailureError):
        fail()
    assert not _alive(int(mark.read_text()))


def test_the_children_of_a_server_are_stopped_too(tmp_path: Path) -> None:
    marks = [tmp_path / "server", tmp_path / "child"]
    script = f"echo $$ > {marks[0]}; sleep 600 & echo $! > {marks[1]}; wait"
    server = _server(tmp_path, script, _written(*marks))
    server.wait()
    pids = [int(mark.read_text()) for mark in marks]
    assert all(_alive(pid) for pid in pids)
    server.stop()
    assert _gone_within(1, *pids)


def test_a_server_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    server = _server(tmp_path, f"trap '' TERM; echo $$ > {mark}; sleep 600", _written(mark))
    server.wait()
    server.stop()
    assert not _alive(int(mark.read_text()))


def test_a_failing_start_is_told_with_the_last_line_of_the_log(tmp_path: Path) -> None:
    server = _server(tmp_path, "echo first; echo 'disk on fire' >&2; exit 3", lambda: False)
    with pytest.raises(ServiceError, match=r"sh\.log: disk on fire") as caught:
        server.wait()
    assert "\n" not in str(caught.value)
    server.stop()


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    server = Server("sh", tmp_path, ["no-such-program"], {}, lambda: False, ())
    with pytest.raises(ServiceError, match="no-such-program"):
        server.wait()
    server.stop()


def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    server = _server(tmp_path, "sleep 600", lambda: False, patience=0, start_seconds=0.5)
    with pytest.raises(ServiceError, match="not ready"):
        server.wait()
    server.stop()


def test_starting_returns_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    server = _server(tmp_path, "sleep 600", lambda: True)
    server.start()
    assert time.monotonic() - started < 1
    server.stop()


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
    remember_ports(tmp_path, "seaweedfs", first)
    remember_ports(tmp_path, "prefect", choose_ports(tmp_path, "prefect", 1))
    assert choose_ports(tmp_path, "seaweedfs", 3) == first
    with socket.create_server(("127.0.0.1", first[1] + PAIR)):
        assert first[1] not in choose_ports(tmp_path, "seaweedfs", 3)
    (tmp_path / "ports.json").write_text("[]")
    assert len(choose_ports(tmp_path, "seaweedfs", 3)) == 3


@pytest.mark.parametrize("field", ["s3_endpoint_url", "mlflow_tracking_uri", "prefect_api_url"])
def test_an_unreachable_service_is_named_within_30_s(field: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ServiceError, match=url) as caught:
            check_reachable(NOTHING_SET.model_copy(update={field: url}))
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_services_that_hang_are_given_up_within_30_s() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        fields = ("s3_endpoint_url", "mlflow_tracking_uri", "prefect_api_url")
        started = time.monotonic()
        with pytest.raises(ServiceError, match=url):
            check_reachable(NOTHING_SET.model_copy(update=dict.fromkeys(fields, url)))
    assert time.monotonic() - started < 30


def test_services_that_answer_pass(s3_server, prefect_api: PrefectApi) -> None:
    check_reachable(NOTHING_SET)
    check_reachable(NOTHING_SET.model_copy(update={"prefect_api_url": prefect_api.url}))
