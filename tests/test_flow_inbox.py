"""The inbox as a retrain sees it: where it is, and what becomes of the rendered sample."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.settings import Settings
from flows.workspace import Workspace
from tasks.data.directory import stored_photos
from tasks.services.s3 import S3Address, Storage
from tasks.stage import silent
from tests.fixtures.checkouts import make_checkout
from tests.fixtures.photos import CHECKOUT, write_photos


def test_an_s3_inbox_is_another_bucket_and_never_removes_what_a_person_put_there(
    s3_server: S3Address, s3: S3Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_checkout(tmp_path / "checkout")
    shutil.copy(CHECKOUT.root / "data.dvc", made.project.root)  # names the rendered sample
    monkeypatch.chdir(made.project.root)
    settings = Settings.model_validate(
        {
            "s3_endpoint_url": s3.endpoint_url,
            "bucket": s3_server.bucket,
            "inbox": f"s3://{s3.bucket}/signs/",
            "AWS_ACCESS_KEY_ID": s3.access_key_id,
            "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
        }
    )
    drop, photos = Storage(s3), write_photos(tmp_path / "photos", per_class=2)
    for label in range(6):
        drop.put(f"signs/{label}/a.png", photos / f"{label}/0000.png")
    with Workspace(made.project, settings) as workspace:

        def listed() -> Any:
            inbox = workspace.inbox()
            assert inbox is not None
            return inbox

        assert workspace.import_new(listed(), silent).usable
        assert workspace.pipeline.data_source() == "sample"  # until it is versioned
        assert len(stored_photos(made.project)) == 6
        # data/ differs from the sample that data.dvc names, so all of it stays.
        drop.put("signs/3/b.png", photos / "3/0001.png")
        second = listed()
        report = workspace.import_new(second, silent)
        assert (sum(report.imported.values()), report.removed) == (1, 0)
        second.remember(workspace.pipeline.version_data("photos"))
        assert listed().new == ()
