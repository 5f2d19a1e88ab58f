"""A request for predictions: its photos, in three forms, and what is read from them."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import joblib
import numpy as np
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import HTTPException, Request
from prometheus_client import Counter
from pydantic import BaseModel, BeforeValidator, Field
from starlette.datastructures import UploadFile

from flows.serve.follower import LoadedModel, ModelSource
from tasks.data.images import decode, is_large, resize
from tasks.errors import ImageError
from tasks.model.inference import Classifier, Prediction

if TYPE_CHECKING:
    from flows.serve.review import Recorder

BODY_SECONDS = 30.0
MAX_PHOTOS = 16  # in one request
PREDICTIONS = Counter("handsigns_predictions", "Photos read, by label.", ("label",))
IN_FLIGHT = 128  # requests that may be uploaded, queued or scored at once, for their memory


class Model(BaseModel, from_attributes=True):
    """The model that answers."""

    description: str = Field(description="What it is, in words.")
    version: int | None = Field(description="Of a champion: its number in the registry.")
    release: str | None = Field(description="Of a champion: its verified release.")
    promoted_at: str | None = Field(description="When it became champion, ISO 8601.")
    told: str = Field(deprecated=True, description="The description under its old name.")


class Fault(BaseModel):
    """Why a request, or one of several photos, was refused."""

    error: str


class Reading(BaseModel):
    """What was read from a photo."""

    label: str = Field(description="The most probable one.")
    certain: bool = Field(description="False where the photo may show none of them clearly.")
    probabilities: dict[str, float] = Field(description="Of each label; they add up to one.")
    model: Model


class Readings(BaseModel):
    """What was read from several photos, in their order."""

    readings: list[Reading | Fault]


def _decode_base64(image: Any) -> bytes:
    """Decode base64, or a data URL of it."""
    if not isinstance(image, str):
        raise ValueError("not a string")
    return base64.b64decode(image.rpartition(";base64,")[2], validate=True)


Image = Annotated[bytes, BeforeValidator(_decode_base64, str)]


class JsonPhotos(BaseModel, extra="forbid"):
    """A photo, or a list of photos, in base64 or as data URLs."""

    image: Image | Annotated[list[Image], Field(min_length=1, max_length=MAX_PHOTOS)]


_PHOTO = {"type": "string", "format": "binary"}
_PHOTOS = {"type": "array", "items": _PHOTO, "maxItems": MAX_PHOTOS}
_FORM = {"type": "object", "required": ["file"], "properties": {"file": _PHOTOS}}
_CONTENT: dict[str, Any] = {
    "multipart/form-data": {"schema": _FORM},
    "application/json": {"schema": JsonPhotos.model_json_schema()},
    "image/*": {"schema": _PHOTO},
}
BODY = {"requestBody": {"required": True, "content": _CONTENT}}  # as OpenAPI has it


async def read_upload(request: Request) -> bytes | list[bytes]:
    """Read a photo, or several, from a form, from JSON or from the bare body."""
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if kind == "multipart/form-data":
                return await _from_form(request)
            if kind == "application/json":
                body = await request.body()
                # Before parsing: a million elements would be a million validation errors.
                if body.count(b",") > 2 * MAX_PHOTOS:
                    raise ValueError
                return JsonPhotos.model_validate_json(body).image
            if kind.startswith("image/"):
                return await request.body()
    except TimeoutError:
        raise HTTPException(408, f"The request took longer than {BODY_SECONDS:.0f} s.") from None
    except ValueError:
        reason = 'The JSON must be {"image": "…"} with base64, or a list of '
        raise HTTPException(422, f"{reason}{MAX_PHOTOS} or fewer, and nothing else.") from None
    raise HTTPException(
        415,
        f"A photo cannot be sent as {kind[:80]!r}. Send multipart/form-data with the field "
        "'file', application/json with base64 as 'image', or the bytes as image/….",
    )


async def _from_form(request: Request) -> bytes | list[bytes]:
    async with request.form(max_files=MAX_PHOTOS, max_fields=4) as form:
        files = [file for file in form.getlist("file") if isinstance(file, UploadFile)]
        if not files:
            raise HTTPException(400, "The form has no photo. Put one into its field 'file'.")
        photos = [await file.read() for file in files]
    return photos if len(photos) > 1 else photos[0]


class Predictor:
    """Reads photos with the model of `source`, one per core; large ones one after the other."""

    def __init__(self, source: ModelSource, recorder: "Recorder") -> None:
        self.source, self._recorder = source, recorder
        self._cores, self._large = CapacityLimiter(joblib.cpu_count()), CapacityLimiter(1)
        self._in_flight = 0

    async def answer(self, request: Request) -> Reading | Readings:
        """Read one photo or several, and keep those that may be learned from."""
        async with self._place() as model:
            photos, keep = await read_upload(request), self._recorder.may_keep(request)
            if isinstance(photos, bytes):
                return await self._read(photos, model, keep)

            async def read(photo: bytes) -> Reading | Fault:
                try:
                    return await self._read(photo, model, keep)
                except ImageError as error:
                    return Fault(error=unusable(error))

            return Readings(readings=await asyncio.gather(*map(read, photos)))

    async def read_one(self, request: Request) -> tuple[bytes, Reading]:
        """Read one photo; the photo as it came, and what was read."""
        async with self._place() as model:
            photo = await read_upload(request)
            if not isinstance(photo, bytes):
                raise HTTPException(400, "Send one photo at a time.")
            return photo, await self._read(photo, model, keep=False)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[LoadedModel]:
        """Take one of the `IN_FLIGHT` places, or raise 503 with Retry-After."""
        if self.source.model is None:
            raise HTTPException(503, self.source.waiting, {"Retry-After": "10"})
        if self._in_flight >= IN_FLIGHT:
            reason = "Too many photos are waiting. Try again in a second."
            raise HTTPException(503, reason, {"Retry-After": "1"})
        self._in_flight += 1
        try:
            yield self.source.model
        finally:
            self._in_flight -= 1

    async def _read(self, photo: bytes, model: LoadedModel, keep: bool) -> Reading:
        score = partial(_score, model.classifier, photo)

        def score_unless_large() -> Prediction | None:
            return None if is_large(photo) else score()

        found = await run_sync(score_unless_large, limiter=self._cores)
        if found is None:
            found = await run_sync(score, limiter=self._large)
        PREDICTIONS.labels(str(found.label)).inc()
        reading = Reading(**found.to_json(), model=Model.model_validate(model))
        self._recorder.record(photo, reading, keep)
        return reading


def _score(classifier: Classifier, content: bytes) -> Prediction:
    params = classifier.preprocess
    photo = resize(decode(content, min_side=4 * params.image_size), params)
    (row,) = classifier.probabilities(photo[np.newaxis]).tolist()
    return classifier.prediction(Path("photo"), row)


def unusable(error: ImageError) -> str:
    """Why a photo is refused, without the decoder's own words."""
    return f"This is not a usable photo: {error.reason.partition(' (')[0]}."
