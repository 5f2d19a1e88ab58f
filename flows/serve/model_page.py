"""The page about the model that answers: its model card, and the quality of all champions."""

import html
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import APIRouter, HTTPException
from fastapi.responses import HTMLResponse, Response

from flows.serve.follower import LoadedModel, ModelSource
from tasks.data.traffic import Traffic, drift_by_limit
from tasks.releases.champion import Move
from tasks.releases.quality import draw_quality, read_quality
from tasks.services.s3 import Storage

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>handsigns: the model</title>
<link rel="icon" href="icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="page.css">
</head>
<body>
<header><p class="name"><a href="./">handsigns</a></p></header>
<main class="model-card">
<p>{description}</p>
{card}
</main>
</body>
</html>
"""
QUALITY = """\
<h2>Quality over time</h2>
<img src="model/quality.png" alt="Accuracy, loss, calibration error, photos and drift by version">
"""
DRAW_SECONDS = 300  # a picture is drawn again after so long, for the drift


def model_routes(source: ModelSource, traffic: Traffic | None) -> APIRouter:
    """Routes `/model` and `/model/quality.png`; drift is read from where traffic is counted."""
    router = APIRouter(include_in_schema=False)
    drawn: dict[tuple[int, int], bytes] = {}

    @router.get("/model", response_class=HTMLResponse)
    def page() -> str:
        model, folder, _ = _champion(source)
        card = folder / "model_card.md"
        text = _rendered(card.read_text("utf-8")) if card.is_file() else ""
        return PAGE.format(description=html.escape(model.description), card=text + QUALITY)

    @router.get("/model/quality.png", response_class=Response)
    def picture() -> Response:
        model, _, storage = _champion(source)
        key = len(model.moves), int(time.time() / DRAW_SECONDS)
        if key not in drawn:
            drawn.clear()
            drawn[key] = _quality(storage, model.moves, traffic)
        return Response(drawn[key], media_type="image/png")

    return router


def _champion(source: ModelSource) -> tuple[LoadedModel, Path, Storage]:
    model, storage = source.model, source.storage
    if model is None or model.folder is None or storage is None:
        other = model.description if model else source.waiting
        raise HTTPException(404, f"No champion answers: {other}")
    return model, model.folder, storage


def _rendered(markdown: str) -> str:
    from markdown_it import MarkdownIt

    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown))


def _quality(storage: Storage, moves: tuple[Move, ...], traffic: Traffic | None) -> bytes:
    def read_drift(release: str) -> dict[str, float]:
        return drift_by_limit(traffic.store, release) if traffic else {}

    with TemporaryDirectory() as folder:
        picture = Path(folder) / "quality.png"
        draw_quality(read_quality(storage, moves, read_drift), picture)
        return picture.read_bytes()
