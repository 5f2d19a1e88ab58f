"""Machines that are not root's, English, writable and alone: each works or is named in a line."""

import http.server
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures.checkouts import Workshop
from tests.fixtures.surroundings import Surroundings, may_mount
from tests.fixtures.trained import Trained

NOBODY = 54321
"""A user id without a name."""
NOWHERE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Place:
    """Where variants run.

    Args:
        checkout: trained, with a champion; each variant leaves it as it was.
        folder: takes what a variant needs besides.
        nonsense: URL of a server that answers every request with a web page.
    """

    checkout: Workshop
    folder: Path
    nonsense: str

    def file(self, name: str, content: bytes | str = "") -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def beside(self, name: str) -> Workshop:
        """A copy of the checkout under another name, without DVC's cache."""
        root = self.checkout.project.root
        kept = shutil.ignore_patterns("cache", "tmp", "prefect", "tests", "benchmarks")
        shutil.copytree(root, self.folder / name, symlinks=True, ignore=kept)
        return Workshop(type(self.checkout.project)(self.folder / name))


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<html><body>It works!</body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815, as the base class names them

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def place(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("surroundings")
    made = trained.checkout(folder / "checkout")
    made.handsigns("import", trained.photos)
    first = made.handsigns("retrain")
    assert first["status"] == "promoted", first["reason"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Place(made, folder, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


Made = Callable[[Place], Surroundings]


@dataclass(frozen=True)
class Variant:
    """One kind of surroundings, and what a command does there.

    Args:
        name: of the test.
        make: makes the surroundings.
        words: the command; `PHOTO` is a photo's path.
        says: pattern that the one line of a refusal contains; empty where it works.
        root: needs the right to mount and to become another user.
    """

    name: str
    make: Made
    words: tuple[str, ...] = ("retrain",)
    says: str = ""
    root: bool = False


def named(**environment: str) -> Made:
    return lambda _: Surroundings(environment)


def unreadable_aws(place: Place) -> Surroundings:
    return Surroundings({"AWS_CONFIG_FILE": place.file("aws", "[default\nregion = ???")})


def foreign_modules(place: Place) -> Surroundings:
    own = Path(place.file("foreign/tasks/__init__.py", "print('not yours')")).parents[1]
    path = f"{place.checkout.project.root}:{own}"
    return Surroundings({"PYTHONPATH": path})


def keras_settings(place: Place) -> Surroundings:
    text = '{"image_data_format": "channels_first", "floatx": "float16", "backend": "jax"}'
    return Surroundings({"KERAS_HOME": str(Path(place.file("keras/keras.json", text)).parent)})


def anothers_checkout(place: Place) -> Surroundings:
    return Surroundings({"HOME": ""}, user=NOBODY)


PREDICT = ("predict", "PHOTO")
STATUS = ("status",)
VARIANTS = [
    # What belongs to services that are not used is ignored.
    Variant("storage of another project", named(MLFLOW_S3_ENDPOINT_URL=NOWHERE), STATUS),
    Variant("AWS profile that is not there", named(AWS_PROFILE="of-another-project"), STATUS),
    Variant("AWS configuration that is none", unreadable_aws, STATUS),
    Variant("AWS bundle that is not there", named(AWS_CA_BUNDLE="/nowhere.pem"), STATUS),
    Variant("proxy that does not answer", named(HTTP_PROXY=NOWHERE, http_proxy=NOWHERE), STATUS),
    Variant("SOCKS proxy", named(ALL_PROXY="socks5://127.0.0.1:9"), STATUS),
    Variant("authorities that are not there", named(SSL_CERT_FILE="/nowhere.pem"), PREDICT),
    Variant("authorities of requests", named(REQUESTS_CA_BUNDLE="/nowhere.pem"), STATUS),
    Variant("another backend of Keras", named(KERAS_BACKEND="torch"), PREDICT),
    Variant("settings of Keras", keras_settings, PREDICT),
    Variant("foreign tasks package behind ours", foreign_modules, PREDICT),
    # Users, homes, languages, places.
    Variant("no HOME", named(HOME=""), PREDICT),
    Variant("a HOME that is not there", named(HOME="/nowhere"), STATUS),
    Variant("plain C locale", named(LC_ALL="C", PYTHONIOENCODING="ascii"), STATUS),
    Variant("a time zone that is none", named(TZ="Nowhere/Land"), PREDICT),
    Variant("no git", named(GIT_DIR="/nowhere"), STATUS),
    Variant(
        "a narrow terminal without features",
        named(TERM="dumb", COLUMNS="20", NO_COLOR="1"),
        STATUS,
    ),
    Variant("a private umask", lambda _: Surroundings(shell="umask 077"), PREDICT),
    Variant("one core", lambda _: Surroundings(shell="taskset -cp 0 $$ >/dev/null"), PREDICT),
    Variant(
        "a folder of the checkout",
        lambda place: Surroundings(folder=place.checkout.project.root / "docs"),
        STATUS,
        r"(dvc\.yaml|params\.yaml|checkout)",
    ),
    # Limits and read-only places.
    Variant(
        "few open files",
        lambda _: Surroundings(shell="ulimit -n 64"),
        PREDICT,
        r"(?i)(open files|ulimit)",
    ),
    Variant(
        "no room in any file",
        lambda _: Surroundings(shell="ulimit -f 0"),
        ("retrain",),
        "File too large",
    ),
    Variant(
        "read-only /tmp",
        lambda _: Surroundings(read_only=(Path("/tmp"), Path("/var/tmp"))),
        PREDICT,
        "/tmp",
        root=True,
    ),
    Variant(
        "read-only /tmp and a TMPDIR",
        lambda place: Surroundings(
            {"TMPDIR": str(place.folder)}, read_only=(Path("/var/tmp"), Path("/usr"))
        ),
        PREDICT,
        root=True,
    ),
    Variant(
        "a read-only checkout",
        lambda place: Surroundings(read_only=(place.checkout.project.root,)),
        PREDICT,
        r"(?i)read-only",
        root=True,
    ),
    Variant(
        "a user without a name", anothers_checkout, PREDICT, r"(?i)permission|may not", root=True
    ),
    # Settings that name the wrong thing.
    Variant(
        "registry in a folder",
        named(MLFLOW_TRACKING_URI="file:///tmp/mlruns"),
        STATUS,
        r"MLFLOW_TRACKING_URI",
    ),
    Variant(
        "storage that answers nonsense",
        lambda place: Surroundings(
            {
                "HANDSIGNS_S3_ENDPOINT_URL": place.nonsense,
                "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "b",
            }
        ),
        STATUS,
        r"127\.0\.0\.1",
    ),
    Variant(
        "registry that answers nonsense",
        lambda place: Surroundings({"MLFLOW_TRACKING_URI": place.nonsense}),
        STATUS,
        r"127\.0\.0\.1",
    ),
    Variant(
        "orchestrator that answers nonsense",
        lambda place: Surroundings({"PREFECT_API_URL": f"{place.nonsense}/api"}),
        ("retrain", "--force"),
        r"127\.0\.0\.1",
    ),
    Variant("a setting that is none", named(HANDSIGNS_BUKET="a"), STATUS, "HANDSIGNS_BUCKET"),
    Variant(
        "a bucket that is none", named(HANDSIGNS_BUCKET="Not A Bucket"), STATUS, "Not A Bucket"
    ),
    Variant("a log level that is none", named(PREFECT_LOGGING_LEVEL="LOUD"), PREDICT),
    Variant(
        "output onto a full disk",
        lambda _: Surroundings(shell="exec >/dev/full"),
        STATUS,
        r"No space left",
    ),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=[one.name for one in VARIANTS])
def test_each_surrounding_works_or_is_named_in_one_line(variant: Variant, place: Place) -> None:
    if variant.root and not may_mount():
        pytest.skip("this user may not mount")
    kept = held(place.checkout)
    photo = next((place.checkout.project.root / "data/train/3").iterdir())
    words = [str(photo) if word == "PHOTO" else word for word in variant.words]
    done = variant.make(place).run(place.checkout, *words)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert done.returncode == bool(variant.says), said
    if variant.says:
        # A failed retrain tells why in its summary.
        lines = done.stderr or "".join(done.stdout.partition("why")[1:])
        (line,) = [line for line in lines.splitlines() if line.strip()]
        assert re.search(variant.says, line), line
    assert held(place.checkout) == kept


def held(checkout: Workshop) -> dict[str, bytes]:
    """What must never be lost: photos' names, their version, what was computed, the registry."""
    project = checkout.project
    photos = sorted(str(path) for path in project.data.rglob("*"))
    names = ("data.dvc", "dvc.lock", "params.yaml")
    return {"photos": "\n".join(photos).encode()} | {
        name: (project.root / name).read_bytes() for name in names
    }
