"""A team's own services: storage, registry, orchestrator, DVC remote, and a Dask cluster."""

import shutil
from pathlib import Path

from tasks.services.s3 import S3Address, Storage
from tests.fixtures.dask_cluster import DaskCluster
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.servers import MlflowServer
from tests.fixtures.trained import Trained


def test_configured_services_take_everything_and_none_starts_here(
    tmp_path: Path,
    trained: Trained,
    s3: S3Address,
    mlflow_server: MlflowServer,
    prefect_alone: PrefectApi,
    dask_cluster: DaskCluster,
) -> None:
    named = {
        "HANDSIGNS_S3_ENDPOINT_URL": s3.endpoint_url,
        "HANDSIGNS_BUCKET": s3.bucket,
        "HANDSIGNS_DVC_REMOTE_URL": f"s3://{s3.bucket}/dvc",
        "AWS_ACCESS_KEY_ID": str(s3.access_key_id),
        "AWS_SECRET_ACCESS_KEY": str(s3.secret_access_key),
        **mlflow_server.named,
        **prefect_alone.named,
    }
    one = trained.checkout(tmp_path / "one")
    imported = one.handsigns("import", trained.photos, **named)
    assert imported["pushed"] >= 120
    report = one.handsigns("retrain", **named)
    assert report["status"] == "promoted", report["reason"]
    assert report["release"]["uri"].startswith(f"s3://{s3.bucket}/releases/")
    assert not (one.project.local / "seaweedfs").exists()
    assert not (one.project.local / "mlflow.db").exists()
    assert not (one.project.local / "prefect/prefect.db").exists()
    names = {entry.key.split("/")[-1] for entry in Storage(s3).list("releases/")}
    assert {"manifest.json", "model.keras", "labels.json", "metrics.json", "model_card.md"} <= names
    assert prefect_alone.ask("flow_runs/count", {}) >= 1
    # A colleague's clone pulls the photos, asks the same champion, and computes the same
    # features on a cluster.
    two = trained.checkout(tmp_path / "two")
    shutil.copy(one.project.root / "data.dvc", two.project.root)
    seen = two.handsigns("predict", trained.photos / "4/0000.png", **named)
    assert report["release"]["id"] in seen["model"]
    dask_cluster.start_worker()
    same = two.handsigns("retrain", HANDSIGNS_DASK_ADDRESS=dask_cluster.address, **named)
    assert same["data"]["version"] == imported["version"]
    assert same["release"]["id"] == report["release"]["id"]
    assert same["status"] == "unchanged"
    assert same["features"]["computed"] == report["features"]["computed"] > 0
    latest = {"sort": "START_TIME_DESC", "limit": 1}
    run = prefect_alone.ask("flow_runs/filter", latest)[0]["id"]
    logs = prefect_alone.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
    assert any(dask_cluster.address in line["message"] for line in logs)
    assert same["model"]["version"] == report["model"]["version"]
    # Without the login, the variable to set is named.
    nameless = {name: text for name, text in named.items() if name != "PREFECT_API_AUTH_STRING"}
    refused = two.handsigns("retrain", "--force", code=1, **nameless)
    assert "PREFECT_API_AUTH_STRING" in refused["reason"]
    # Nothing of the keys is left in what others may read.
    for place in (one.project, two.project):
        secrets = (str(s3.secret_access_key), mlflow_server.login[-16:], prefect_alone.login[-16:])
        written = [place.run, place.root / "dvc.lock", place.root / ".dvc/config"]
        assert all(secret not in path.read_text() for path in written for secret in secrets)
