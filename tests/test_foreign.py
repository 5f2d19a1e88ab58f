"""Model files made to do harm: each is refused, in one line, and nothing in it is run."""

import json
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from tasks.errors import ModelError
from tasks.model.inference import load_classifier
from tasks.model.untrusted import CONFIG, MAX_FILE, WEIGHTS, examined
from tests.fixtures.checkouts import BIN, make_checkout
from tests.fixtures.models import SIZE

GIGABYTE = 1 << 20
"""In the unit of `ru_maxrss`."""
MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""
"""Runs a program and prints the most memory that it, or one that it started, had."""


@pytest.fixture(scope="module")
def built() -> Any:
    from tasks.model.network import build_model

    return build_model(size=SIZE, seed=3)


@pytest.fixture(scope="module")
def good(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound .keras file, as the assemble stage writes it."""
    from tasks.assemble import save_model

    path = tmp_path_factory.mktemp("good") / "model.keras"
    save_model(built, path)
    return path


@pytest.fixture(scope="module")
def graph(built: Any) -> bytes:
    from tasks.model.export import frozen_graph

    return frozen_graph(built)


class Bait:
    """Writes altered copies of a sound file, and a file that must never appear."""

    def __init__(self, good: Path, folder: Path) -> None:
        self.folder = folder
        self.sprung = folder / "sprung"
        with zipfile.ZipFile(good) as archive:
            self.config = json.loads(archive.read(CONFIG))
            self.weights = archive.read(WEIGHTS)

    def write(
        self, config: Any = None, weights: bytes | None = None, packed: int = zipfile.ZIP_STORED
    ) -> Path:
        path = self.folder / "bad.keras"
        with zipfile.ZipFile(path, "w", packed) as archive:
            archive.writestr(CONFIG, json.dumps(config or self.config))
            archive.writestr(WEIGHTS, self.weights if weights is None else weights)
        return path

    def with_weights(self, change: Callable[[h5py.File], None]) -> Path:
        content = BytesIO(self.weights)
        with h5py.File(content, "r+") as file:
            change(file)
        return self.write(weights=content.getvalue())

    def with_layer(self, **layer: Any) -> Path:
        config = json.loads(json.dumps(self.config))
        config["config"]["layers"].append({"name": "bad", "config": {}, **layer})
        return self.write(config)


@pytest.fixture
def bait(good: Path, tmp_path: Path) -> Bait:
    return Bait(good, tmp_path)


def _lambda(bait: Bait) -> tuple[Path, str]:
    import keras

    sprung = str(bait.sprung)
    layer = keras.layers.Lambda(lambda x: (open(sprung, "w").close(), x)[1])  # noqa: PTH123
    bad = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    return bait.with_layer(**bad), "code of its own"


def _foreign_module(bait: Bait) -> tuple[Path, str]:
    (bait.folder / "harmful.py").write_text(f"open({str(bait.sprung)!r}, 'w')\nclass Layer: pass")
    return bait.with_layer(module="harmful", class_name="Layer"), "not Keras's .harmful: Layer"


def _registered(bait: Bait) -> tuple[Path, str]:
    bad = {"module": "keras.layers", "class_name": "Dense", "registered_name": "harmful>Layer"}
    return bait.with_layer(**bad), "not Keras's .harmful>Layer"


def _pickled(bait: Bait) -> tuple[Path, str]:
    path = bait.folder / "bad.keras"
    path.write_bytes(f"cposix\nsystem\n(S'touch {bait.sprung}'\ntR.".encode())
    return path, "is damaged"


def _linked_out(bait: Bait) -> tuple[Path, str]:
    def change(file: h5py.File) -> None:
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = h5py.ExternalLink("/etc/passwd", "/")

    return bait.with_weights(change), "a link that may lead out"


def _linked_within(bait: Bait) -> tuple[Path, str]:
    return bait.with_weights(
        lambda file: file.__setitem__("layers/again", h5py.SoftLink("/layers"))
    ), "a link that may lead out"


def _hung_on_itself(bait: Bait) -> tuple[Path, str]:
    def change(file: h5py.File) -> None:
        file["layers/again"] = file["layers"]

    return bait.with_weights(change), "too deep|more than 2000"


def _kept_elsewhere(bait: Bait) -> tuple[Path, str]:
    def change(file: h5py.File) -> None:
        file.create_dataset("layers/x", (8,), "f4", external=[("/etc/passwd", 0, 32)])

    return bait.with_weights(change), "in another file"


def _bomb(bait: Bait) -> tuple[Path, str]:
    return bait.write(weights=bytes(300 << 20), packed=zipfile.ZIP_DEFLATED), "more than 64 MiB"


def _inner_bomb(bait: Bait) -> tuple[Path, str]:
    def change(file: h5py.File) -> None:
        file.create_dataset("layers/x", (1 << 40,), "f4", chunks=(1 << 20,), compression="gzip")

    return bait.with_weights(change), "holds too much"


def _truncated(bait: Bait) -> tuple[Path, str]:
    path = bait.write()
    path.write_bytes(path.read_bytes()[: 8 << 20])
    return path, "is damaged"


def _torn_inside(bait: Bait) -> tuple[Path, str]:
    return bait.write(weights=bait.weights[: 8 << 20]), "is damaged"


def _not_numbers(bait: Bait) -> tuple[Path, str]:
    return bait.with_weights(
        lambda file: (
            file.__setitem__("layers/dense/vars/0", np.array([b"text"]))
            if file.__delitem__("layers/dense/vars/0") is None
            else None
        )
    ), "not numbers"


def _nan(bait: Bait) -> tuple[Path, str]:
    def change(file: h5py.File) -> None:
        file["layers/dense/vars/1"][2] = np.nan

    return bait.with_weights(change), "not finite"


def _wrong_shape(bait: Bait) -> tuple[Path, str]:
    def change(file: h5py.File) -> None:
        del file["layers/dense/vars/1"]
        file["layers/dense/vars/1"] = np.zeros(7, "f4")

    return bait.with_weights(change), "architecture's weights"


def _too_few(bait: Bait) -> tuple[Path, str]:
    def change(file: h5py.File) -> None:
        del file["layers/dense"]

    return bait.with_weights(change), "architecture's weights"


def _huge(bait: Bait) -> tuple[Path, str]:
    path = bait.folder / "bad.keras"
    with path.open("wb") as file:
        file.truncate(MAX_FILE + 1)
    return path, "larger than 256 MiB"


HARMFUL = (
    _lambda, _foreign_module, _registered, _pickled, _linked_out, _linked_within, _hung_on_itself,
    _kept_elsewhere, _bomb, _inner_bomb, _truncated, _torn_inside, _not_numbers, _nan,
    _wrong_shape, _too_few, _huge,
)  # fmt: skip


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_harmful_keras_file_is_refused_and_nothing_in_it_is_run(
    bait: Bait, harm: Callable[[Bait], tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, words = harm(bait)
    monkeypatch.chdir(bait.folder)  # where a module beside the file would be found
    with pytest.raises(ModelError, match=words) as caught:
        load_classifier(path, detail=32, size=SIZE)
    assert f"Received: '{path}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not bait.sprung.exists()


def test_the_bait_is_live(bait: Bait) -> None:
    """What is refused above would have been run by Keras, asked to trust the file."""
    import keras

    sprung = str(bait.sprung)
    photo = keras.Input((2,))
    out = keras.layers.Lambda(lambda x: (open(sprung, "w").close(), x)[1])(photo)  # noqa: PTH123
    keras.Model(photo, out).save(bait.folder / "live.keras")
    bait.sprung.unlink()
    keras.models.load_model(bait.folder / "live.keras", safe_mode=False)(np.zeros((1, 2)))
    assert bait.sprung.exists()
    bait.sprung.unlink()
    with pytest.raises(ModelError, match="code of its own"):
        load_classifier(bait.folder / "live.keras", detail=32, size=SIZE)
    assert not bait.sprung.exists()


def test_a_sound_file_gives_what_it_gave_before(good: Path, graph: bytes, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    (tmp_path / "model.pb").write_bytes(graph)
    graph_itself = load_classifier(tmp_path / "model.pb", SIZE, SIZE, vouched=True)
    expected = graph_itself.probabilities(images)
    for path in (good, tmp_path / "model.pb"):
        found = load_classifier(path, SIZE, SIZE).probabilities(images)
        assert np.abs(found - expected).max() < 1e-5
    assert np.ptp(expected, axis=0).max() > 0


def _with_op(graph: bytes, sprung: Path) -> bytes:
    """The network, whose output also goes through an operation that writes a file."""
    from tensorflow.core.framework.graph_pb2 import GraphDef

    parsed = GraphDef.FromString(graph)
    name = parsed.node.add(name="name", op="Const")
    name.attr["dtype"].type = 7
    name.attr["value"].tensor.dtype = 7
    name.attr["value"].tensor.string_val.append(str(sprung).encode())
    parsed.node.add(name="harm", op="WriteFile", input=["name", "name"])
    parsed.node.add(name="more_harm", op="PyFunc", input=[parsed.node[-3].name])
    return bytes(parsed.SerializeToString())


def _with_shape(graph: bytes, side: int) -> bytes:
    """The network with one constant of `side` times `side` numbers, told in four bytes."""
    from tensorflow.core.framework.graph_pb2 import GraphDef

    parsed = GraphDef.FromString(graph)
    kernel = next(
        node
        for node in parsed.node
        if node.op == "Const" and len(node.attr["value"].tensor.tensor_shape.dim) == 2
    )
    tensor = kernel.attr["value"].tensor
    tensor.tensor_content = b""
    tensor.float_val.append(0.5)
    tensor.tensor_shape.dim[1].size = side
    tensor.tensor_shape.dim[0].size = side
    return bytes(parsed.SerializeToString())


def _with_nan(graph: bytes) -> bytes:
    from tensorflow.core.framework.graph_pb2 import GraphDef

    parsed = GraphDef.FromString(graph)
    bias = next(
        node
        for node in parsed.node
        if node.op == "Const" and len(node.attr["value"].tensor.tensor_content) == 24
    )
    bias.attr["value"].tensor.tensor_content = np.full(6, np.nan, "f4").tobytes()
    return bytes(parsed.SerializeToString())


def test_a_harmful_graph_is_refused_within_its_memory(graph: bytes, tmp_path: Path) -> None:
    path, sprung = tmp_path / "bad.pb", tmp_path / "sprung"
    cases = {
        "operation": (_with_op(graph, sprung), "."),
        "huge": (_with_shape(graph, 1 << 20), "."),
        "nan": (_with_nan(graph), "not finite"),
        "half": (graph[: len(graph) // 2], "."),
    }
    for content, words in cases.values():
        path.write_bytes(content)
        with pytest.raises(ModelError, match=words) as caught, examined(path, SIZE):
            pass
        assert f"Received: '{path}'" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not sprung.exists()


def test_predict_refuses_in_one_line_and_takes_little_memory(bait: Bait, tmp_path: Path) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    Image.new("RGB", (30, 30)).save(tmp_path / "photo.png")
    path, words = _lambda(bait)
    command = (BIN / "handsigns", "predict", tmp_path / "photo.png", "--model", path, "--json")
    done = workshop.run("python", "-c", MEASURED, *command, code=1)
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not bait.sprung.exists()
    assert 0 < int(done.stdout) < 2 * GIGABYTE
