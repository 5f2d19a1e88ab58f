"""The verb that serves the model to people and programs."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.terminal import Json, Model, open_layout, tell

if TYPE_CHECKING:
    from flows.service.follower import Fixed, Follower
    from flows.settings import Settings
    from tasks.layout import Layout

app = typer.Typer()


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Serve a page and an interface that read signs; the champion is followed."""
    from flows.settings import load_settings

    layout, settings = open_layout(), load_settings()
    token = settings.serve_token
    from flows.service.serve_socket import listen, run_service

    with listen(host, port, bool(token)) as listening:
        source = _source(layout, settings, model)
        from flows.service.serving import Options, make_app

        options = Options(
            settings.serve_rate,
            settings.serve_max_mb * 2**20,
            token.get_secret_value() if token else None,
        )
        service = make_app(source, options)
        url = listening.url
        told = source.served.told if source.served else None
        line = f"Serving on {url} ({told or 'no model yet'}). Ctrl-C stops it."
        tell(json_, {"url": url, "model": told, "problem": source.problem}, line)
        sys.stdout.flush()
        try:
            run_service(service, listening)
        finally:
            source.stop()


def _source(layout: "Layout", settings: "Settings", model: str) -> "Follower | Fixed":
    from flows.service.follower import Fixed, Follower, Served
    from flows.shared_storage import SharedStorage
    from flows.workspace import Workspace

    workspace = Workspace(layout, settings)
    if model != "champion":
        with workspace:
            return Fixed(Served(*workspace.classifier(model)))
    shared = SharedStorage(settings, layout, workspace.trust)
    follower = Follower(shared.opened, layout.releases, settings.serve_follow_seconds)
    follower.start()
    return follower
