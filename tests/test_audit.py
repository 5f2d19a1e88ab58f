"""The audit: near-duplicates, what is excluded for them, and what is refused.

The search is exact in small groups, and bounded in large ones.
"""

import shutil
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks import audit
from tasks.audit import REPRESENTATIVES, ImageStats, NearDuplicates, find_near_duplicates
from tasks.data.images import perceptual_hash
from tasks.errors import DataError
from tasks.io import read_json
from tasks.params import AuditParams, Params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.photos import LABELS, photo, write_photos


def hashes(pictures: np.ndarray) -> np.ndarray:
    return np.array([perceptual_hash(np.ascontiguousarray(one)) for one in pictures], np.uint64)


def search(
    pictures: np.ndarray, distance: int = 10, rms: float = 6.0, **given: Any
) -> NearDuplicates:
    """Find near-duplicates, of pictures with given hashes or kinds where a case needs them."""
    kinds = np.array(given.pop("kinds", [0] * len(pictures)))
    own = {"hashes": hashes(pictures), "mirrored": hashes(pictures[:, :, ::-1])}
    limits = AuditParams.model_construct(max_hash_distance=distance, max_rms_difference=rms)
    return find_near_duplicates(ImageStats(pictures, **own | given), kinds, limits)


def noisy(picture: np.ndarray, seed: int, noise: int = 3) -> np.ndarray:
    random = np.random.default_rng(seed)
    changed = picture.astype(int) + random.integers(-noise, noise + 1, picture.shape)
    return np.clip(changed, 0, 255).astype(np.uint8)


def flat(*greys: int) -> np.ndarray:
    return np.array(greys, np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(4, 40), st.booleans())
@settings(max_examples=30, deadline=None)
def test_search_finds_every_pair(seed: int, distance: int, rms: int, symmetric: bool) -> None:
    random = np.random.default_rng(seed)
    base = np.stack([photo(seed % 6, seed) for seed in range(3)])
    if symmetric:
        base[:, :, 32:] = base[:, :, 31::-1]
    turns = [base[random.integers(3), :, :: random.choice([1, -1])] for _ in range(14)]
    pictures = np.stack([noisy(one, n, random.integers(1, 60)) for n, one in enumerate(turns)])
    plain, mirrored = hashes(pictures), hashes(pictures[:, :, ::-1])
    expected: dict[tuple[int, int], float] = {}
    for left, right in combinations(range(14), 2):
        turned = (plain[left] ^ mirrored[right], mirrored[left] ^ plain[right])
        for turn, bits in ((1, [plain[left] ^ plain[right]]), (-1, turned)):
            gap = pictures[left].astype(float) - pictures[right][:, ::turn]
            difference = np.sqrt((gap**2).mean())
            if min(int(one).bit_count() for one in bits) <= distance and difference <= rms:
                known = expected.get((left, right), 255.0)
                expected[left, right] = min(known, difference)
    found = search(pictures, distance, rms)
    assert list(map(tuple, found.pairs.tolist())) == list(expected)
    assert found.rms.tolist() == pytest.approx(list(expected.values()))


def test_limits_are_inclusive_and_pairs_are_found_across_the_blocks_of_a_large_set() -> None:
    hashed, unlike = np.array([0, 7], np.uint64), np.array([-1, -1]).view("u8")
    for grey, distance in product((6, 7), (2, 3)):
        found = search(flat(0, grey), distance, hashes=hashed, mirrored=unlike)
        assert len(found.pairs) == (grey == 6 and distance == 3)
    pictures = np.random.default_rng(3).integers(0, 256, (3000, 4, 4, 3)).astype(np.uint8)
    pictures[2999], pictures[1500] = pictures[17], pictures[5, :, ::-1]
    same = np.zeros(3000, np.uint64)
    found = search(pictures, 0, 2.0, hashes=same, mirrored=same)
    assert found.pairs.tolist() == [[5, 1500], [17, 2999]]
    # The darkest photo of a block is compared with those before it.
    hashed = np.random.default_rng(1).integers(0, 2**63, 258).astype(np.uint64)
    hashed[256] = hashed[7]
    found = search(flat(*[10] * 256, 12, 200), 0, hashes=hashed, mirrored=~hashed)
    assert found.pairs.tolist() == [[7, 256]]


@pytest.mark.parametrize("size", [REPRESENTATIVES, 5 * REPRESENTATIVES])
def test_a_burst_is_one_group_and_its_work_is_bounded(size: int) -> None:
    base = photo(2, 0)
    pictures = np.stack([noisy(base, seed) for seed in range(size)])
    hashed = np.full(size, perceptual_hash(base), np.uint64)
    found = search(pictures, hashes=hashed, mirrored=~hashed)
    assert len(set(found.groups.tolist())) == 1
    assert len(found.pairs) <= size * REPRESENTATIVES
    assert len(set(found.representatives.tolist())) == min(size, REPRESENTATIVES)
    rms = {tuple(pair): rms for pair, rms in zip(found.pairs.tolist(), found.rms, strict=True)}
    for row, other in enumerate(found.representatives.tolist()):
        if row != other:  # the closest of those that were compared
            pairs = [pair for pair in rms if row in pair]
            assert rms[min(row, other), max(row, other)] == min(rms[pair] for pair in pairs)
    # A photo of another kind is compared with all others, or with their representatives.
    found = search(pictures, kinds=[int(row == 7) for row in range(size)])
    close = {row for pair in found.pairs.tolist() if 7 in pair for row in pair}
    assert found.representatives[7] == 7
    assert {*found.representatives.tolist()} <= close


@pytest.fixture
def context(tmp_path: Path, params: Params) -> Context:
    """Six photos of each class in train, no test, nothing alike."""
    project = Project(tmp_path)
    write_photos(project.data / "train", 6)
    alike = AuditParams(max_hash_distance=10, max_rms_difference=6.0)
    return Context(project, params.model_copy(update={"audit": alike}))


def stored(context: Context, photo: str) -> np.ndarray:
    return np.asarray(Image.open(context.project.data / f"{photo}.png"))


def copy(context: Context, source: str, **brighter: int) -> None:
    """Write a photo again, so much brighter, as `train_2_name`; paths are below `data/`."""
    pixels = stored(context, source).astype(int)
    for name, levels in brighter.items():
        path = context.project.data / f"{name.replace('_', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels + levels, 0, 255).astype(np.uint8)).save(path)


def refusal(context: Context) -> str:
    with pytest.raises(DataError) as refused:
        audit.run(context)
    assert not context.project.audit.exists()
    return str(refused.value)


def test_near_duplicates_stay_out_of_the_official_test(context: Context) -> None:
    write_photos(context.project.data / "test", 3, seed=1)
    copy(context, "train/2/0001", train_2_copy=2, train_2_exact=0)
    copy(context, "test/5/0002", train_5_near=3, train_5_chain=7)
    copy(context, "test/0/0000", test_3_odd=2)
    (context.project.data / "train/0/.note").write_text("hidden")
    for number in range(2, 6):  # two are enough where there is a test
        (context.project.data / f"train/4/000{number}.png").unlink()
    audit.run(context)
    report = read_json(context.project.audit)
    assert report["photos"] == 36 - 4 + 18 + 5
    assert report["counts"]["train"] == dict.fromkeys(LABELS, 6) | {"2": 8, "4": 2, "5": 8}
    assert report["counts"]["test"] == dict.fromkeys(LABELS, 3) | {"3": 4}
    assert [f"train/2/{one}.png" for one in ("0001", "copy", "exact")] in report["groups"]
    assert report["duplicates"] == 5
    rms = [pair["rms"] for pair in report["closest"]]
    assert rms[:3] == pytest.approx([0, 2, 2], abs=0.1)
    assert rms == sorted(round(one, 3) for one in rms)
    reason = {"reason": "near-duplicate in the official test", "of": "test/5/0002.png"}
    assert report["excluded"] == [
        {"photo": f"train/5/{name}.png", **reason} for name in ("chain", "near")
    ]
    across, conflicts = ([one["photos"] for one in report[k]] for k in ("across", "conflicts"))
    assert across == [["test/5/0002.png", "train/5/near.png"]]
    # Within the test, a conflict is reported and excludes nothing.
    assert conflicts == [["test/0/0000.png", "test/3/odd.png"]]
    assert report["warnings"] == [
        "1 pairs of near-duplicates have two labels",
        "1 pairs of near-duplicates across train and test",
    ]
    sheet = np.asarray(Image.open(context.project.plots / "audit.png"))
    step, last = audit.COMPARED + audit.GAP, audit.SAMPLES - 1
    assert sheet.shape == (8 * step - audit.GAP, audit.SAMPLES * step - audit.GAP, 3)
    shown = {(0, 0): "test/0/0000", (0, last): "train/0/0005", (5, 0): "test/5/0000"}
    for (row, column), name in (shown | {(7, 0): "test/0/0000", (7, 1): "test/3/odd"}).items():
        tile = sheet[row * step :, column * step :][: audit.COMPARED, : audit.COMPARED]
        assert np.array_equal(tile, stored(context, name))


def test_near_duplicates_with_two_labels_are_excluded(context: Context) -> None:
    copy(context, "train/1/0000", train_1_b=5, train_4_c=10, train_4_d=15)
    # A burst is excluded with the photo that represents it.
    copy(context, "train/2/0001", **{f"train_2_burst{number}": number % 3 for number in range(90)})
    copy(context, "train/2/0001", train_3_wrong=4)
    audit.run(context)
    report = read_json(context.project.audit)
    pair = ["train/1/b.png", "train/4/c.png"]
    assert pair in [one["photos"] for one in report["conflicts"]]
    reason = "near-duplicate with another label"
    for one, other in (pair, pair[::-1]):
        assert {"photo": one, "reason": reason, "of": other} in report["excluded"]
    # What only the conflict joins stays in groups of its own label.
    (burst,) = (group for group in report["groups"] if len(group) > 2)
    assert len(burst) == 91
    assert [group for group in report["groups"] if group != burst] == [
        ["train/1/0000.png", "train/1/b.png"],
        ["train/4/c.png", "train/4/d.png"],
    ]
    assert report["duplicates"] == 3 + 91
    assert len(report["closest"]) == audit.CLOSEST
    excluded = {entry["photo"] for entry in report["excluded"]}
    assert excluded == {*pair, *burst, "train/3/wrong.png"}


@pytest.mark.parametrize("folder", ["train", "test"])
def test_what_cannot_be_trained_on_is_named(context: Context, folder: str) -> None:
    data = context.project.data
    write_photos(data / "test", 2, seed=1)
    for number in range(5):
        copy(context, f"train/0/000{number}", **{f"test_0_{number}": 2})
    assert "have fewer: 0 (1)" in refusal(context)
    for number in range(6):
        copy(context, f"train/1/000{number}", **{f"{folder}_2_odd{number}": 0})
    refused = refusal(context)
    for words in ("two labels: ", "train/1/0003.png", f"{folder}/2/odd3.png", "; and 1 more"):
        assert words in refused
    assert "odd5" not in refused
    shutil.rmtree(data / folder / "4")
    assert f"none in {folder}/4" in refusal(context)
    (data / f"{folder}/3/0001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_photos(data / folder, 1, seed=1)
    assert "3/0001.png" in refusal(context)
    copy(context, "train/1/0000", **{f"{folder}_six_a": 0})
    assert f"'six' in data/{folder} is not a label" in refusal(context)
    shutil.rmtree(data)
    assert "no photos to train on" in refusal(context)
