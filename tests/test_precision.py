"""Large products of bfloat16 numbers."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tasks.training.tail import FULL, MIXED, product_in, usable_precision

HALF_A_STEP = 2.0**-9
"""By which a number rounded to bfloat16 is off at most, as a share of it."""


def product_and_gradient(precision: str) -> list[np.ndarray]:
    """A product of random matrices, and the gradient of its sum of squares."""
    random = np.random.default_rng(0)
    left, right = (
        tf.constant(random.normal(size=size).astype("f4")) for size in [(64, 48), (48, 32)]
    )
    with tf.GradientTape() as tape:
        tape.watch([left, right])
        product = product_in(precision)(left, right)
        total = tf.reduce_sum(product**2)
    return [product.numpy(), *(part.numpy() for part in tape.gradient(total, [left, right]))]


def test_mixed_products_and_gradients_are_exact_but_for_rounding() -> None:
    for mixed, exact in zip(product_and_gradient(MIXED), product_and_gradient(FULL), strict=True):
        assert mixed.dtype == np.float32
        error = np.sqrt(np.mean((mixed - exact) ** 2) / np.mean(exact**2))
        assert 0 < error < 3 * HALF_A_STEP


def test_numbers_that_bfloat16_holds_are_multiplied_exactly() -> None:
    whole = tf.constant(np.arange(12, dtype=np.float32).reshape(3, 4))
    np.testing.assert_array_equal(
        product_in(MIXED)(whole, tf.transpose(whole)), tf.matmul(whole, whole, transpose_b=True)
    )


@pytest.mark.parametrize(
    ("flags", "usable"),
    [
        ("fpu sse2 avx512f avx512_bf16", MIXED),
        ("fpu sse2 avx512f amx_bf16 amx_tile", MIXED),
        ("fpu sse2 avx512f", FULL),
        ("fpu sse2 not_avx512_bf16", FULL),
    ],
)
def test_mixed_precision_is_used_where_the_processor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, usable: str
) -> None:
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    processors = tmp_path / "cpuinfo"
    processors.write_text(f"processor\t: 0\nvendor_id\t: any\nflags\t\t: {flags}\n")
    assert usable_precision(MIXED, processors) == usable
    assert usable_precision(FULL, processors) == FULL


def test_full_precision_is_used_without_onednn_and_where_nothing_is_known_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processors = tmp_path / "cpuinfo"
    assert usable_precision(MIXED, processors) == FULL
    processors.write_text("flags\t\t: avx512_bf16\n")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert usable_precision(MIXED, processors) == FULL
