"""`params.yaml`, validated."""

import difflib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from tasks.errors import ParamsError

INPUT_SIZE = 224  # side of EfficientNetB0's input in pixels
BACKBONE = "backbone"
PHASES = ("base", "fine_tune", "full")  # the last one's weights become the model
MAX_TRAINABLE_LAYERS = 16  # of EfficientNetB0 above `block6d_add`, where the trunk is cut off

# Parameters of earlier versions, and what they are called now; None: they are gone.
RENAMED = {
    "hash_distance": "max_hash_distance",
    "twin_rms": "max_rms_difference",
    "detail": "image_size",
    "far": "zoom_out_prob",
    "farthest": "zoom_out_min",
    "channel": "color_jitter",
    "views": "augmented_copies",
    "style_mixing": "mixstyle_prob",
    "calibrate": "temperature",
    "starts_from": "init_from",
    "averaging": "swa_fraction",
    "max_leaks": "max_cross_split_duplicates",
    **dict.fromkeys(("backbone", "backdrop", "weight_decay", "label_smoothing", "schedule")),
    **dict.fromkeys(("erasing", "random_erasing_prob")),
}

Share = Annotated[float, Field(ge=0.0, le=1.0)]
ONE, EACH = "one", "each"
Shares = Annotated[
    Annotated[Share, Tag(ONE)] | Annotated[dict[str, Share], Tag(EACH)],
    Discriminator(lambda value: EACH if isinstance(value, dict) else ONE),
]
"""One share for every class, or one for each."""
HeldOut = Annotated[float, Field(gt=0.0, lt=0.5)]


def check_label(label: str) -> str:
    """Return `label`, or raise `ValueError` if it is no name that a folder may have anywhere."""
    if label != unicodedata.normalize("NFC", label):
        raise ValueError("a label must be in Unicode's composed form (NFC)")
    # In UTF-8; file systems allow a folder 255 bytes.
    if label != label.strip() or not 0 < len(label.encode()) <= 200:
        raise ValueError("a label must have 1 to 200 bytes, no space around them")
    unsafe = {unicodedata.category(char) for char in label} & {"Cc", "Cs", "Zl", "Zp"}
    if unsafe or label.startswith(".") or not {"/", "\\"}.isdisjoint(label):
        raise ValueError("a label must have no slash or control character, and no dot in front")
    return label


Labels = Annotated[
    tuple[Annotated[str, AfterValidator(check_label)], ...],
    Field(strict=False, min_length=2, max_length=1000),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AuditParams(_Section):
    max_hash_distance: int = Field(ge=0, le=32)
    max_rms_difference: float = Field(ge=0.0, le=64.0)


class SplitParams(_Section):
    val: HeldOut
    test: HeldOut


class PreprocessParams(_Section):
    image_size: int = Field(ge=16, le=224)
    blur_sigma: float = Field(ge=0.0, le=8.0)


class SyntheticParams(_Section):
    per_class: int = Field(ge=0, le=100_000)


class AugmentationParams(_Section):
    horizontal_flip: bool
    rotation: float = Field(ge=0.0, le=180.0)
    zoom: float = Field(ge=0.0, lt=1.0)
    zoom_out_prob: Share
    zoom_out_min: float = Field(gt=0.0, le=1.0)
    shift: float = Field(ge=0.0, le=0.5)
    brightness: Share
    contrast: Share
    color_jitter: Share


class FeaturesParams(_Section):
    augmented_copies: int = Field(ge=0, le=64)


class TrainingParams(_Section):
    mode: Literal["cached", "end_to_end"]
    precision: Literal["mixed_bfloat16", "float32"]
    batch_size: int = Field(ge=1, le=1024)
    dropout: float = Field(ge=0.0, lt=1.0)
    mixstyle_prob: Share
    synthetic_weight: float = Field(gt=0.0, le=100.0)
    gce_q: Share
    temperature: float = Field(gt=0.0, le=10.0)


class PhaseParams(_Section):
    init_from: str
    data_fraction: float = Field(gt=0.0, le=1.0)
    trainable_layers: int = Field(ge=0, le=MAX_TRAINABLE_LAYERS)
    learning_rate: float = Field(gt=0.0, le=1.0)
    epochs: int = Field(ge=1, le=1000)
    swa_fraction: Share


class GateParams(_Section):
    """Limits of the gate. A limit that is left out is not checked; no limit at all fails."""

    confidence: float | None = Field(default=None, gt=0.0, lt=1.0)
    min_accuracy: Share | None = None
    min_recall: Shares | None = None
    min_robust_accuracy: Share | None = None
    max_loss: float | None = Field(default=None, gt=0.0)
    max_calibration_error: Share | None = None
    max_cross_split_duplicates: int | None = Field(default=None, ge=0)
    min_test_photos: int | None = Field(default=None, ge=1)

    @field_validator("min_recall", mode="before")
    @classmethod
    def _quotes_labels(cls, value: object) -> object:
        """YAML reads `0:` as a number."""
        return {str(key): one for key, one in value.items()} if isinstance(value, dict) else value


class Params(_Section):
    seed: int = Field(ge=0, lt=2**31)
    labels: Labels
    audit: AuditParams
    split: SplitParams
    preprocess: PreprocessParams
    synthetic: SyntheticParams
    augmentation: AugmentationParams
    features: FeaturesParams
    training: TrainingParams
    phases: dict[str, PhaseParams]
    gate: GateParams

    @model_validator(mode="after")
    def _sections_agree(self) -> "Params":
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise ValueError(f"labels must differ, and {', '.join(twice)} is there twice")
        least = self.gate.min_recall
        if isinstance(least, dict) and set(least) != set(self.labels):
            names = list_labels(self.labels)
            raise ValueError(f"gate.min_recall: a mapping must name each of the labels {names}")
        # dvc.yaml has one stage for each phase.
        chain = [(phase.init_from, name) for name, phase in self.phases.items()]
        if chain != list(zip((BACKBONE, *PHASES), PHASES, strict=False)):
            raise ValueError(
                f"phases must be {', '.join(PHASES)}, in this order, and each must have init_from "
                f"the one before, {PHASES[0]} {BACKBONE}"
            )
        return self


def list_labels(labels: Sequence[str], most: int = 20) -> str:
    """Labels for a message, not more than fit into it."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def load_params(path: Path) -> Params:
    """Read and validate `params.yaml`; an error names each wrong key."""
    return _parse(_read(path), path.name)


def replace_labels(path: Path, labels: Sequence[str]) -> str:
    """The text of `params.yaml` with other labels, valid, and otherwise the same to the byte."""
    text = _read(path)
    _parse(text, path.name)
    line = f"labels: {json.dumps(list(labels), ensure_ascii=False)}"
    # A list of several lines is indented, or has dashes, or ends with a bracket.
    listed = r"(?m)^labels:.*?([ \t]+#[^\"'\]\n]*)?\n(?:[ \-\]].*\n)*"
    changed = re.sub(listed, lambda found: f"{line}{found[1] or ''}\n", text, count=1)
    _parse(changed, f"{path.name} with the labels of these photos")
    return changed


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        fault = f"'{path}' cannot be read ({error.strerror})"
        raise ParamsError(f"{fault}. Run in the root of the checkout, where it is.") from error
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name} is not valid YAML: it is no UTF-8 text.") from error


def _parse(text: str, name: str) -> Params:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        content: Any = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        fault = " ".join(str(error).split())
        if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
            fault = f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
        raise ParamsError(f"{name} is not valid YAML: {fault}.") from error
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        faults = _faults(error)
        raise ParamsError(
            f"{name} has {len(faults)} fault(s): {'; '.join(faults)}. Correct these keys."
        ) from error


def _faults(error: ValidationError) -> list[str]:
    """One phrase for each wrong key."""
    phrases: dict[str, str] = {}
    meant = set()
    schemas = [Params.model_json_schema(), *Params.model_json_schema()["$defs"].values()]
    known = {name for schema in schemas for name in schema.get("properties", ())}
    for fault in error.errors():
        # Pydantic adds the tag of the union's member, which is not a key of the file.
        key = ".".join(str(part) for part in fault["loc"] if part not in (ONE, EACH))
        if fault["type"] == "missing":
            phrase = f"{key} is missing"
        elif fault["type"] != "extra_forbidden":  # without a key it is of all sections together
            text = fault["msg"].removeprefix("Value error, ")
            phrase = f"{key}: {text}, not {fault['input']!r}" if key else text
        else:
            section, _, name = key.rpartition(".")
            near = difflib.get_close_matches(name, known, 1)
            if new := RENAMED.get(name):
                phrase = f"{key} is now called {section}.{new}"
            elif name in RENAMED:
                phrase = f"{key} no longer exists, remove it"
            else:
                phrase = f"{key} is unknown" + (f" (did you mean {near[0]}?)" if near else "")
            meant.add(f"{section}.{new or ''.join(near)} is missing")
        phrases.setdefault(key, phrase)
    return [phrase for phrase in phrases.values() if phrase not in meant]
