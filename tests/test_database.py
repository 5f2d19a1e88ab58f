"""The local databases after an upgrade of the library that made them."""

import json
import logging
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from mlflow.store.tracking.dbmodels.initial_models import Base
from sqlalchemy import create_engine

from flows.local.databases import migrate, redact_database
from flows.local.stack import embedded
from flows.settings import Settings
from tasks.errors import ServiceError
from tasks.project import Project
from tasks.services.mlflow import Registry
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.publishing import record


def older_registry(file: Path) -> str:
    """Make a registry as an earlier MLflow made it, with one experiment; return its revision."""
    url = f"sqlite:///{file}"
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()
    config = Config()
    config.set_main_option("script_location", f"{Path(mlflow.__file__).parent}/store/db_migrations")
    config.set_main_option("sqlalchemy.url", url)
    revisions = list(ScriptDirectory.from_config(config).walk_revisions())
    command.upgrade(config, revisions[8].revision)
    with closing(sqlite3.connect(file)) as database:
        database.execute("insert into experiments (name, lifecycle_stage) values ('old', 'active')")
        database.commit()
    return str(revisions[8].revision)


def revision(file: Path) -> str:
    with closing(sqlite3.connect(file)) as database:
        return str(database.execute("select version_num from alembic_version").fetchone()[0])


@pytest.mark.slow
def test_a_local_registry_of_an_older_mlflow_is_backed_up_and_migrated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = Project(tmp_path)
    project.local.mkdir(mode=0o700)
    file = project.local / "mlflow.db"
    before = older_registry(file)
    with caplog.at_level(logging.WARNING), embedded(Settings(), project) as services:
        registry = Registry(services.mlflow(), "signs")
        assert registry.versions() == []
    (backup,) = project.local.glob("mlflow.db.before-*")
    assert str(backup) in caplog.text
    assert revision(backup) == before != revision(file)
    for database in (file, backup):
        with closing(sqlite3.connect(database)) as opened:
            names = {name for (name,) in opened.execute("select name from experiments")}
        assert "old" in names
    caplog.clear()
    with embedded(Settings(), project) as services:
        services.mlflow()
    assert caplog.text == ""


def test_another_registry_of_an_older_mlflow_is_refused_with_the_exact_command(
    tmp_path: Path,
) -> None:
    file = tmp_path / "theirs.db"
    url = f"sqlite:///{file}"
    Registry(f"sqlite:///{tmp_path / 'ours.db'}", "signs").versions()
    shutil.copy(tmp_path / "ours.db", file)
    with closing(sqlite3.connect(file)) as database:
        database.execute("update alembic_version set version_num = 'of-the-past'")
        database.commit()
    with pytest.raises(ServiceError) as caught:
        Registry(url, "signs").versions()
    assert f"run `mlflow db upgrade {url}`" in str(caught.value)
    assert "move it away" not in str(caught.value)


@pytest.mark.slow
def test_a_registry_of_a_newer_mlflow_is_kept_and_said_so(tmp_path: Path) -> None:
    older_registry(tmp_path / "mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("update alembic_version set version_num = 'of-the-future'")
        database.commit()
    (tmp_path / "versions.json").write_text('{"mlflow": "9.0.0"}')
    for _ in range(2):
        with pytest.raises(ServiceError, match=r"of MLflow 9.0.0 cannot be migrated .*backup is"):
            migrate(tmp_path, "mlflow")
    assert len(list(tmp_path.glob("mlflow.db.before-*"))) == 1


def test_prefects_database_is_backed_up_once_before_its_server_migrates_it(tmp_path: Path) -> None:
    (tmp_path / "prefect").mkdir()
    with closing(sqlite3.connect(tmp_path / "prefect/prefect.db")) as database:
        database.execute("create table kept (one text)")
    for _ in range(2):
        migrate(tmp_path, "prefect")
    (backup,) = (tmp_path / "prefect").glob("prefect.db.before-*")
    with closing(sqlite3.connect(backup)) as database:
        assert database.execute("select count(*) from kept").fetchone() == (0,)
    assert list(json.loads((tmp_path / "versions.json").read_text())) == ["prefect"]


def test_a_new_checkout_has_nothing_to_back_up(tmp_path: Path) -> None:
    migrate(tmp_path, "mlflow")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["versions.json"]


def test_the_artifact_store_of_another_project_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3: S3Address, tracking_uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    (tmp_path / "model.keras").write_bytes(b"a model")
    record(Registry(tracking_uri, "signs", s3), "0" * 32, tmp_path)
    assert list(Storage(s3).list("mlflow/signs/"))


def test_a_database_is_shown_without_its_password() -> None:
    url = "postgresql://user:secret@host:5433/signs?sslmode=require"
    assert redact_database(url) == "postgresql://host:5433/signs"
