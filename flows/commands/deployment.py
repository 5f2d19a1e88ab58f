"""Verbs that run the whole deployment: its servers, its worker, its schedule."""

from typing import Annotated

import typer

from flows.commands.terminal import Json, open_layout, tell

app = typer.Typer()


@app.command()
def up(json_: Json = False) -> None:
    """Start S3, MLflow, Prefect and a worker on loopback, with the schedule."""
    from flows.commands.tables import service_table
    from flows.deployment.up import up as start
    from flows.settings import load_settings

    running, fresh = start(open_layout(), load_settings())
    tell(json_, {**running.model_dump(), "started": fresh}, service_table(running, fresh))


@app.command()
def down(json_: Json = False) -> None:
    """Stop what `up` started, and all that it started; the data stays."""
    from flows.deployment.up import down as stop

    stopped = stop(open_layout())
    tell(json_, {"stopped": stopped}, "The service is down." if stopped else "Nothing was up.")


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="Work pool that runs the deployments.")] = "handsigns",
    silence: Annotated[
        float, typer.Option(help="Seconds without a sign of life until a run counts as crashed.")
    ] = 90.0,
    json_: Json = False,
) -> None:
    """Register work pools, deployments and the crash automations with Prefect."""
    from flows.client import HEARTBEAT_SECONDS
    from flows.deployment.declared import POOLS
    from flows.deployment.deploy import deploy as register
    from flows.loopback.local import Services
    from flows.settings import load_settings
    from tasks.errors import SettingsError

    layout, settings = open_layout(), load_settings()
    if not HEARTBEAT_SECONDS < silence < float("inf"):
        raise typer.BadParameter(
            f"must be more than the {HEARTBEAT_SECONDS} s between two signs of life, and finite "
            f"(received {silence:g})",
            param_hint="--silence",
        )
    if pool not in POOLS:
        raise SettingsError(
            f"There is no such work pool. Received: {pool!r}. Take one of {', '.join(POOLS)}."
        )
    api = Services(settings, layout.local.resolve()).prefect_named()
    if api is None:
        raise SettingsError(
            "No Prefect server is known. Set PREFECT_API_URL, or run `handsigns up` first."
        )
    names = register(layout, settings, api, pool, silence)
    tell(json_, {"api": api, "pool": pool, "deployments": names}, f"{', '.join(names)} on {pool}")
