"""How the service bears many clients at once, one in ten of them with a bad upload.

    HANDSIGNS_SERVE_RATE=1000000/minute handsigns serve          # in one terminal
    python -m benchmarks.load [--seconds 60] [--json]            # in another

With `--beside URL` two services take turns, and what counts is the ratio of their photos a second.

Ends with 1 if the service failed once, that is, answered with 5xx or not at all.
"""

import asyncio
import base64
import collections
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from tasks.rendering.scene import draw
from tasks.synthetic import encode

BAD_SHARE = 0.1
SEED = 22  # of the rendered photos that are sent


@dataclass
class Tally:
    """What came of all requests of a run."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    good: list[float] = field(default_factory=list)
    bad: list[float] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def photos() -> list[bytes]:
    """Twelve rendered photos, two of each sign."""
    return [encode(draw((SEED, label, number))) for number in range(2) for label in range(6)]


def bad_uploads(photo: bytes) -> dict[str, dict[str, Any]]:
    """Requests that must be refused, by what is wrong with them."""
    as_json = {"content-type": "application/json"}
    image = base64.b64encode(photo).decode()
    return {
        "not an image": {"files": {"file": ("a.png", b"no picture" * 100)}},
        "half an image": {"files": {"file": ("a.png", photo[: len(photo) // 2])}},
        "empty": {"files": {"file": ("a.png", b"")}},
        "no file": {"data": {"name": "value"}, "files": {"other": ("a.png", photo)}},
        "broken JSON": {"content": b'{"image": ', "headers": as_json},
        "not base64": {"json": {"image": image[:-3] + "%"}},
        "another key": {"json": {"photo": image}},
        "raw bytes": {"content": photo, "headers": {"content-type": "application/octet-stream"}},
        "too large": {"content": bytes(11 * 2**20), "headers": as_json},
    }


async def drive(url: str, connections: int, seconds: float) -> Tally:
    """Send requests over `connections` connections, each at once after its last answer."""
    tally, pictures = Tally(), photos()
    bad = list(bad_uploads(pictures[0]).items())
    ends = time.monotonic() + seconds

    async def client(number: int) -> None:
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=30) as session:
            while time.monotonic() < ends:
                name, request = (
                    chance.choice(bad)
                    if chance.random() < BAD_SHARE
                    else ("good", {"files": {"file": ("a.png", chance.choice(pictures))}})
                )
                await ask(session, tally, name, request)

    await asyncio.gather(*(client(number) for number in range(connections)))
    return tally


async def ask(session: httpx.AsyncClient, tally: Tally, name: str, request: dict[str, Any]) -> None:
    """Send one request and note its status and how long it took."""
    began = time.perf_counter()
    try:
        answer = await session.post("/predict", **request)
    except httpx.HTTPError as error:
        tally.statuses["none"] += 1
        tally.unexpected.append(f"{name}: {type(error).__name__} {error}")
        return
    (tally.good if name == "good" else tally.bad).append(time.perf_counter() - began)
    tally.statuses[str(answer.status_code)] += 1
    expected = answer.status_code == 200 if name == "good" else 400 <= answer.status_code < 500
    if not expected:
        tally.unexpected.append(f"{name}: {answer.status_code} {answer.text[:200]}")


def metric(url: str, name: str) -> float:
    """A figure that the service states about its process at /metrics."""
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise SystemExit(f"The service does not state {name} at /metrics.")


def resident(url: str) -> float:
    """Memory of the service in MiB."""
    return metric(url, "process_resident_memory_bytes") / 2**20


def report(url: str, connections: int, seconds: float) -> dict[str, Any]:
    """Warm up, run, and sum up."""
    asyncio.run(drive(url, connections, min(5.0, seconds)))
    before = resident(url)
    tally = asyncio.run(drive(url, connections, seconds))
    p50, p99, worst = (1000 * np.quantile(tally.good, share) for share in (0.5, 0.99, 1.0))
    return {
        "connections": connections,
        "seconds": seconds,
        "statuses": dict(sorted(tally.statuses.items())),
        "requests a second": round(sum(tally.statuses.values()) / seconds, 1),
        "photos a second": round(len(tally.good) / seconds, 1),
        "ms, median": round(p50, 1),
        "ms, 99 %": round(p99, 1),
        "ms, longest": round(worst, 1),
        "bad uploads, ms, 99 %": round(1000 * float(np.quantile(tally.bad, 0.99)), 1),
        "MiB before": round(before, 1),
        "MiB after": round(resident(url), 1),
        "unexpected": tally.unexpected[:10],
    }


def compare(url: str, beside: str, connections: int, seconds: float, pairs: int) -> dict[str, Any]:
    """Let two services take turns, each first every other time."""
    tallies: dict[str, list[Tally]] = {url: [], beside: []}
    cost = {url: 0.0, beside: 0.0}
    for number in range(-1, pairs):
        for one in (url, beside) if number % 2 else (beside, url):
            before = metric(one, "process_cpu_seconds_total")
            tallies[one].append(asyncio.run(drive(one, connections, seconds / 2 / pairs)))
            cost[one] += metric(one, "process_cpu_seconds_total") - before
    read = {one: [len(tally.good) for tally in tallies[one]] for one in cost}
    ratios = np.divide(read[beside], read[url])[1:]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {
        "ratio, median": round(median, 3),
        "ratio, quartiles": f"{low:.3f} to {high:.3f}",
        "ratio of all photos": round(sum(read[beside]) / sum(read[url]), 3),
        "CPU ms a photo": [round(1000 * cost[one] / sum(read[one]), 3) for one in cost],
        "pairs": pairs,
        "unexpected": [line for one in cost for tally in tallies[one] for line in tally.unexpected],
    }


def main(
    url: Annotated[str, typer.Option(help="Of the running service.")] = "http://127.0.0.1:8000",
    beside: Annotated[str, typer.Option(help="Another service to compare it with.")] = "",
    connections: int = 16,
    seconds: float = 60.0,
    pairs: Annotated[int, typer.Option(help="How often two services take turns.")] = 40,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Load a running service and tell how it took it."""
    try:
        if beside:
            found = compare(url, beside, connections, seconds, pairs)
        else:
            found = report(url, connections, seconds)
    except httpx.ConnectError:
        raise typer.BadParameter(
            f"nobody answers there (received {url}); start it", param_hint="--url"
        ) from None
    if json_:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(f"{name:22} {value}" for name, value in found.items()))
    sys.exit(1 if found["unexpected"] else 0)


if __name__ == "__main__":
    typer.run(main)
