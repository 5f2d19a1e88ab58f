"""`params.yaml` is refused by the key that is wrong, before anything runs.

Any classes: labels are taken from folders, and every stage follows them.
"""

import colorsys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tasks import synthetic
from tasks.data.images import encode
from tasks.data.importer import import_photos
from tasks.errors import ParamsError
from tasks.params import load_params, replace_labels
from tasks.stage import Context
from tests.fixtures.checkouts import make_checkout
from tests.fixtures.photos import CHECKOUT, with_params

TEXT = CHECKOUT.params.read_text()
DECOMPOSED = unicodedata.normalize("NFD", "ö")


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    assert "params.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CHARACTERS = "labels.2: a label must have no slash or control character, and no dot in front"
LENGTH = "labels.2: a label must have 1 to 200 bytes, no space around"


@pytest.mark.parametrize(
    ("section", "value", "fault"),
    [
        ("phases", {}, "phases must be base, fine_tune, full, in this order"),
        ("gate", {"min_recall": "90 %"}, "gate.min_recall: Input should be a valid number"),
        ("gate", {"min_recall": {0: 90}}, "gate.min_recall.0: Input should be less"),
        ("gate", {"min_recall": {0: 0.9}}, "gate.min_recall: a mapping must name each of the la"),
        ("labels", ["one"], "labels: Tuple should have at least 2 items"),
        ("labels", [0, "1", "2"], "labels.0: Input should be a valid string"),
        ("labels", ["a", "b", "a"], "labels must differ, and a is there twice"),
        *[("labels", ["c", "a", one], CHARACTERS) for one in ("a/b", "..", "b\x07b")],
        *[("labels", ["c", "a", one], LENGTH) for one in ("  ", "b\t", "b" * 201)],
        ("labels", ["c", "a", DECOMPOSED], "labels.2: a label must be in Unicode"),
    ],
)
def test_a_wrong_value_is_one_fault(tmp_path: Path, section: str, value: Any, fault: str) -> None:
    text = yaml.safe_dump({**yaml.safe_load(TEXT), section: value}, sort_keys=False)
    message = refusal(tmp_path / "params.yaml", text)
    assert message.startswith(f"params.yaml has 1 fault(s): {fault}")


@pytest.mark.parametrize(
    ("written", "instead", "phrase"),
    [
        ("max_hash_distance:", "hash_distance:", "A.hash_distance is now called A.max_hash_dis"),
        ("init_from: base", "starts_from: base", "P.starts_from is now called P.init_from"),
        ("dropout:", "weight_decay: 1\n  dropout:", "T.weight_decay no longer exists, remove it"),
        ("dropout:", "droput:", "T.droput is unknown (did you mean dropout?)"),
        ("max_loss:", "maxloss:", "gate.maxloss is unknown (did you mean max_loss?)"),
        ("seed: 20", "# none", "seed is missing"),
        ("init_from: fine_tune", "init_from: base", "phases must be base, fine_tune, full, in"),
        ("epochs: 1\n", "epochs: true\n", "P.epochs: Input should be a valid integer, not True"),
        ("dropout: 0.3", "dropout: no", "T.dropout: Input should be a valid number, not 'no'"),
    ],
)
def test_a_wrong_key_is_one_phrase(tmp_path: Path, written: str, instead: str, phrase: str) -> None:
    for short, section in (("A.", "audit."), ("P.", "phases.fine_tune."), ("T.", "training.")):
        phrase = phrase.replace(short, section)
    message = refusal(tmp_path / "params.yaml", TEXT.replace(written, instead, 1))
    assert f"1 fault(s): {phrase}" in message
    assert message.endswith(". Correct these keys.")


def test_what_is_no_mapping_of_names_is_refused(tmp_path: Path) -> None:
    for text in ("? [a]\n: b", "seed: [", "- seed", "\x00", "seed: 0x_"):
        refusal(tmp_path / "params.yaml", text)
    twice = TEXT.replace("  test: 0.15", "  val: 0.2", 1)
    assert '"val" with value "0.2"' in refusal(tmp_path / "params.yaml", twice)


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        ("10/a 9/b 1/c", ("1", "9", "10")),
        ("train/b/1 train/a/2 valid/c/3 test/a/4 data.yaml", ("a", "b", "c")),
        ("train/1 bus/2 car/3", ("bus", "car", "train")),
        ("train/train/1 train/bus/2 test/train/3", ("bus", "train")),
        ("dog/near/1 dog/far/2 cat/3", ("cat", "dog")),
        (f"{DECOMPOSED}/1 b/2", ("b", "ö")),
    ],
)
def test_labels_are_names_of_folders(tmp_path: Path, paths: str, labels: tuple[str, ...]) -> None:
    project = with_params(tmp_path / "checkout")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number, name in enumerate(paths.split()):
            archive.writestr(name, encode(np.full((40, 40, 3), number * 40, np.uint8)))
    report = import_photos(project, tmp_path / "photos.zip", replace=True, set_labels=True)
    assert report.labels == load_params(project.params).labels == labels
    assert {label for _, label in report.imported} == set(labels)


def test_other_labels_change_nothing_else_of_the_file(tmp_path: Path) -> None:
    before, file = '["0", "1", "2", "3", "4", "5"]', tmp_path / "params.yaml"
    for labels, beside in (
        ('["a #1", "b"]', "  # ours"),
        ('[\n  "0", "1"\n]', ""),
        ("\n- a\n- b", ""),
    ):
        file.write_text(TEXT.replace(before, labels + beside, 1))
        assert replace_labels(file, ["x", "ö"]) == TEXT.replace(before, f'["x", "ö"]{beside}', 1)


def test_hands_need_their_own_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project = with_params(tmp_path / "checkout")
    project.params.write_text(TEXT.replace('labels: ["0",', 'labels: ["zero",'))
    with caplog.at_level("INFO"):
        synthetic.run(Context(project, load_params(project.params)))
    assert "Synthetic hands are off: they show the signs 0 to 5" in caplog.text


TEN, WORDS = tuple(f"kind {n}" for n in range(1, 11)), ("bus", "two words", "ökologisch")


@pytest.mark.slow
@pytest.mark.parametrize("names", [TEN, WORDS])
def test_any_classes_take_three_commands(tmp_path: Path, names: tuple[str, ...]) -> None:
    random, source, each = np.random.default_rng(0), tmp_path / "source", max(10, 120 // len(names))
    for number, name in enumerate(names):  # noisy pictures of one hue
        (source / name).mkdir(parents=True)
        hue = np.array(colorsys.hsv_to_rgb(number / len(names), 0.9, 0.8)) * 255
        for photo in range(each):
            noise = random.normal(hue, 25, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(source / name / f"{photo}.png")
    made = make_checkout(tmp_path / "checkout")
    assert "--replace --set-labels" in made.handsigns("import", source, "--replace", code=1)
    assert made.run("handsigns", "import", source, "--set-labels", code=2)
    found = made.handsigns("import", source, "--replace", "--set-labels")
    assert found["taken"]["train"] == dict.fromkeys(sorted(names), each)
    assert "shows the signs 0 to 5" in made.handsigns("sample", code=1)
    assert made.handsigns("retrain")["status"] == "promoted"
    (read,) = made.handsigns("predict", source / names[1] / "0.png")["predictions"]
    assert read["label"] == names[1]
    assert list(read["probabilities"]) == list(names)
    assert names[-1] in made.run("handsigns", "predict", source / names[1] / "0.png").stdout
    assert made.handsigns("evaluate", source)["accuracy"] > 0.5
