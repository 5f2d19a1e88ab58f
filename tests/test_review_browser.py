"""People label kept photos in a real browser, on a desktop and on a phone."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tasks.services.s3 import S3Address
from tests.fixtures.browser import DESKTOP, see
from tests.fixtures.captures import Place, comment, picture
from tests.fixtures.photos import photo
from tests.fixtures.screens import text, until
from tests.fixtures.servers import new_bucket
from tests.fixtures.service import Service, named, serving
from tests.fixtures.trained import Trained

pytestmark = pytest.mark.program("chromedriver")

TOKEN = "a token of sixteen or more"
NARROW = (320, 640)


@pytest.fixture(scope="module")
def service(brightness_model: Path, tmp_path_factory: Any) -> Iterator[tuple[Place, Service]]:
    """A service with thirty photos to label, some of which users flagged."""
    place = Place(tmp_path_factory.mktemp("review") / "checkout", brightness_model)
    place.fill(30, flagged=3)
    with place.serve_apart(SERVE_TOKEN=TOKEN) as running:
        yield place, running


@pytest.fixture
def page(browser: Any, service: tuple[Place, Service]) -> Any:
    """The page of somebody who has never been here."""
    see(browser, DESKTOP)
    browser.get_log("browser")
    browser.get(str(service[1].client.base_url.join("/review")))
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.refresh()
    yield browser
    complaints = [line["message"] for line in browser.get_log("browser")]
    assert not [line for line in complaints if "Content Security Policy" in line]


def press(driver: Any, *keys: str) -> None:
    ActionChains(driver).send_keys(*keys).perform()


def begin(driver: Any, name: str) -> None:
    """Say who labels, which the page asks once."""
    until(driver, lambda d: d.find_element(By.ID, "name").is_displayed())
    driver.find_element(By.ID, "name").send_keys(name)
    driver.find_element(By.ID, "token").send_keys(TOKEN, Keys.ENTER)
    until(driver, lambda d: shown(d))


def shown(driver: Any) -> Any:
    """The photo on the screen has arrived and waits for a decision."""
    return driver.execute_script(
        "return document.getElementById('photo').naturalWidth > 0"
        " && !document.querySelector('[aria-current=true]').classList.contains('done')"
    )


def chip(driver: Any, words: str) -> None:
    until(driver, lambda d: text(d, "#chip") == words)


def reviews(place: Place) -> list[tuple[str, str]]:
    """Who put a photo under which label, in the inbox."""
    found = [comment(path)["review"] for path in place.inbox]
    return sorted((review["by"], review["label"]) for review in found)


def test_photos_are_labelled_from_the_keyboard(page: Any, service: tuple[Place, Service]) -> None:
    place, _ = service
    begin(page, "Ana")
    chip(page, "0 of 30 done")
    assert "A user says 5" in text(page, "#facts")
    assert len(page.find_elements(By.CSS_SELECTOR, "#strip li")) == 24
    press(page, Keys.ENTER)  # what the user says
    press(page, "2")
    press(page, "x")
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, "4")
    chip(page, "4 of 30 done")
    until(page, lambda _: reviews(place) == [("Ana", "2"), ("Ana", "4"), ("Ana", "5")])
    press(page, "u")
    chip(page, "3 of 30 done")
    until(page, lambda _: reviews(place) == [("Ana", "2"), ("Ana", "5")])
    page.refresh()  # nothing is asked again, and nothing is lost
    until(page, shown)
    chip(page, "3 of 30 done")
    for done in range(4, 31):  # more than a batch; the next one comes by itself
        until(page, shown)
        press(page, "1")
        chip(page, f"{done} of 30 done")
    until(page, lambda d: not d.find_element(By.ID, "work").is_displayed())
    press(page, "u")
    chip(page, "29 of 30 done")
    until(page, shown)
    press(page, "3")
    chip(page, "30 of 30 done")
    until(page, lambda _: len(place.inbox) == 29)
    labels = [label for _, label in reviews(place)]
    assert {label: labels.count(label) for label in "1235"} == {"1": 26, "2": 1, "3": 1, "5": 1}


def test_it_can_be_used_with_thumbs_and_by_those_who_cannot_see_it(
    page: Any, tmp_path: Path, brightness_model: Path
) -> None:
    place = Place(tmp_path / "checkout", brightness_model)
    first, *_ = place.fill(3)
    with place.serve() as running:
        see(page, NARROW)
        page.get(str(running.client.base_url.join("/review")))
        begin(page, "Ben")
        wide = "return document.documentElement.scrollWidth"
        assert page.execute_script(wide) <= NARROW[0]
        buttons = page.find_elements(By.CSS_SELECTOR, "#work button")
        assert all(button.rect["height"] >= 44 and button.accessible_name for button in buttons)
        facts = page.find_element(By.ID, "facts")
        assert facts.get_attribute("aria-live") == "polite"
        assert "read as 3, 30.0 %" in page.find_element(By.ID, "photo").accessible_name
        page.find_element(By.CSS_SELECTOR, "[data-label='5']").click()
        chip(page, "1 of 3 done")
        assert facts.text.startswith("2 of 3")
        until(page, lambda _: reviews(place) == [("Ben", "5")])
        page.find_element(By.ID, "undo").click()
        chip(page, "0 of 3 done")
        # Somebody else is faster with the photo that is on the screen.
        sent = {"label": "2", "by": "Cleo"}
        assert running.client.post(f"/review/photos/{first}", json=sent).status_code == 200
        page.find_element(By.ID, "discard").click()
        until(page, lambda d: "Cleo labelled it 2 before" in text(d, "#problem"))
        press(page, Keys.TAB)
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        assert page.execute_script(outline) == "solid"
    assert reviews(place) == [("Cleo", "2")]


def test_what_was_read_wrong_is_put_right_with_one_tap(
    page: Any, tmp_path: Path, brightness_model: Path
) -> None:
    place = Place(tmp_path / "checkout", brightness_model)
    (tmp_path / "photo.jpg").write_bytes(picture(1))
    (tmp_path / "other.jpg").write_bytes(picture(2))

    def read(name: str) -> None:
        page.find_element(By.ID, "file").send_keys(str(tmp_path / name))
        until(page, lambda d: d.find_element(By.ID, "wrong").is_displayed())

    with place.serve() as running:
        page.get(str(running.client.base_url))
        until(page, lambda d: "may be kept" in text(d, ".lead"))
        page.find_element(By.ID, "private").click()
        read("other.jpg")
        page.find_element(By.ID, "private").click()
        read("photo.jpg")
        until(page, lambda _: len(place.kept) == 1)
        assert comment(place.kept[0])["suggestion"] is None
        page.find_element(By.ID, "wrong").click()
        offered = [one.text for one in page.find_elements(By.CSS_SELECTOR, "#right button")]
        assert set(offered) >= {"0", "4", "5"}
        page.find_elements(By.CSS_SELECTOR, "#right button")[offered.index("4")].click()
        until(page, lambda d: "A person will look at it" in text(d, "#thanks"))
        (kept,) = place.kept
        assert comment(kept)["suggestion"] == "4"
    with place.serve(CAPTURE="") as running:
        page.get(str(running.client.base_url))
        page.find_element(By.ID, "file").send_keys(str(tmp_path / "photo.jpg"))
        until(page, lambda d: "sign" in text(d, "#words").lower())
        assert "not kept" in text(page, ".lead")
        assert not page.find_element(By.ID, "wrong").is_displayed()
        assert not page.find_element(By.ID, "private").is_displayed()


def night(label: int, seed: int) -> bytes:
    """A photo as the champion has never seen one: dark bars before a bright wall."""
    file = io.BytesIO()
    Image.fromarray(255 - photo(label, seed)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_photos_from_production_make_the_next_champion_better(
    browser: Any, tmp_path: Path, trained: Trained, s3_server: S3Address
) -> None:
    made = trained.checkout(tmp_path / "checkout")
    place = Place(made.project.root, tmp_path)
    (made.project.root / "inbox").mkdir()
    environment = {**named(new_bucket(s3_server)), **place.settings(CAPTURE_SHARE="1")}
    made.handsigns("import", trained.photos, **environment)
    first = made.handsigns("retrain", **environment)
    assert first["status"] == "promoted", first["reason"]

    def right(service: Service) -> int:
        """How many photos that nobody labels are read right."""
        unseen, private = range(1000, 1008), {"Handsigns-No-Capture": "1"}
        answers = {
            (label, seed): service.predict(night(label, seed), headers=private)
            for label in range(6)
            for seed in unseen
        }
        return sum(answers[one].json()["label"] == str(one[0]) for one in answers)

    with serving(made.project.root, **environment) as service:
        before = right(service)
        assert not place.kept
        outcomes = [
            service.client.post(
                f"/feedback?label={label}", files={"file": ("a", night(label, seed))}
            ).json()["outcome"]
            for label in range(6)
            for seed in range(16)
        ]
        count = outcomes.count("kept")
        assert count > 48

        see(browser, DESKTOP)
        browser.get(str(service.client.base_url.join("/review")))
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.refresh()
        begin(browser, "Ana")
        for done in range(1, count + 1):
            until(browser, shown)
            press(browser, Keys.ENTER)
            chip(browser, f"{done} of {count} done")
        until(browser, lambda _: len(place.inbox) == count)

        made.change("phases.full", epochs=10)
        second = made.handsigns("retrain", **environment)
        assert second["status"] == "promoted", second["reason"]
        new = second["model"]["version"]
        until(browser, lambda _: service.health()["model"]["version"] == new)
        after = right(service)
        refused = service.client.delete(f"/review/photos/{place.inbox[0].stem}")
        assert refused.status_code == 409
        assert "imported" in refused.json()["error"]
    assert after > before + 6, (before, after)
    again = made.handsigns("retrain", **environment)
    assert again["status"] == "unchanged"
