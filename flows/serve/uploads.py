"""Read the photos of a request from a form, from JSON or from the bare body."""

import asyncio
import base64
from typing import Annotated, Any

from fastapi import HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

BODY_SECONDS = 30.0
MAX_PHOTOS = 16
"""In one request."""


class JsonPhotos(BaseModel):
    """A photo, or a list of photos, in base64 or as data URLs."""

    model_config = ConfigDict(extra="forbid")

    image: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PHOTOS)]


_PHOTO = {"type": "string", "format": "binary"}
_PHOTOS = {"type": "array", "items": _PHOTO, "maxItems": MAX_PHOTOS}
_FORM = {"type": "object", "required": ["file"], "properties": {"file": _PHOTOS}}
_CONTENT: dict[str, Any] = {
    "multipart/form-data": {"schema": _FORM},
    "application/json": {"schema": JsonPhotos.model_json_schema()},
    "image/*": {"schema": _PHOTO},
}
BODY = {"requestBody": {"required": True, "content": _CONTENT}}
"""The forms of a request, as OpenAPI puts them."""


async def read_upload(request: Request) -> bytes | list[bytes]:
    """Read a photo, or several, from a form, from JSON or from the bare body.

    Raises:
        HTTPException: 400, 408, 413, 415 or 422, with the reason.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if kind == "multipart/form-data":
                return await _from_form(request)
            if kind == "application/json":
                return _from_json(await request.body())
            if kind.startswith("image/"):
                return await request.body()
    except TimeoutError:
        raise HTTPException(408, f"The request took longer than {BODY_SECONDS:.0f} s.") from None
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


def _from_json(body: bytes) -> bytes | list[bytes]:
    try:
        # Refused before parsing: a million elements would be a million validation errors.
        if body.count(b",") > 2 * MAX_PHOTOS:
            raise ValueError
        image = JsonPhotos.model_validate_json(body).image
        return _decode(image) if isinstance(image, str) else [_decode(one) for one in image]
    except ValueError:
        reason = (
            'The JSON must be {"image": "…"} with base64, or a list of '
            f"{MAX_PHOTOS} or fewer, and nothing else."
        )
        raise HTTPException(422, reason) from None


def _decode(image: str) -> bytes:
    """Decode base64, or a data URL of it."""
    return base64.b64decode(image.rpartition(";base64,")[2], validate=True)
