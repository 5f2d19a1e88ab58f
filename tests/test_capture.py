"""Photos of predictions that the service keeps, and what people decide on them."""

import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.data.capture import Captures, FolderStore
from tasks.data.importer import import_photos
from tasks.project import Project
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.checkouts import Repo
from tests.fixtures.servers import new_bucket
from tests.fixtures.service import (
    RULES,
    Place,
    Service,
    capture,
    comment,
    named,
    picture,
    point,
    publish_graph,
    serving,
    soon,
)

TOKEN = "a token of sixteen or more"


def outcomes(service: Service) -> dict[str, float]:
    names = ("kept", "duplicate", "full", "dropped", "failed")
    found = {n: service.metric(f'handsigns_capture_total{{outcome="{n}"}}') for n in names}
    return {name: count for name, count in found.items() if count}


def flag(service: Service, photo: bytes, label: str) -> Any:
    return service.client.post(f"/feedback?label={label}", files={"file": ("a", photo)})


def label(service: Service, name: str, label: str | None, by: str = "Ana") -> Any:
    return service.client.post(f"/review/photos/{name}", json={"label": label, "by": by})


def listing(service: Service, by: str = "Ana", **more: Any) -> dict[str, Any]:
    answer = service.client.get("/review/photos", params={"by": by, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def counts(service: Service) -> tuple[int, int, str | None]:
    found = listing(service)
    return found["pending"], found["decided"], found["problem"]


def test_nothing_is_kept_unless_a_place_for_it_is_named(place: Place) -> None:
    with place.serve(CAPTURE="") as service:
        assert service.predict(picture(1)).status_code == 200
        for refused in (flag(service, picture(1), "3"), service.client.get("/review/photos?by=A")):
            assert refused.status_code == 404
            assert "HANDSIGNS_CAPTURE" in refused.json()["error"]
    assert not list(place.root.rglob("*.jp*g"))


def test_uncertain_and_flagged_photos_are_kept_once_without_metadata(place: Place) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    exif.get_ifd(0x8825)[2] = (52.0, 30.0, 0.0)  # where it was taken
    with place.serve() as service:
        assert service.health()["capture"] is True
        assert service.predict(picture(2, level=51)).json()["probabilities"]["1"] > 0.8
        assert service.predict(picture(3), headers={"Handsigns-No-Capture": "1"}).is_success
        answer = service.predict(picture(1, size=(1200, 900), exif=exif, comment=b"mine")).json()
        soon(lambda: outcomes(service) == {"kept": 1})
        (path,) = place.kept
        with Image.open(path) as image:
            assert image.size == (384, 512)
            assert {name for name in image.info if not name.startswith("jfif")} == {"comment"}
        said = comment(path)
        assert datetime.now(UTC) - datetime.fromisoformat(said["time"]) < timedelta(minutes=1)
        assert (said["reason"], said["label"]) == ("uncertain", answer["label"])
        assert said["probabilities"] == answer["probabilities"]

        smaller = picture(1, size=(800, 600), exif=exif)
        service.predict(smaller)
        soon(lambda: outcomes(service) == {"kept": 1, "duplicate": 1})
        # What a user says is not lost because the service was uncertain already.
        for outcome in ("kept", "duplicate"):
            assert flag(service, smaller, "4").json() == {"outcome": outcome}
        assert flag(service, smaller, "seven").status_code == 422
        (path,) = place.kept
        assert (comment(path)["reason"], comment(path)["suggestion"]) == ("flagged", "4")
        for seed, level in ((4, 70), (5, 75)):
            service.predict(picture(seed, level=level))
        soon(lambda: len(place.kept) == 3)
        flagged, *others = listing(service)["photos"]
        assert flagged["suggestion"] == "4"
        shares = [max(one["probabilities"].values()) for one in others]
        assert shares == sorted(shares)


def test_caps_hold_and_what_is_too_old_is_removed(place: Place) -> None:
    captures = Captures(FolderStore(place.root / "kept"), None, Project(place.root), RULES)
    for seed, days in ((1, 29), (2, 31)):
        captures.keep(picture(seed), capture(time=datetime.now(UTC) - timedelta(days=days)))
    (_, young) = names = [path.stem for path in place.kept]
    for name in names:
        captures.decide(name, None, "Ana")
    assert captures.remove_expired(dry_run=True) == 1
    assert len(place.kept) == 2
    for per_day, total, seeds, found in (
        (2, 9, range(3, 7), {"kept": 2, "full": 2}),
        (9, 3, [9], {"full": 1}),
    ):
        limits = {"CAPTURE_PER_DAY": str(per_day), "CAPTURE_TOTAL": str(total)}
        with place.serve(**limits) as service:
            for seed in seeds:
                service.predict(picture(seed))
            soon(lambda: outcomes(service) == found)  # noqa: B023
    assert len(place.kept) == 3
    assert [path.stem for path in (place.root / "kept/decisions").iterdir()] == [young]


def test_no_prediction_fails_or_waits_because_of_it(place: Place) -> None:
    place.root.mkdir()
    (place.root / "kept").write_text("a file where a folder should be")
    with place.serve() as service, ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(service.predict, map(picture, range(60))))
        assert {answer.status_code for answer in answers} == {200}
        soon(lambda: sum(outcomes(service).values()) == 60)
        assert outcomes(service).keys() == {"failed", "dropped"}
        (place.root / "kept").unlink()
        service.predict(picture(99))
        soon(lambda: outcomes(service).get("kept") == 1)
        assert service.log.read_text().count("cannot be kept") == 1


def test_of_two_people_at_once_one_decides_and_the_other_learns_who(place: Place) -> None:
    names = place.fill(12)
    with place.serve(SERVE_TOKEN=TOKEN) as service:
        for answer in (label(service, names[0], "3"), flag(service, picture(1), "3")):
            assert answer.status_code == 401
        service.client.headers["Authorization"] = f"Bearer {TOKEN}"
        # As long as there are enough, two people are given different photos.
        shown = [{one["id"] for one in listing(service, by, limit=6)["photos"]} for by in "ABA"]
        assert shown[0] == shown[2]
        assert not shown[0] & shown[1]

        work = [(name, sign, by) for name in names for sign, by in (("0", "A"), ("1", "B"))]
        random.Random(1).shuffle(work)
        with ThreadPoolExecutor(8) as people:
            answers = list(people.map(lambda one: label(service, *one), work))
        pairs = list(zip(work, answers, strict=True))
        decided = {one[0]: one for one, answer in pairs if answer.status_code == 200}
        assert decided.keys() == set(names)
        for one, answer in pairs:
            name, sign, first = decided[one[0]]
            if one != decided[name]:
                assert answer.status_code == 409
                assert answer.json()["error"] == f"{first} labelled it {sign} before."
        for path in place.inbox:
            review = comment(path)["review"]
            assert (path.stem, review["label"], review["by"]) == decided[path.stem]
            assert path.parent.name == review["label"]
        # A repeated request, whose answer was lost, is no second decision.
        again = [label(service, *one).status_code for one in work]
        assert again == [answer.status_code for answer in answers]
        assert counts(service) == (0, 12, None)
        assert len(place.inbox) == 12


def test_decisions_outlive_a_kill_wait_for_an_inbox_and_can_be_undone(place: Place) -> None:
    one, other, third, discarded = place.fill(4)
    with place.serve(INBOX="") as service:
        assert "HANDSIGNS_INBOX" in label(service, one, "3").json()["problem"]
        assert "HANDSIGNS_INBOX" in str(counts(service))
    (place.root / "inbox").write_text("a file where a folder should be")
    with place.serve() as service:
        assert "wait for the inbox" in label(service, other, "4").json()["problem"]
        service.process.send_signal(signal.SIGKILL)
    (place.root / "inbox").unlink()
    with place.serve() as service:
        for _ in range(2):
            assert counts(service) == (2, 2, None)
            assert {path.stem for path in place.inbox} == {one, other}
        unknown = one.replace("uncertain", "flagged")
        for name, sign, status in (
            (one, "seven", 422),
            (one, "4", 409),
            (unknown, "4", 404),
            (third, "4", 200),
            (discarded, None, 200),
        ):
            assert label(service, name, sign, by="Ben").status_code == status
        for name, status in ((one, 204), (third, 204), (discarded, 204), (one, 404)):
            assert service.client.delete(f"/review/photos/{name}").status_code == status
        assert [path.stem for path in place.inbox] == [other]
        assert counts(service) == (3, 1, None)
        project = Project(place.root)
        assert import_photos(project, place.root / "inbox").imported == {("train", "4"): 1}
        refused = service.client.delete(f"/review/photos/{other}")
        assert refused.status_code == 409
        (stored,) = (project.data / "train/4").iterdir()
        assert stored.name in refused.json()["error"]
    # Whoever looks at the training data can tell who labelled it, and what was read before.
    said = comment(stored)
    assert (said["review"]["by"], said["review"]["label"], said["label"]) == ("Ana", "4", "3")


class Dying(FolderStore):
    """A folder whose user is killed before one of its writes."""

    left = 1000

    def __getattribute__(self, name: str) -> Any:
        if name in ("put", "put_if_absent", "remove"):
            Dying.left -= 1
            if Dying.left < 0:
                raise KeyboardInterrupt
        return super().__getattribute__(name)


@pytest.mark.parametrize("undo", [False, True], ids=["label", "undo"])
def test_a_kill_at_any_write_neither_loses_nor_doubles_a_photo(tmp_path: Path, undo: bool) -> None:
    for writes in range(10):
        root = tmp_path / str(writes)
        stores = [Dying(root / name) for name in ("kept", "inbox")]
        Dying.left = 1000
        captures = Captures(*stores, Project(root), RULES)
        captures.keep(picture(1), capture())
        (name,) = (path.stem for path in root.rglob("*.jpg"))
        if undo:
            captures.decide(name, "3", "Ana")
        Dying.left = writes
        with suppress(KeyboardInterrupt):
            captures.undo(name) if undo else captures.decide(name, "3", "Ana")
        survived, Dying.left = Dying.left >= 0, 1000
        batch = Captures(*stores, Project(root), RULES).batch("Ben", 24)
        inbox = list((root / "inbox").rglob("[!.]*.jpg"))
        assert (batch["pending"], batch["decided"], len(inbox)) in ((1, 0, 0), (0, 1, 1))
        assert not list(root.rglob("unfinished/*"))
        if survived:
            assert batch["pending"] == undo
            return
    pytest.fail("it never ran to its end")


def test_everything_can_live_in_buckets(tmp_path: Path, s3: S3Address, graphs: Any) -> None:
    kept, inbox, root = new_bucket(s3), new_bucket(s3), tmp_path / "checkout"
    release = publish_graph(Storage(s3), tmp_path / "release", graphs[0]).id
    point(Storage(s3), release, 7)
    places = {"CAPTURE": f"s3://{kept.bucket}/hands/", "INBOX": f"s3://{inbox.bucket}"}
    places = {f"HANDSIGNS_{name}": text for name, text in places.items()}
    with serving(root, **named(s3), **places) as service:
        for seed in (1, 2):
            service.predict(picture(seed))
        soon(lambda: outcomes(service) == {"kept": 2})
        shown = listing(service)["photos"]
        assert {(one["version"], one["release"]) for one in shown} == {(7, release)}
        one, other = (photo["id"] for photo in shown)
        image = service.client.get(f"/review/photos/{one}.jpg").content
        assert image == Storage(kept).get(f"hands/photos/{one[:10]}/{one}.jpg")
        assert [label(service, name, "2").status_code for name in (one, other)] == [200, 200]
        assert service.client.delete(f"/review/photos/{other}").status_code == 204
        (accepted,) = Storage(inbox).keys("")
        assert accepted.endswith(f"/2/{one}.jpg")
        assert counts(service) == (1, 1, None)
    refused = Repo(Project(root)).run("handsigns", "serve", "--port", "0", code=1, **places)
    assert "Set HANDSIGNS_S3_ENDPOINT_URL" in refused.stderr
