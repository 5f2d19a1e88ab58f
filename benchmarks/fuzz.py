"""Feed the readers of untrusted photos with what atheris makes of valid files.

    python -m benchmarks.fuzz [--seconds 600] [--target image|zip|h5]

For each input it holds: no exception but the readers' own refusals, no file outside the
folder given, an answer within 20 s, less than 2 GiB of memory. The HDF5 library is tried
in this process, where a crash of it ends the round; the product reads in a child, so
each such input is given to the product's reader, which must bear it, and the round goes
on. Ends with 1 if anything else was found.
"""

import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

# What is read with is imported where it is used: atheris instruments it while it loads.
TARGETS = ("image", "zip", "h5")
INSTRUMENTED = ["tasks", "PIL", "zipfile"]
LIMITS = (
    "-timeout=20",
    "-report_slow_units=20",
    "-rss_limit_mb=2048",
    "-max_len=32768",
    "-print_final_stats=1",
)


def picture(kind: str, seed: int = 0) -> bytes:
    """A small photo in a format that Pillow writes."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_seeds(target: str, folder: Path) -> None:
    """Write valid files for atheris to start from."""
    import zipfile

    import h5py
    import numpy as np

    if target == "image":
        for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
            (folder / kind).write_bytes(picture(kind))
    elif target == "zip":
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with zipfile.ZipFile(folder / f"{method}.zip", "w", method) as archive:
                for label in "012345":
                    archive.writestr(f"photos/{label}/a.png", picture("PNG", int(label)))
    else:
        for chunks in (None, True):
            with h5py.File(folder / f"{chunks}.h5", "w") as file:
                photos = np.zeros((6, 8, 8, 3), np.uint8)
                file.create_dataset("train_set_x", data=photos, chunks=chunks)
                file.create_dataset("train_set_y", data=np.arange(6))


def try_image(data: bytes, folder: Path) -> None:
    """Read one photo as an import and as a prediction do."""
    from tasks.data.images import look, read_photo
    from tasks.errors import ImageError

    for reader in (read_photo, look):
        try:
            reader(data, "fuzz")
        except ImageError:
            continue


def try_source(data: bytes, folder: Path, name: str = "fuzz.zip") -> None:
    """Read a source and every photo in it as an import does."""
    from tasks.data.images import MAX_BYTES
    from tasks.data.sources import open_source
    from tasks.errors import ImageError, SourceError

    path = folder / name
    path.write_bytes(data)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        spool = Path(temporary)
        try:
            with open_source(path, spool) as source:
                for item in source.items:
                    if item.read and item.fault is None:
                        try_image(item.read(MAX_BYTES), folder)
        except (SourceError, ImageError):
            return


def try_h5(data: bytes, folder: Path) -> None:
    """Do in this process what the product's reader does in its child."""
    import h5py

    from tasks.data import h5

    path = folder / "fuzz.h5"
    path.write_bytes(data)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            with h5py.File(path, "r", locking=False) as file:
                h5._check_links(file)
                for split in ("train", "test"):
                    if f"{split}_set_x" in file:
                        h5._copy(file, split, Path(temporary), h5.RATIO_FROM)
        except Exception:
            return  # any is a refusal there


def fuzz(target: str, folder: Path, arguments: list[str]) -> None:
    """Run atheris in this process; it never returns."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import tasks.data.sources  # noqa: F401
    attempt = {"image": try_image, "zip": try_source, "h5": try_h5}[target]
    inside = folder / "inside"
    inside.mkdir(exist_ok=True)
    allowed = {path.name for path in folder.iterdir()}

    def once(data: bytes) -> None:
        attempt(data, inside)
        found = {path.name for path in folder.iterdir()} - allowed
        left = {path.name for path in inside.iterdir()} - {"fuzz.zip", "fuzz.h5"}
        if found or left:
            raise AssertionError(f"files appeared outside the folder: {found | left}")

    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


def rounds(target: str, seconds: int) -> tuple[int, int, list[str]]:
    """Fuzz one target until the time is over.

    Returns:
        Inputs tried, crashes of the HDF5 library that the child contained, findings.
    """
    tried, contained, findings = 0, 0, []
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as temporary:
        corpus, work, crashes = (Path(temporary) / name for name in ("corpus", "work", "crashes"))
        for folder in (corpus, work, crashes):
            folder.mkdir()
        write_seeds(target, corpus)
        while (left := int(end - time.monotonic())) > 5 and not findings:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--inside", str(work)]
            command += ["--target", target, "--"]
            command += [*LIMITS, f"-max_total_time={left}", f"-artifact_prefix={crashes}/"]
            done = subprocess.run([*command, str(corpus)], capture_output=True, text=True)
            said = done.stdout + done.stderr
            counts = re.findall(r"number_of_executed_units: (\d+)", said)
            counts = counts or re.findall(r"^#(\d+)", said, re.M)
            tried += int(counts[-1]) if counts else 0
            for crash in [one for one in crashes.iterdir() if "slow-unit" not in one.name]:
                if target == "h5" and _is_borne(crash, work):
                    contained += 1
                else:
                    findings.append(f"{target}: {crash.read_bytes()[:200]!r} {said[-2000:]}")
                crash.unlink()
            if done.returncode and not counts:
                findings.append(said[-2000:])
    return tried, contained, findings


def _is_borne(crash: Path, folder: Path) -> bool:
    """Whether the product's reader takes or refuses what ended a round."""
    try:
        try_source(crash.read_bytes(), folder, "fuzz.h5")
    except Exception:
        return False
    return True


def main(
    seconds: Annotated[int, typer.Option(help="For each target; all run at once.")] = 600,
    target: Annotated[str, typer.Option(help="image, zip or h5; all without it.")] = "",
    inside: Annotated[Path | None, typer.Option(hidden=True)] = None,
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Fuzz the readers of photos, archives and HDF5 files."""
    if inside:
        fuzz(target, inside, arguments or [])
    from concurrent.futures import ThreadPoolExecutor

    targets = (target,) if target else TARGETS
    with ThreadPoolExecutor(len(targets)) as pool:
        results = list(pool.map(lambda one: rounds(one, seconds), targets))
    for name, (tried, contained, findings) in zip(targets, results, strict=True):
        print(f"{name}: {tried} inputs, {contained} crashes contained, {len(findings)} findings")
        print("\n".join(findings), file=sys.stderr)
    sys.exit(any(findings for _, _, findings in results))


if __name__ == "__main__":
    typer.run(main)
