"""Mixed precision: large products of bfloat16 numbers while the tail learns.

Micikevicius et al., Mixed Precision Training, 2018. Both factors are rounded to
bfloat16, which has float32's range and 8 of its 24 significant bits, and the result
once more. Weights, their updates, everything between the products, validation
and the released model stay float32.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

MIXED = "mixed_bfloat16"
FULL = "float32"

Product = Callable[[Any, Any], Any]
"""Multiplies two float32 matrices."""

_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


def usable_precision(wanted: str, processors: Path = Path("/proc/cpuinfo")) -> str:
    """Say which precision this machine trains in.

    Where the processor has no instructions for bfloat16, or oneDNN, which uses them,
    is off, TensorFlow emulates them. The tail's products then took 1.1 times (oneDNN
    off) to 2.8 times (AVX-512 alone) as long as those of float32.

    Args:
        wanted: `training.precision` of params.yaml.
        processors: what Linux says of the processors; missing on other systems.

    Returns:
        `wanted`, or `FULL` in place of an emulated `MIXED`.
    """
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0" or not processors.is_file():
        return FULL
    lines = processors.read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return FULL if _INSTRUCTIONS.isdisjoint(flags.split()) else wanted


def product_in(precision: str) -> Product:
    """Choose how the large matrices are multiplied while the tail learns."""
    exact: Product = tf.matmul
    return _mixed_product if precision == MIXED else exact


def _product_and_gradient(left: Any, right: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """Both factors are rounded once for this product and the two of its gradient."""
    rounded_left, rounded_right = (tf.cast(factor, tf.bfloat16) for factor in (left, right))

    def gradient(upstream: Any) -> tuple[Any, Any]:
        rounded = tf.cast(upstream, tf.bfloat16)
        return (
            _full(tf.matmul(rounded, rounded_right, transpose_b=True)),
            _full(tf.matmul(rounded_left, rounded, transpose_a=True)),
        )

    return _full(tf.matmul(rounded_left, rounded_right)), gradient


_mixed_product: Product = tf.custom_gradient(_product_and_gradient)


def _full(values: Any) -> Any:
    return tf.cast(values, tf.float32)
