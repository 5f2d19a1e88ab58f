"""Load a model and read signs, without TensorFlow."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.images import MAX_BYTES, Read, decode, printable, resize
from tasks.errors import DataError, ImageError, ModelError
from tasks.model.augment import INPUT_SIZE, enlarge
from tasks.model.untrusted import examined
from tasks.params import LABELS
from tasks.stage import Progress, silent

AHEAD = 4
"""Pictures for each core that `Engine.stream` holds at a time, being worked on or waiting."""

_UnderWay = tuple[Any, NDArray[np.uint8]]
"""A request, and the picture that it reads."""


class Engine:
    """Run a frozen graph on single pictures: one from any thread, or a stream of them.

    Args:
        graph: file of `tasks.model.export.frozen_graph`.
        cores: pictures worked on at a time; None for one per usable core.

    Attributes:
        size: side of a picture in pixels.
        shape: of the result for one picture.

    Raises:
        ModelError: the file is missing or holds no such graph.
    """

    def __init__(self, graph: Path, cores: int | None = None) -> None:
        import openvino as ov

        self.cores = cores or usable_cores()
        core = ov.Core()
        try:
            # The reader inside the runtime; `openvino.convert_model` reports to
            # its maker over the network unless told otherwise on each machine.
            model = core.read_model(graph)
            self.size = model.input().partial_shape[1].get_length()
            model.reshape([1, self.size, self.size, 3])
            self._compiled = core.compile_model(
                model,
                "CPU",
                {
                    # Left alone, bfloat16 is taken where the processor has it: other numbers.
                    "INFERENCE_PRECISION_HINT": "f32",
                    "NUM_STREAMS": str(self.cores),
                    "INFERENCE_NUM_THREADS": self.cores,
                },
            )
        except RuntimeError as error:
            raise ModelError(
                f"Model file does not hold a graph of photos ({_reason(error)}). "
                f"Received: '{graph}'. Name a .pb file that the assemble stage wrote."
            ) from error
        self._free: deque[Any] = deque()
        # OpenVINO's binding sets itself up in the first call of a process and lets
        # go of Python's lock in between: two first calls at once wait for each
        # other for ever. So the first one is made here, alone.
        self.shape = self(np.zeros((self.size, self.size, 3), np.uint8)).shape

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute one picture's result.

        Args:
            picture: uint8, (size, size, 3), RGB in [0, 255].

        Returns:
            float32, what the graph gives for one picture.
        """
        return next(self.stream([picture]))

    def stream(self, pictures: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        """Compute many pictures on all cores, while this thread makes the next ones.

        Threads that each make a picture and wait for its result get in each other's way,
        which costs some hundredths of the time.

        Args:
            pictures: as for one; taken as there is room.

        Yields:
            Each picture's result, in their order.
        """
        under_way: deque[_UnderWay] = deque()
        try:
            for picture in pictures:
                if len(under_way) == AHEAD * self.cores:
                    yield self._finish(under_way.popleft())
                under_way.append(self._start(picture))
            while under_way:
                yield self._finish(under_way.popleft())
        finally:
            for request, _ in under_way:  # it still reads the picture's memory
                request.wait()

    def _start(self, picture: NDArray[np.uint8]) -> _UnderWay:
        try:
            request = self._free.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        batch = picture[np.newaxis]
        request.start_async({0: batch}, share_inputs=True)
        return request, batch

    def _finish(self, under_way: _UnderWay) -> NDArray[np.float32]:
        request, _ = under_way
        request.wait()
        result: NDArray[np.float32] = request.get_output_tensor().data[0].copy()
        self._free.append(request)
        return result


def engine_version() -> str:
    """Name what computes the results; another version may round differently."""
    import openvino as ov

    return f"OpenVINO {ov.__version__}"


def usable_cores() -> int:
    """Count the cores this process may use, which a container can have narrowed."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _reason(error: RuntimeError) -> str:
    """The last line of OpenVINO's message; those before it are places in its source."""
    return str(error).strip().splitlines()[-1].rstrip(".")


BATCH = 32

Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Prediction:
    """What a model reads from one file, or why it reads nothing.

    Args:
        path: the file.
        probabilities: six, in the order of `LABELS`; None when `error` is set.
        error: why the file is not a usable photo.
    """

    path: Path
    probabilities: tuple[float, ...] | None = None
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The most probable sign."""
        if self.probabilities is None:
            return None
        return LABELS[int(np.argmax(self.probabilities))]

    def to_json(self) -> dict[str, Any]:
        """Plain values: file, label and probability by label, or file and error."""
        if self.probabilities is None:
            return {"file": printable(str(self.path)), "error": self.error}
        shares = (round(value, 6) for value in self.probabilities)
        return {
            "file": printable(str(self.path)),
            "label": self.label,
            "probabilities": dict(zip(LABELS, shares, strict=True)),
        }


@dataclass(frozen=True)
class Classifier:
    """A model, and the size photos are reduced to before it sees them.

    Args:
        forward: uint8 (n, size, size, 3), RGB in [0, 255] -> float32 (n, 6).
        detail: side in pixels that the model's training photos were reduced to.
        size: side of the model's input in pixels.
    """

    forward: Forward
    detail: int
    size: int = INPUT_SIZE

    def probabilities(
        self, images: NDArray[np.uint8], progress: Progress = silent
    ) -> NDArray[np.float32]:
        """Score photos that are already cut and reduced, as the dataset holds them.

        Args:
            images: uint8, (n, d, d, 3), RGB in [0, 255].
            progress: told after each batch.

        Returns:
            float32, (n, 6); rows sum to one, column i is `LABELS[i]`.

        Raises:
            DataError: another shape or dtype.
            ModelError: what comes out is no probability.
        """
        if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
            raise DataError(
                f"Images must have shape (n, d, d, 3). Received: {images.shape}. "
                "Shrink the photos to squares first."
            )
        if images.dtype != np.uint8:
            raise DataError(
                f"Images must be uint8 in [0, 255], not scaled. Received: {images.dtype}. "
                "Pass the pixels as they were decoded."
            )
        result = np.empty((len(images), len(LABELS)), np.float32)
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            result[batch] = self.forward(enlarge(images[batch], self.size))
            progress("score photos", min(start + BATCH, len(images)), len(images))
        if not np.isfinite(result).all():
            raise ModelError(
                "A model must answer with probabilities. Received: numbers that are not finite. "
                "Its weights are damaged or too large; use another one."
            )
        return result


def load_classifier(
    path: Path, detail: int, size: int = INPUT_SIZE, *, vouched: bool = False
) -> Classifier:
    """Load a model file.

    Of a `.keras` file only the weights are read, the architecture is ours. A `.pb` file
    is run as it is, and is ready sooner: TensorFlow is not imported for it. Neither can
    bring code; see `tasks.model.untrusted` for what else a file can do.

    Args:
        path: a `.keras` or `.pb` file of the assemble stage or of a release.
        detail: `preprocess.image_size` of the parameters it was trained with.
        size: side of the model's input in pixels.
        vouched: it is of a verified release, or a stage here wrote it; any other file
            is examined first, which takes a second or two.

    Returns:
        The classifier; inference only.

    Raises:
        ModelError: the file is missing, refused, or does not fit the architecture.
    """
    if not vouched:
        with examined(path, size) as safe:
            try:
                return load_classifier(safe, detail, size, vouched=True)
            except ModelError as error:
                raise ModelError(str(error).replace(str(safe), str(path))) from error
    forward = _graph_forward(path, size) if path.suffix == ".pb" else _keras_forward(path, size)
    return Classifier(forward, detail, size)


def _graph_forward(path: Path, size: int) -> Forward:
    engine = Engine(path)
    if (engine.size, engine.shape) != (size, (len(LABELS),)):
        raise ModelError(
            f"A model's graph must give {len(LABELS)} probabilities for a photo of {size} pixels. "
            f"Received: {engine.shape} for {engine.size} pixels from '{path}'. "
            "Name a .pb file that the assemble stage wrote."
        )

    def forward(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.stack(list(engine.stream(photos)))

    return forward


def _keras_forward(path: Path, size: int) -> Forward:
    import tensorflow as tf

    from tasks.model.network import load_model

    model = load_model(path, size=size)
    shape = tf.TensorSpec((None, size, size, 3), tf.uint8)
    traced = tf.function(
        lambda photos: model(tf.cast(photos, tf.float32), training=False), input_signature=[shape]
    )
    return lambda photos: np.asarray(traced(photos))


def classify_files(
    classifier: Classifier, paths: Sequence[Path], progress: Progress = silent
) -> list[Prediction]:
    """Read and score image files that anybody may have made.

    Args:
        classifier: the model.
        paths: files in any format that import takes.
        progress: told for each file read and each batch scored.

    Returns:
        One prediction for each path, in order; a file that cannot be used has
        an error instead of probabilities.
    """
    return classify(classifier, [(path, partial(_read_file, path)) for path in paths], progress)


def classify(
    classifier: Classifier, sources: Sequence[tuple[Path, Read]], progress: Progress = silent
) -> list[Prediction]:
    """Read and score photos, wherever their bytes come from.

    Args:
        classifier: the model.
        sources: what to call each photo, and a function that gives its bytes, at
            most as many as it is asked for, or raises `ImageError`.
        progress: told for each photo read and each batch scored.

    Returns:
        As `classify_files`.
    """

    def reduced(source: tuple[Path, Read]) -> NDArray[np.uint8] | str:
        path, read = source
        try:
            return resize(decode(read(MAX_BYTES + 1), path.name), classifier.detail)
        except ImageError as error:
            return error.reason

    seen: list[NDArray[np.uint8] | str] = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for number, result in enumerate(pool.map(reduced, sources), start=1):
            seen.append(result)
            progress("read photos", number, len(sources))
    images = [result for result in seen if not isinstance(result, str)]
    rows = iter(classifier.probabilities(np.stack(images), progress).tolist() if images else [])
    return [
        Prediction(path, error=result)
        if isinstance(result, str)
        else Prediction(path, tuple(next(rows)))
        for (path, _), result in zip(sources, seen, strict=True)
    ]


def _read_file(path: Path, limit: int) -> bytes:
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ImageError("not a file" if path.exists() else "no such file")
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error
