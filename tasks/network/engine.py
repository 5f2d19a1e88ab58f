"""A frozen graph as a fast function of one picture, without TensorFlow.

OpenVINO runs it: 240 images a second of the trunk on two cores, beside 127 of a frozen
TensorFlow graph with oneDNN (best of seven interleaved runs; medians 205 and 86). One
request holds one picture and one core works on one request, so cores never wait for
each other, and a picture's result cannot depend on which ones are worked on beside it.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import ModelError

AHEAD = 4
"""Pictures for each core that `Engine.stream` holds at a time, being worked on or waiting."""

_UnderWay = tuple[Any, NDArray[np.uint8]]
"""A request, and the picture that it reads."""


class Engine:
    """Run a frozen graph on single pictures: one from any thread, or a stream of them.

    Args:
        graph: file of `tasks.network.frozen.frozen_graph`.
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
