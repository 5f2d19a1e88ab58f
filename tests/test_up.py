"""The whole service as processes: started, used, overlapped, cancelled, killed, stopped."""

import base64
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from flows.deploy import POOLS, pool_template
from flows.local.clients import CREDENTIALS, ask, local_credentials
from flows.local.processes import is_alive
from flows.local.stack import embedded
from flows.settings import Settings
from tasks.services.mlflow import credentials_of
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import Workshop, make_checkout
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.receiver import Receiver, receiving
from tests.fixtures.trained import Trained

SILENCE = 35
QUICK = {"PREFECT_WORKER_QUERY_SECONDS": "1"}
TRAINING = "train@base"
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Service:
    """A service that is up in a checkout of its own, and Prefect's API as a client sees it."""

    workshop: Workshop
    told: dict[str, Any]

    def ask(self, path: str, content: Any = None, method: str | None = None) -> Any:
        return self.prefect.ask(path, content, method)

    @property
    def login(self) -> str:
        return local_credentials(self.workshop.project.local).login

    @cached_property
    def prefect(self) -> PrefectApi:
        return PrefectApi(self.told["prefect"], self.login)

    def up(self, receiver: Receiver) -> None:
        named = {**QUICK, "HANDSIGNS_NOTIFY_URLS": receiver.address}
        self.told = self.workshop.handsigns("up", fresh=True, **named)

    def run(self, deployment: str = "retrain/retrain") -> str:
        found = self.ask(f"/deployments/name/{deployment}")["id"]
        return str(self.ask(f"/deployments/{found}/create_flow_run", {})["id"])

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"/flow_runs/{run}")["state"])

    def wait(self, run: str, *types: str, seconds: float = 240) -> dict[str, Any]:
        """Poll until the run is in a state of one of these types, or in a final one."""
        deadline = time.monotonic() + seconds
        while (state := self.state(run))["type"] not in (*types, *FINAL):
            assert time.monotonic() < deadline, state
            time.sleep(0.2)
        assert state["type"] in types, state
        return state

    def training(self, run: str) -> dict[str, Any]:
        """The task of a run that trains its first phase, once it began."""
        wanted = {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"name": {"any_": [TRAINING]}}}
        deadline = time.monotonic() + 240
        while not (found := self.ask("/task_runs/filter", wanted)) or not found[0]["start_time"]:
            assert time.monotonic() < deadline, self.state(run)
            time.sleep(0.2)
        return dict(found[0])

    def processes(self, word: str = "") -> list[psutil.Process]:
        """What runs in the checkout, or is part of its service, with `word` in its arguments."""
        return [one for one in _processes(self.workshop) if word in " ".join(one.cmdline())]


def _processes(workshop: Workshop) -> list[psutil.Process]:
    root = str(workshop.project.root)
    found = []
    for one in psutil.process_iter():
        try:
            ours = one.cwd() == root or root in " ".join(one.cmdline())
        except psutil.Error:
            continue
        if ours and one.status() != psutil.STATUS_ZOMBIE:
            found.append(one)
    return found


def _gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended, if only their parent has not taken notice yet."""
    left = psutil.wait_procs(processes, timeout=seconds)[1]
    return all(one.status() == psutil.STATUS_ZOMBIE for one in left)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """Where the service's notifications arrive."""
    with receiving("hush") as listening:
        yield listening


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, trained: Trained, receiver: Receiver
) -> Iterator[Service]:
    """A service on SQLite, with photos on which training takes longer than any test."""
    folder = tmp_path_factory.mktemp("up")
    workshop = trained.checkout(folder / "checkout")
    workshop.handsigns("import", trained.photos)
    workshop.change("phases.base", epochs=1000, trainable_layers=16)
    with embedded(Settings(), workshop.project) as services:
        MlflowClient(services.mlflow()).create_registered_model("before")
        Storage(services.s3()).put("before", b"kept")
    made = Service(workshop, {})
    made.up(receiver)
    try:
        yield made
    finally:
        workshop.handsigns("down", fresh=True)


def test_up_answers_everywhere_and_says_where(service: Service) -> None:
    assert service.told["started"]
    for address in (f"{service.told['mlflow']}/health", f"{service.told['prefect']}/health"):
        assert ask(address)
    page = ask(service.told["prefect"].removesuffix("/api"), seconds=10)
    assert page is not None
    assert b"<html" in page.lower()
    again = service.workshop.handsigns("up", fresh=True, **QUICK)
    assert again == {**service.told, "started": False}


def test_it_works_on_the_data_that_was_there_before(service: Service) -> None:
    with credentials_of(None, service.login):
        assert MlflowClient(service.told["mlflow"]).get_registered_model("before")
    with embedded(Settings(), service.workshop.project) as services:
        assert services.s3().endpoint_url == service.told["s3"]
        assert services.mlflow() == service.told["mlflow"]
        assert services.prefect() == service.told["prefect"]
        assert Storage(services.s3()).get("before") == b"kept"
    assert service.workshop.handsigns("status")["champion"] is None


def test_deployments_pools_and_the_schedule_are_registered(service: Service) -> None:
    retrain = service.ask("/deployments/name/retrain/retrain")
    (schedule,) = retrain["schedules"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert schedule["schedule"]["timezone"] == "Etc/UTC"
    assert retrain["global_concurrency_limit"]["limit"] == 1
    assert retrain["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    for name in ("retrain/retrain", "promote/promote", "rollback/rollback"):
        deployment = service.ask(f"/deployments/name/{name}")
        assert "handsigns" in deployment["tags"]  # by which the automations know our runs
        parameters = deployment["parameter_openapi_schema"]["properties"].values()
        assert all(one["description"] for one in parameters), name
        # With Prefect's default of 180 s, every run would seem to have crashed.
        assert deployment["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    pools = {pool["name"]: pool for pool in service.ask("/work_pools/filter", {})}
    assert {name: pools[name]["type"] for name in POOLS} == POOLS
    assert pools["handsigns"]["status"] == "READY"


def _holds(path: Path, secrets: list[str]) -> bool:
    with suppress(FileNotFoundError):  # a database's journal comes and goes
        content = path.read_bytes()
        return any(secret.encode() in content for secret in secrets)
    return False


def test_nothing_listens_beyond_loopback_and_no_secret_is_shown(service: Service) -> None:
    ours = {one.pid for one in service.processes()}
    listening = {
        one.laddr.ip
        for one in psutil.net_connections("tcp")
        if one.status == "LISTEN" and one.pid in ours
    }
    assert listening == {"127.0.0.1"}
    local = service.workshop.project.local
    known = local_credentials(local)
    secrets = [known.secret_access_key, known.login.partition(":")[2]]
    secrets += [base64.b64encode(known.login.encode()).decode()]
    assert not any(service.processes(secret) for secret in secrets)
    files = [path for path in service.workshop.project.root.rglob("*") if path.is_file()]
    assert {path for path in files if _holds(path, secrets)} == {local / CREDENTIALS}
    assert service.ask("/variables/filter", {}) == []
    assert (local / "programs/worker.json").stat().st_mode & 0o777 == 0o600


@pytest.fixture(scope="module")
def training(service: Service) -> str:
    """A run that has begun to train, and one that came meanwhile."""
    first, second = service.run(), service.run()
    states = {run: service.wait(run, "RUNNING", "CANCELLED") for run in (first, second)}
    (refused,) = [state for state in states.values() if state["type"] == "CANCELLED"]
    assert "concurrency limit" in refused["message"]
    (run,) = [run for run, state in states.items() if state["type"] == "RUNNING"]
    service.training(run)
    return run


def test_a_schedule_that_fires_twice_trains_once(service: Service, training: str) -> None:
    assert service.state(training)["type"] == "RUNNING"
    assert len(service.processes("prefect.engine")) == 1
    refused = service.workshop.handsigns("retrain", code=1)
    assert "Another retrain" in refused["reason"]
    assert str(service.processes("prefect.engine")[0].pid) in refused["reason"]


@pytest.fixture(scope="module")
def cancelled(service: Service, training: str) -> tuple[list[psutil.Process], datetime]:
    """The processes of the run that was cancelled, and when it was asked to stop."""
    engine = service.processes("prefect.engine")
    asked = datetime.now(UTC)
    service.ask(f"/flow_runs/{training}/set_state", {"state": {"type": "CANCELLING"}})
    service.wait(training, "CANCELLED")
    return engine, asked


def test_a_cancelled_run_stops_within_10_s_and_leaves_nothing(
    service: Service, training: str, cancelled: tuple[list[psutil.Process], datetime]
) -> None:
    engine, asked = cancelled
    assert _gone(engine, 5)
    while not (stopped := service.training(training)["end_time"]):
        time.sleep(0.2)
    assert (datetime.fromisoformat(stopped) - asked).total_seconds() < 10
    project = service.workshop.project
    assert json.loads((project.root / ".dvc/tmp/rwlock").read_text()) == {}
    assert not project.weights("base").exists()
    assert not list(project.artifacts.rglob(".*"))
    report = service.workshop.report()
    assert (report["status"], report["reason"].split(".")[0]) == ("cancelled", "Interrupted")
    assert service.workshop.handsigns("status")["last_run"]["status"] == "cancelled"
    assert service.ask(f"/flow_runs/{training}")["name"] == "cancelled"


@pytest.fixture(scope="module")
def killed(
    service: Service, cancelled: tuple[list[psutil.Process], datetime], foreign: str
) -> tuple[str, float]:
    """The run after the cancelled one, killed in its training together with its worker."""
    assert _gone(cancelled[0], 10)
    service.ask("/work_pools/handsigns-docker", {"is_paused": True}, "PATCH")
    service.workshop.handsigns("deploy", "--silence", str(SILENCE))
    assert service.ask("/work_pools/handsigns-docker")["is_paused"]
    run = service.run()
    service.training(run)
    for one in service.processes("worker start") + service.processes("prefect.engine"):
        one.kill()
    return run, time.monotonic()


@pytest.fixture(scope="module")
def foreign(service: Service, cancelled: object) -> str:
    """A run of somebody else's flow, which only has the name of ours, and beats no heart."""
    flow = service.ask("/flows/", {"name": "retrain"})["id"]
    run = service.ask("/flow_runs/", {"flow_id": flow, "state": {"type": "PENDING"}})["id"]
    service.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}})
    return str(run)


@pytest.mark.slow
@pytest.mark.program("initdb")
@pytest.mark.usefixtures("killed")
def test_a_database_url_moves_prefect_and_mlflow_to_postgresql_for_one_checkout_at_a_time(
    postgresql: str, tmp_path: Path
) -> None:
    first, second = (make_checkout(tmp_path / name) for name in ("first", "second"))
    told = first.handsigns("up", fresh=True, DATABASE_URL=postgresql)
    password = postgresql.rpartition("@")[0][-16:]
    try:
        service = Service(first, told)
        assert service.ask("/deployments/count", {}) == 6
        with credentials_of(None, service.login):
            assert MlflowClient(told["mlflow"]).create_registered_model("hands")
        assert password not in json.dumps(told)
        assert not service.processes(password)
        for one in service.processes("worker start"):
            assert password not in one.environ().get("DATABASE_URL", "")
        refused = second.handsigns("up", code=1, fresh=True, DATABASE_URL=postgresql)
        assert "belongs to another checkout" in refused
        assert str(first.project.root) in refused
        assert not is_alive(second.project.local, "prefect")
    finally:
        first.handsigns("down", fresh=True, DATABASE_URL=postgresql)
    assert not (first.project.local / "mlflow.db").exists()
    assert not list((first.project.local / "prefect").glob("*.db"))
    logs = (first.project.local / "logs").iterdir()
    assert all(password not in path.read_text(errors="replace") for path in logs)
    # The same versions are there without a server, for who names the same database.
    named = Settings(DATABASE_URL=postgresql)  # type: ignore[call-arg]
    with embedded(named, first.project) as services:
        assert MlflowClient(services.mlflow()).get_registered_model("hands").name == "hands"


@pytest.mark.slow
def test_a_run_whose_worker_died_is_marked_crashed_and_told_by_the_next_worker(
    service: Service, killed: tuple[str, float], foreign: str, receiver: Receiver
) -> None:
    run, at = killed
    state = service.wait(run, "CRASHED", seconds=120 - (time.monotonic() - at))
    assert "Nothing was heard" in state["message"]
    assert service.processes("worker start")
    deadline = time.monotonic() + 90
    while not (told := [one for one in receiver.messages if "crashed" in one["title"]]):
        assert time.monotonic() < deadline, receiver.messages
        time.sleep(0.2)
    assert told[0]["title"] == "handsigns: retrain crashed"
    assert "Nothing was heard" in told[0]["message"]
    assert run in told[0]["message"]
    assert service.state(foreign)["type"] == "RUNNING"


@pytest.mark.slow
def test_a_run_ends_with_its_service_as_cancelled_or_crashed(
    service: Service, foreign: str, receiver: Receiver
) -> None:
    def begin() -> str:
        run = service.run()
        service.training(run)
        return run

    run = begin()
    service.workshop.handsigns("down", fresh=True)
    assert service.workshop.report()["status"] == "cancelled"
    service.up(receiver)
    assert service.state(run)["type"] == "CANCELLED"
    run = begin()
    assert not service.workshop.project.run.exists()
    for one in (processes := service.processes()):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    assert _gone(processes, 10)
    service.up(receiver)
    state, why = service.state(run), "The service stopped while this run was under way"
    assert (state["type"], why in state["message"]) == ("CRASHED", True), state
    told = [one["message"] for one in receiver.messages if run in one["message"]]
    assert [why in message for message in told] == [True]
    assert service.state(foreign)["type"] == "RUNNING"


def test_down_stops_all_of_it_and_the_data_stays(service: Service) -> None:
    before = service.processes()
    assert len(before) >= 5
    assert service.workshop.handsigns("down", fresh=True) == {"stopped": True}
    assert _gone(before, 1)
    assert not service.processes()
    assert service.workshop.handsigns("down", fresh=True) == {"stopped": False}
    with embedded(Settings(), service.workshop.project) as services:
        assert MlflowClient(services.mlflow()).get_registered_model("before")
        assert Storage(services.s3()).get("before") == b"kept"


@pytest.mark.parametrize("kind", POOLS.values())
def test_a_pools_template_is_one_that_prefect_takes(kind: str) -> None:
    from prefect.server.schemas.actions import DeploymentCreate, WorkPoolCreate

    template = pool_template(CHECKOUT, kind)
    WorkPoolCreate(name="pool", type=kind, base_job_template=template)
    deployment = DeploymentCreate(name="retrain", flow_id=uuid.uuid4())
    deployment.check_valid_configuration(template)
