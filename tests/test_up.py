"""The service as processes: started, used, overlapped, cancelled, killed, migrated, stopped."""

import base64
import json
import os
import secrets
import shlex
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from mlflow import MlflowClient

from flows.local.clients import CREDENTIALS, ask, local_credentials
from flows.local.processes import choose_ports, read_state
from flows.local.servers import migrate
from flows.local.stack import Services
from flows.settings import Settings
from tasks.errors import ServiceError
from tasks.services.mlflow import Registry, credentials_of
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import Repo, make_checkout
from tests.fixtures.faults import Receiver, receiving
from tests.fixtures.photos import write_photos
from tests.fixtures.servers import PrefectApi
from tests.fixtures.service import soon


@dataclass(frozen=True)
class Service(PrefectApi):
    """A service that is up in a checkout of its own, and its Prefect."""

    repo: Repo
    addresses: dict[str, Any]

    def run(self) -> str:
        found = self.ask("deployments/name/retrain/retrain")["id"]
        return str(self.ask(f"deployments/{found}/create_flow_run", {})["id"])

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"flow_runs/{run}")["state"])

    def wait(self, run: str, *types: str, seconds: float = 240) -> dict[str, Any]:
        """Wait until the run is in a state of one of these types, and in no other final one."""
        ends = {*types, "COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        soon(lambda: self.state(run)["type"] in ends, seconds)
        state = self.state(run)
        assert state["type"] in types, state
        return state

    def training(self, run: str) -> dict[str, Any]:
        """The task of a run that trains its first phase, once it began."""
        wanted: dict[str, Any] = {"flow_runs": {"id": {"any_": [run]}}}
        wanted["task_runs"] = {"name": {"any_": ["train@base"]}}
        found = lambda: self.ask("task_runs/filter", wanted)  # noqa: E731
        soon(lambda: found() and found()[0]["start_time"], 240)
        return dict(found()[0])

    def processes(self, word: str = "") -> list[psutil.Process]:
        """What runs in the checkout, or is part of its service, with `word` in its arguments."""
        root, found = str(self.repo.project.root), []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                words = " ".join(one.cmdline())
                ours = (one.cwd() == root or root in words) and word in words
                found += [one] if ours and one.status() != psutil.STATUS_ZOMBIE else []
        return found


def up(repo: Repo, notify: str = "", **environment: str) -> Service:
    environment |= {"PREFECT_WORKER_QUERY_SECONDS": "1", "HANDSIGNS_NOTIFY_URLS": notify}
    addresses = repo.handsigns("up", **environment)
    login = local_credentials(repo.project.local).login
    return Service(addresses["prefect"], login, repo, addresses)


def down(service: Service, **environment: str) -> bool:
    return bool(service.repo.handsigns("down", **environment)["stopped"])


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    left = psutil.wait_procs(processes, timeout=seconds)[1]
    return all(one.status() == psutil.STATUS_ZOMBIE for one in left)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving("hush") as listening:
        yield listening


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Service]:
    """A service on SQLite."""
    made = up(make_checkout(tmp_path_factory.mktemp("up") / "checkout"), receiver.address)
    yield made
    down(made)


@pytest.fixture(scope="module")
def photos(service: Service, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Photos on which training takes longer than any test."""
    folder = write_photos(tmp_path_factory.mktemp("photos"), 12)
    service.repo.handsigns("import", folder)
    service.repo.change("phases.base", epochs=1000, trainable_layers=16)


def test_up_answers_everywhere_and_deploys_the_flows(service: Service, receiver: Receiver) -> None:
    found = service.addresses
    assert found["started"]
    assert up(service.repo, receiver.address).addresses == {**found, "started": False}
    assert b"<html" in (ask(found["prefect"].removesuffix("/api"), seconds=10) or b"").lower()
    with credentials_of(None, service.login):
        MlflowClient(found["mlflow"]).create_registered_model("kept")
    with closing(Services(Settings(), service.repo.project)) as services:
        used = services.s3().endpoint_url, services.mlflow()[0], services.prefect()
        assert used == (found["s3"], found["mlflow"], found["prefect"])
        Storage(services.s3()).put("kept", b"kept")
    retrain = service.ask("deployments/name/retrain/retrain")
    (schedule,) = retrain["schedules"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert retrain["global_concurrency_limit"]["limit"] == 1
    assert retrain["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    for name in ("retrain/retrain", "promote/promote", "rollback/rollback"):
        deployment = service.ask(f"deployments/name/{name}")
        assert "handsigns" in deployment["tags"]  # by which the automations know our runs
        parameters = deployment["parameter_openapi_schema"]["properties"].values()
        assert all(one["description"] for one in parameters), name
        # With Prefect's default of 180 s, every run would seem to have crashed.
        assert deployment["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    (pool,) = service.ask("work_pools/filter", {})
    assert (pool["name"], pool["type"], pool["status"]) == ("handsigns", "process", "READY")


def test_nothing_listens_beyond_loopback_and_no_secret_is_shown(service: Service) -> None:
    ours = {one.pid for one in service.processes()}
    listening = [one for one in psutil.net_connections("tcp") if one.status == "LISTEN"]
    assert {one.laddr.ip for one in listening if one.pid in ours} == {"127.0.0.1"}
    local = service.repo.project.local
    known = local_credentials(local)
    secrets = [known.secret_access_key, known.login.partition(":")[2]]
    secrets += [base64.b64encode(known.login.encode()).decode()]
    assert not any(service.processes(secret) for secret in secrets)
    holding = set()
    for path in service.repo.project.root.rglob("*"):
        with suppress(OSError):  # folders; journals come and go
            content = path.read_bytes()
            holding |= {path for secret in secrets if secret.encode() in content}
    assert holding == {local / CREDENTIALS}
    assert service.ask("variables/filter", {}) == []
    assert (local / "programs/worker.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.usefixtures("photos")
def test_of_two_runs_one_trains_and_a_cancelled_one_stops_within_10_s(service: Service) -> None:
    runs = [service.run(), service.run()]
    states = {run: service.wait(run, "RUNNING", "CANCELLED") for run in runs}
    (refused,) = [state for state in states.values() if state["type"] == "CANCELLED"]
    assert "concurrency limit" in refused["message"]
    (run,) = [run for run, state in states.items() if state["type"] == "RUNNING"]
    service.training(run)
    (engine,) = service.processes("prefect.engine")
    busy = service.repo.handsigns("retrain", code=1)["reason"]
    assert f"Another retrain of this checkout runs: process {engine.pid}" in busy

    asked = datetime.now(UTC)
    service.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    service.wait(run, "CANCELLED")
    assert gone([engine], 10)
    stopped = soon(lambda: service.training(run)["end_time"])
    assert (datetime.fromisoformat(stopped) - asked).total_seconds() < 10
    assert json.loads((service.repo.project.root / ".dvc/tmp/rwlock").read_text()) == {}
    report = service.repo.report()
    assert (report["status"], report["reason"].split(".")[0]) == ("cancelled", "Interrupted")
    assert service.ask(f"flow_runs/{run}")["name"] == "cancelled"


@pytest.mark.slow
@pytest.mark.usefixtures("photos")
def test_a_run_ends_with_its_service_or_has_crashed(service: Service, receiver: Receiver) -> None:
    service.training(run := service.run())
    down(service)
    assert service.repo.report()["status"] == "cancelled"
    up(service.repo, receiver.address)
    assert service.state(run)["type"] == "CANCELLED"
    # Somebody else's run, of a flow with the name of ours, beats no heart.
    flow = service.ask("flows/", {"name": "retrain"})["id"]
    made = {"flow_id": flow, "state": {"type": "PENDING"}}
    foreign = service.ask("flow_runs/", made)["id"]
    service.ask(f"flow_runs/{foreign}/set_state", {"state": {"type": "RUNNING"}})
    service.training(run := service.run())
    for one in (processes := service.processes()):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    assert gone(processes, 10)
    up(service.repo, receiver.address)
    service.ask("work_pools/handsigns", {"concurrency_limit": 3}, "PATCH")
    service.repo.handsigns("deploy")
    assert service.ask("work_pools/handsigns")["concurrency_limit"] == 3
    state = service.wait(run, "CRASHED", seconds=200)
    assert "Nothing was heard" in state["message"]
    sent = soon(lambda: [one for one in receiver.messages if "crashed" in one["title"]], 90)
    assert sent[0]["title"] == "handsigns: retrain crashed"
    assert run in sent[0]["message"]
    assert service.state(foreign)["type"] == "RUNNING"


def test_down_stops_all_of_it_and_the_data_stays(service: Service) -> None:
    before = service.processes()
    assert len(before) >= 5
    assert down(service)
    assert gone(before, 1)
    assert not service.processes()
    assert not down(service)
    with closing(Services(Settings(), service.repo.project)) as services:
        assert MlflowClient(services.mlflow()[0]).get_registered_model("kept")
        assert Storage(services.s3()).get("kept") == b"kept"


INITDB = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
USER = "postgres"  # the server refuses to run as root; the package brings this account


@pytest.fixture
def postgresql() -> Iterator[str]:
    """URL of a database that is not there yet."""
    with tempfile.TemporaryDirectory(prefix="handsigns-pg-") as temporary:
        folder, port = Path(temporary), choose_ports(1)[0]
        # A password that must be quoted in an address.
        password = f"se@cret/{secrets.token_hex(8)}"
        (folder / "password").write_text(password)
        user: list[str] = []
        if os.geteuid() == 0:
            user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
            for path in (folder, folder / "password"):
                shutil.chown(path, USER)

        def run(program: str, words: str) -> None:
            command = [*user, str(INITDB[-1].with_name(program)), "-D", "data", *shlex.split(words)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

        run("initdb", "-U hand -A scram-sha-256 --pwfile password -N")
        run("pg_ctl", f"-w -o '-p {port} -h 127.0.0.1 -k {folder} -F' -l log start")
        yield f"postgresql://hand:{quote(password, safe='')}@127.0.0.1:{port}/signs"
        run("pg_ctl", "-m immediate stop")


@pytest.mark.slow
@pytest.mark.skipif(not INITDB, reason="see `make packages`")
def test_a_postgresql_serves_one_checkout_at_a_time(postgresql: str, tmp_path: Path) -> None:
    first, second = (make_checkout(tmp_path / name) for name in ("first", "second"))
    service = up(first, DATABASE_URL=postgresql)
    password = postgresql.rpartition("@")[0][-16:]
    try:
        assert service.ask("deployments/count", {}) == 6
        with credentials_of(None, service.login):
            assert MlflowClient(service.addresses["mlflow"]).create_registered_model("hands")
        assert password not in json.dumps(service.addresses)
        assert not service.processes(password)
        for one in service.processes("worker start"):
            assert password not in one.environ().get("DATABASE_URL", "")
        refused = second.handsigns("up", code=1, DATABASE_URL=postgresql)
        assert f"belongs to another checkout, whose worker is up: {first.project.root}" in refused
        assert not read_state(second.project.local, "prefect")
    finally:
        down(service, DATABASE_URL=postgresql)
    local = first.project.local
    assert not [*local.glob("mlflow.db"), *(local / "prefect").glob("*.db")]
    logs = (local / "logs").iterdir()
    assert all(password not in path.read_text(errors="replace") for path in logs)
    # The same versions are there without a server, for who names the same database.
    named = Settings(DATABASE_URL=postgresql)  # type: ignore[call-arg]
    with closing(Services(named, first.project)) as services:
        assert MlflowClient(services.mlflow()[0]).get_registered_model("hands").name == "hands"


@pytest.mark.slow
def test_local_databases_of_another_version_are_backed_up_and_migrated_or_refused(
    tmp_path: Path, tracking_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    versions, known = tmp_path / "versions.json", "select version_num from alembic_version"

    def sql(file: Path, statement: str) -> Any:
        with closing(sqlite3.connect(file, isolation_level=None)) as database:
            return database.execute(statement).fetchone()

    versions.write_text('{"mlflow": "3.0.0"}')
    migrate(tmp_path, "mlflow")
    (backup,) = tmp_path.glob("mlflow.db.before-*")
    assert sql(backup, known) == sql(tmp_path / "mlflow.db", known)
    assert str(backup) in caplog.text
    backup.unlink()
    migrate(tmp_path, "mlflow")
    assert not backup.exists()

    sql(tmp_path / "mlflow.db", "update alembic_version set version_num = 'of-the-future'")
    versions.write_text('{"mlflow": "9.0.0"}')
    for _ in range(2):
        with pytest.raises(ServiceError, match=r"of MLflow 9.0.0 cannot be migrated .*backup is"):
            migrate(tmp_path, "mlflow")
    assert sql(backup, known) == ("of-the-future",)
    with pytest.raises(ServiceError) as caught:
        Registry(tracking_uri, "signs").versions()
    assert f"run `mlflow db upgrade {tracking_uri}`" in str(caught.value)
