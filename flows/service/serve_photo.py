"""The photo that a request carries, and what is wrong with it."""

import asyncio
import base64
import binascii
import json
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tasks.errors import ImageError

BODY_SECONDS = 30.0
ACCEPTED = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file"],
            "properties": {"file": {"type": "string", "format": "binary"}},
        }
    },
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["image"],
            "additionalProperties": False,
            "properties": {"image": {"type": "string", "contentEncoding": "base64"}},
        }
    },
}
"""The two forms of a question, as OpenAPI puts it."""


async def photo_of(request: Request) -> bytes:
    """Read the photo from a form or from JSON.

    Raises:
        HTTPException: 400, 408, 413, 415 or 422, with the reason.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    readers = {"multipart/form-data": _from_form, "application/json": _from_json}
    if kind not in readers:
        raise HTTPException(
            415,
            "A photo comes as multipart/form-data in the field 'file', or as application/json "
            f"with its bytes in base64 as 'image'. Received: {kind[:80]!r}.",
        )
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await readers[kind](request)
    except TimeoutError:
        raise HTTPException(408, f"The request took longer than {BODY_SECONDS:.0f} s.") from None


def refusal(error: ImageError) -> HTTPException:
    """Return the answer to a file that is not a usable photo."""
    kind = error.reason.partition(":")[0]
    status = {"not an image": 415, "too large": 413}.get(kind, 422)
    return HTTPException(status, f"This is not a usable photo: {error.reason}.")


async def _from_form(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=4) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise HTTPException(400, "The form has no photo. Put one into its field 'file'.")
        return await file.read()


async def _from_json(request: Request) -> bytes:
    try:
        content: Any = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "The body is not JSON.") from None
    if not isinstance(content, dict) or set(content) != {"image"}:
        raise HTTPException(422, 'The JSON must be {"image": "…"} and nothing else.')
    try:
        return base64.b64decode(content["image"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise HTTPException(422, "The value of 'image' is not base64.") from None
