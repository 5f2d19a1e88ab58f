"""Machines that are not root's, English, writable and alone: each works or is named in a line."""

import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flows.local.stack import Services
from flows.settings import Settings
from tasks.services.s3 import Storage
from tests.fixtures.checkouts import BIN, Repo, make_checkout
from tests.fixtures.faults import Answer, proxy_to
from tests.fixtures.photos import write_photos
from tests.fixtures.service import point, publish_graph

NOBODY = 54321  # a user id without a name
NOWHERE = "http://127.0.0.1:9"
STATUS, PREDICT = ("status",), ("predict", "{photo}")
# Where cgroup v1 keeps processor quotas; `joblib.cpu_count` reads them there, or v2's.
QUOTA = Path("/sys/fs/cgroup/cpu")


@dataclass(frozen=True)
class Variant:
    """One kind of surroundings, and what a command does there; names in braces are of `Place`."""

    words: tuple[str, ...] = STATUS
    says: str = ""  # pattern of the one line of a refusal
    environment: Mapping[str, str] = field(default_factory=dict)  # an empty value removes one
    shell: str = ":"  # commands before, such as `ulimit -n 64`
    read_only: tuple[str, ...] = ()
    user: int | None = None
    root: str = "{checkout}"


def named(words: tuple[str, ...] = STATUS, says: str = "", **environment: str) -> Variant:
    return Variant(words, says, environment)


STORAGE = {"HANDSIGNS_S3_ENDPOINT_URL": "{page}", "AWS_ACCESS_KEY_ID": "a"}
NEWER = "revision.* newer version: install that version"
VARIANTS = {
    # What belongs to services that are not used is ignored.
    "storage of another project": named(MLFLOW_S3_ENDPOINT_URL=NOWHERE),
    "AWS profile that is not there": named(AWS_PROFILE="of-another-project"),
    "AWS configuration that is none": named(AWS_CONFIG_FILE="{folder}/aws"),
    "proxy that does not answer": named(HTTP_PROXY=NOWHERE, http_proxy=NOWHERE),
    "SOCKS proxy": named(ALL_PROXY="socks5://127.0.0.1:9"),
    "authorities that are not there": named(PREDICT, SSL_CERT_FILE="/nowhere.pem"),
    "another backend of Keras": named(PREDICT, KERAS_BACKEND="torch"),
    "settings of Keras": named(PREDICT, KERAS_HOME="{folder}/keras"),
    "foreign modules before ours": named(PREDICT, PYTHONPATH="{folder}/foreign:{checkout}"),
    # Users, homes, languages, places.
    "no HOME": named(PREDICT, HOME=""),
    "a HOME that is not there": named(HOME="/nowhere"),
    "plain C locale": named(LC_ALL="C", PYTHONIOENCODING="ascii"),
    "a narrow terminal without features": named(TERM="dumb", COLUMNS="20", NO_COLOR="1"),
    "a log level that is none": named(PREDICT, PREFECT_LOGGING_LEVEL="LOUD"),
    "a folder of the checkout": Variant(says="checkout", root="{checkout}/docs"),
    "a path with a question mark": Variant(says="question mark.*Rename", root="{folder}/what?"),
    # Limits and read-only places.
    "few open files": Variant(PREDICT, "open files.*ulimit", shell="ulimit -n 64", root="{idle}"),
    "no room in any file": Variant(("retrain",), "File too large", shell="ulimit -f 0"),
    "read-only /tmp": Variant(PREDICT, "/tmp", read_only=("/tmp", "/var/tmp"), root="{idle}"),
    "read-only /usr and a TMPDIR": Variant(
        PREDICT,
        environment={"TMPDIR": "{folder}"},
        read_only=("/var/tmp", "/usr"),
        root="{idle}",
    ),
    "a read-only checkout": Variant(PREDICT, "(?i)read-only", read_only=("{checkout}",)),
    "a user without a name": Variant(PREDICT, "(?i)permission|another user", user=NOBODY),
    "output onto a full disk": Variant(says="No space left", shell="exec >/dev/full"),
    # Services that are not as they should be.
    "registry in a folder": named(says="_TRACKING_URI", MLFLOW_TRACKING_URI="file:///tmp/mlruns"),
    "storage that answers nonsense": named(
        says=r"127\.0\.0\.1", **STORAGE, AWS_SECRET_ACCESS_KEY="b"
    ),
    "registry that answers nonsense": named(says=r"127\.0\.0\.1", MLFLOW_TRACKING_URI="{page}"),
    "orchestrator that answers nonsense": named(
        ("retrain", "--force"), r"127\.0\.0\.1", PREFECT_API_URL="{page}/api"
    ),
    "orchestrator of a newer version": Variant(("retrain", "--force"), NEWER, root="{idle}"),
    "a setting that is none": named(says="HANDSIGNS_BUCKET", HANDSIGNS_BUKET="a"),
    "a bucket that is none": named(says="Not A Bucket", HANDSIGNS_BUCKET="Not A Bucket"),
}
QUICK = {"foreign modules before ours", "a path with a question mark", "no room in any file"}
QUICK |= {"a read-only checkout"}
"""Run for each change; `make test-all` runs all."""


@dataclass(frozen=True)
class Place:
    """A checkout with photos and a champion, and the names that variants put in braces."""

    repo: Repo
    names: dict[str, str]

    def run(self, variant: Variant, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of the environment in these surroundings."""
        root = variant.root.format(**self.names)
        read_only = [path.format(**self.names) for path in variant.read_only]
        words = [str(BIN / command[0]), *(word.format(**self.names) for word in command[1:])]
        if variant.user is not None:
            words = ["setpriv", f"--reuid={variant.user}", "--clear-groups", *words]
        mounts = [f"mount --bind '{root}' '{root}'"] if read_only and root not in read_only else []
        for at in read_only:  # the checkout stays writable, wherever it is
            mounts.append(f"mount --rbind '{at}' '{at}' && mount -o remount,bind,ro '{at}'")
        script = " && ".join([*mounts, "cd .", variant.shell, 'exec "$@"'])
        words = ["sh", "-c", script, "sh", *words]
        changes = {name: text.format(**self.names) for name, text in variant.environment.items()}
        given = self.repo.environment(**changes)
        return subprocess.run(
            ["unshare", "--mount", *words] if "mount" in script else words,
            cwd=root,
            env={name: value for name, value in given.items() if value},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
        )


@pytest.fixture(scope="module")
def place(graphs: tuple[bytes, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("surroundings")
    page = Answer(200, b"<!doctype html><title>Nonsense</title>", {"content-type": "text/html"})
    made = make_checkout(folder / "checkout")
    made.handsigns("import", write_photos(folder / "photos", 12))
    for path, content in {
        "aws": "[default\nregion = ???",
        "keras/keras.json": '{"image_data_format": "channels_first", "backend": "jax"}',
        "foreign/flows.py": "raise SystemExit('not yours')",
        "foreign/tasks/__init__.py": "raise SystemExit('not yours')",
        "what?/dvc.yaml": "",
        "what?/params.yaml": made.project.params.read_text(),
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    with (
        closing(Services(Settings(), made.project)) as services,
        proxy_to(NOWHERE) as server,
        server.failing(lambda exchange: exchange.send(page)),
    ):
        storage = Storage(services.s3())
        point(storage, publish_graph(storage, folder / "release", graphs[0]).id, 1)
        made.handsigns("status")
        # A checkout whose servers are not up, with a database of a later Prefect.
        kept = shutil.ignore_patterns("cache", "tmp", "prefect", "programs", "tests", "*.sock")
        shutil.copytree(folder / "checkout", folder / "idle", symlinks=True, ignore=kept)
        (folder / "idle/.local/prefect").mkdir()
        with closing(sqlite3.connect(folder / "idle/.local/prefect/prefect.db")) as database:
            database.execute("create table alembic_version as select 'of-the-future' version_num")
        names = {"folder": str(folder), "page": server.url}
        names |= {name: str(folder / name) for name in ("checkout", "idle")}
        names["photo"] = str(next((made.project.root / "data/train/3").iterdir()))
        yield Place(made, names)


@cache
def may_mount() -> bool:
    """Whether this user may have mounts of its own and become another."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    return os.geteuid() == 0 and tried.returncode == 0


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in QUICK)) for one in VARIANTS]
)
def test_each_surrounding_works_or_is_named_in_one_line(name: str, place: Place) -> None:
    variant, project = VARIANTS[name], place.repo.project
    if (variant.read_only or variant.user) and not may_mount():
        pytest.skip("this user may not mount")

    def contents() -> Any:
        """What must never be lost: photos' names, their version, parameters."""
        photos = sorted(str(path) for path in project.data.rglob("*"))
        return photos, project.data_file.read_bytes(), project.params.read_bytes()

    before = contents()
    done = place.run(variant, "handsigns", *variant.words)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert done.returncode == bool(variant.says), said
    if variant.says:
        # A failed retrain tells why in its summary.
        (line,) = re.findall(r"(?m)^ *why .*", done.stdout) or done.stderr.splitlines()
        assert re.search(variant.says, line), line
    assert contents() == before


@pytest.mark.slow
def test_a_processor_quota_counts_like_cores(place: Place) -> None:
    if not (may_mount() and os.access(QUOTA / "cpu.cfs_quota_us", os.W_OK)):
        pytest.skip("this user may not set a quota here")
    group = QUOTA / f"handsigns-{os.getpid()}"
    group.mkdir()
    (group / "cpu.cfs_quota_us").write_text("50000")
    # As in a container, whose own group is the root of what it sees.
    variant = Variant(shell=f"echo $$ > {group}/cgroup.procs && mount --bind {group} {QUOTA}")
    code = "from tasks.releases.provenance import environment; print(environment()['cores'])"
    try:
        assert place.run(variant, "handsigns", *PREDICT).returncode == 0
        assert place.run(variant, "python", "-c", code).stdout == "1\n"
    finally:
        group.rmdir()
