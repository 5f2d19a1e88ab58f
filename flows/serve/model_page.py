"""The page about the model that answers: its model card, and the quality of all champions."""

import html
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import APIRouter, HTTPException
from fastapi.responses import HTMLResponse, Response

from flows.serve.follower import LoadedModel, ModelSource
from tasks.releases.champion import Move, draw_quality

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
<img src="model/quality.png" alt="Accuracy, loss and calibration error by version">
"""


def model_routes(source: ModelSource) -> APIRouter:
    """Routes `/model` and `/model/quality.png`."""
    router = APIRouter(include_in_schema=False)
    drawn: dict[int, bytes] = {}  # by the number of moves, which only grows

    @router.get("/model", response_class=HTMLResponse)
    def page() -> str:
        model, folder = _champion(source)
        card = folder / "model_card.md"
        text = _rendered(card.read_text("utf-8")) if card.is_file() else ""
        return PAGE.format(description=html.escape(model.description), card=text + QUALITY)

    @router.get("/model/quality.png", response_class=Response)
    def picture() -> Response:
        moves = _champion(source)[0].moves
        if len(moves) not in drawn:
            drawn[len(moves)] = _quality(moves)
        return Response(drawn[len(moves)], media_type="image/png")

    return router


def _champion(source: ModelSource) -> tuple[LoadedModel, Path]:
    model = source.model
    if model is None or model.folder is None:
        other = model.description if model else source.waiting
        raise HTTPException(404, f"No champion answers: {other}")
    return model, model.folder


def _rendered(markdown: str) -> str:
    from markdown_it import MarkdownIt

    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown))


def _quality(moves: tuple[Move, ...]) -> bytes:
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "quality.png"
        draw_quality(moves, picture)
        return picture.read_bytes()
