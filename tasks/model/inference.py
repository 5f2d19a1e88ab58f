"""Load a model and classify photos, without TensorFlow."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

from tasks.data.images import MAX_BYTES, Read, decode, in_threads, printable, read_file, resize
from tasks.errors import ImageError, ModelError
from tasks.model.augment import enlarge
from tasks.params import INPUT_SIZE, PreprocessParams
from tasks.stage import Progress, silent

QUEUE = 4  # pictures for each core that `Engine.stream` holds at a time
ADVICE = "Name a .pb file that the assemble stage wrote, or a release."
MAX_SIDE = 2048  # of the photos that a model file takes
CERTAIN_ABOVE = 0.6  # of releases that were made before `evaluate` chose it


class Engine:
    """Run a graph with OpenVINO, or with `embeddings` up to its head; safe to use from threads."""

    def __init__(self, graph: Path, cores: int | None = None, embeddings: bool = False) -> None:
        import openvino as ov

        self.cores = cores or joblib.cpu_count()  # within a container's quota
        core = ov.Core()
        try:
            # Not `openvino.convert_model`, which sends telemetry.
            model = core.read_model(graph)
            if embeddings:
                dense = [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"][-1]
                model = ov.Model([dense.input_value(0)], model.get_parameters())
            self.size = model.input().partial_shape[1].get_length()
            if self.size > MAX_SIDE:
                raise RuntimeError(f"its photos have {self.size} pixels a side")
            model.reshape([1, self.size, self.size, 3])
            # The default is bfloat16 where the processor has it: other results.
            config = {
                "INFERENCE_PRECISION_HINT": "f32",
                "NUM_STREAMS": str(self.cores),
                "INFERENCE_NUM_THREADS": self.cores,
            }
            self._compiled = core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].rstrip(".")
            fault = f"'{graph}' does not hold a graph for photos ({reason}). {ADVICE}"
            raise ModelError(fault) from error
        self._idle: deque[Any] = deque()
        # OpenVINO's binding initializes itself in a process's first call and releases the
        # GIL meanwhile: two concurrent first calls would deadlock.
        self.shape = next(self.stream([np.zeros((self.size, self.size, 3), np.uint8)])).shape

    def stream(self, pictures: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        """Compute results in order on all cores, while this thread makes the next pictures.

        A picture is uint8 (size, size, 3), RGB.
        """
        running: deque[tuple[Any, NDArray[np.uint8]]] = deque()
        try:
            for picture in pictures:
                if len(running) == QUEUE * self.cores:
                    yield self._finish(*running.popleft())
                try:
                    request = self._idle.pop()
                except IndexError:
                    request = self._compiled.create_infer_request()
                running.append((request, picture[np.newaxis]))
                request.start_async({0: running[-1][1]}, share_inputs=True)
            while running:
                yield self._finish(*running.popleft())
        finally:
            for request, _ in running:
                request.wait()

    def _finish(self, request: Any, _read: NDArray[np.uint8]) -> NDArray[np.float32]:
        request.wait()  # it reads the picture's memory until then
        result: NDArray[np.float32] = request.get_output_tensor().data[0].copy()
        self._idle.append(request)
        return result


@dataclass(frozen=True)
class Prediction:
    """Probabilities for one file, in the order of `labels`, or why there are none."""

    path: Path
    probabilities: tuple[float, ...] | None = None
    error: str | None = None
    certain: bool = True
    labels: tuple[str, ...] = ()

    @property
    def label(self) -> str | None:
        if self.probabilities is None:
            return None
        return self.labels[int(np.argmax(self.probabilities))]

    def to_json(self) -> dict[str, Any]:
        file = printable(str(self.path))
        if self.probabilities is None:
            return {"file": file, "error": self.error}
        shares = (round(value, 6) for value in self.probabilities)
        probabilities = dict(zip(self.labels, shares, strict=True))
        found = {"label": self.label, "certain": self.certain, "probabilities": probabilities}
        return {"file": file, **found}


@dataclass(frozen=True)
class Classifier:
    forward: Callable[[Iterable[NDArray[np.uint8]]], Iterable[NDArray[np.float32]]]
    """uint8 (size, size, 3), RGB, to float32 (labels,), for each picture"""
    preprocess: PreprocessParams
    labels: tuple[str, ...]
    size: int = INPUT_SIZE
    certain_above: float = CERTAIN_ABOVE  # below it a photo may show no clear hand

    def prediction(self, path: Path, row: Sequence[float]) -> Prediction:
        certain = max(row) >= self.certain_above
        return Prediction(path, tuple(row), certain=certain, labels=self.labels)

    def probabilities(
        self, images: NDArray[np.uint8], progress: Progress = silent
    ) -> NDArray[np.float32]:
        """Score photos as the dataset stores them; uint8 (n, d, d, 3) -> float32 (n, labels)."""
        result = np.empty((len(images), len(self.labels)), np.float32)
        pictures = (enlarge(image[np.newaxis], self.size)[0] for image in images)
        for number, row in enumerate(self.forward(pictures)):
            result[number] = row
            progress("score photos", number + 1, len(images))
        if not np.isfinite(result).all():
            raise ModelError("The model's probabilities are not finite. Use another model.")
        return result


def load_classifier(
    path: Path, preprocess: PreprocessParams, labels: Sequence[str], size: int = INPUT_SIZE
) -> Classifier:
    """Load a model file, of which OpenVINO runs no code but its own operations."""
    engine = Engine(path)
    if (engine.size, engine.shape) != (size, (len(labels),)):
        raise ModelError(
            f"'{path}' gives {engine.shape} for photos of {engine.size} pixels, not "
            f"{len(labels)} probabilities for photos of {size}. {ADVICE}"
        )
    return Classifier(engine.stream, preprocess, tuple(labels), size)


def classify_files(
    classifier: Classifier, paths: Sequence[Path], progress: Progress = silent
) -> list[Prediction]:
    """Classify image files; an unusable one gets an error."""
    sources = [(path, partial(read_file, path.resolve())) for path in paths]
    return classify(classifier, sources, progress)


def classify(
    classifier: Classifier, sources: Sequence[tuple[Path, Read]], progress: Progress = silent
) -> list[Prediction]:
    def reduced(source: tuple[Path, Read]) -> NDArray[np.uint8] | str:
        path, read = source
        try:
            return resize(decode(read(MAX_BYTES + 1), path.name), classifier.preprocess)
        except ImageError as error:
            return error.reason

    results = [*in_threads(reduced, sources, progress, "read photos")]
    images = [result for result in results if not isinstance(result, str)]
    rows = iter(classifier.probabilities(np.stack(images), progress).tolist() if images else [])
    return [
        Prediction(path, error=result)
        if isinstance(result, str)
        else classifier.prediction(path, next(rows))
        for (path, _), result in zip(sources, results, strict=True)
    ]
