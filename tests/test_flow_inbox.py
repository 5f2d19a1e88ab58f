"""The inbox as the flow sees it: where it is, and what becomes of the rendered sample."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flows.preflight import open_inbox
from flows.retrain import import_new
from flows.settings import load_settings
from flows.workspace import Workspace
from tasks.data.directory import stored_photos
from tasks.errors import SettingsError
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
    for name, text in {
        "HANDSIGNS_S3_ENDPOINT_URL": s3.endpoint_url,
        "HANDSIGNS_BUCKET": s3_server.bucket,
        "HANDSIGNS_INBOX": f"s3://{s3.bucket}/signs/",
        "AWS_ACCESS_KEY_ID": str(s3.access_key_id),
        "AWS_SECRET_ACCESS_KEY": str(s3.secret_access_key),
    }.items():
        monkeypatch.setenv(name, text)
    drop = Storage(replace(s3))
    photos = write_photos(tmp_path / "photos", per_class=2)
    for label in range(6):
        drop.put(f"signs/{label}/a.png", photos / f"{label}/0000.png")
    with Workspace(made.project, load_settings()) as workspace:
        inbox = open_inbox(workspace)
        assert inbox is not None
        assert import_new(workspace, inbox, silent).usable
        assert workspace.pipeline.data_source() == "sample"  # until it is versioned
        assert len(stored_photos(made.project)) == 6
        # data/ differs from the sample that data.dvc names, so all of it stays.
        drop.put("signs/3/b.png", photos / "3/0001.png")
        second = open_inbox(workspace)
        assert second is not None
        report = import_new(workspace, second, silent)
        assert (sum(report.imported.values()), report.removed) == (1, 0)
        second.remember(workspace.pipeline.version_data("photos"))
        third = open_inbox(workspace)
        assert third is not None
        assert third.new == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HANDSIGNS_INBOX", "http://host/photos"),
        ("HANDSIGNS_INBOX", "s3://Not A Bucket/photos"),
        ("HANDSIGNS_GIT_PUSH", "--force"),
        ("HANDSIGNS_GIT_PUSH", "data..other"),
        ("HANDSIGNS_GIT_PUSH", "refs/heads/x.lock"),
        ("HANDSIGNS_DVC_REMOTE_URL", "somewhere"),
    ],
)
def test_a_place_that_is_none_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        load_settings()
