"""`params.yaml`, validated."""

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
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

LABELS: tuple[str, ...] = ("0", "1", "2", "3", "4", "5")
BACKBONE = "backbone"
PHASES = ("base", "fine_tune", "full")
MAX_TRAINABLE_LAYERS = 16
"""Layers of EfficientNetB0 above `block6d_add`, where the trunk is cut off."""

RENAMED: dict[str, str | None] = {
    "audit.hash_distance": "audit.max_hash_distance",
    "audit.twin_rms": "audit.max_rms_difference",
    "preprocess.detail": "preprocess.image_size",
    "augmentation.far": "augmentation.zoom_out_prob",
    "augmentation.farthest": "augmentation.zoom_out_min",
    "augmentation.channel": "augmentation.color_jitter",
    "augmentation.backdrop": None,
    "features.views": "features.augmented_copies",
    "training.style_mixing": "training.mixstyle_prob",
    "training.erasing": "training.random_erasing_prob",
    "training.calibrate": "training.temperature",
    "training.weight_decay": None,
    "training.label_smoothing": None,
    "phases.*.starts_from": "phases.*.init_from",
    "phases.*.averaging": "phases.*.swa_fraction",
    "phases.*.schedule": None,
    "gate.max_leaks": "gate.max_cross_split_duplicates",
}
"""Parameters of earlier versions, and what they are called now; None: they are gone."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
ONE, EACH = "one", "each"
Shares = Annotated[
    Annotated[Share, Tag(ONE)] | Annotated[dict[str, Share], Tag(EACH)],
    Discriminator(lambda value: EACH if isinstance(value, dict) else ONE),
]
"""One share for every class, or one for each."""
HeldOut = Annotated[float, Field(gt=0.0, lt=0.5)]


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


class BackboneParams(_Section):
    source: str = Field(min_length=1)


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
    random_erasing_prob: Share
    temperature: float = Field(gt=0.0, le=10.0)


class PhaseParams(_Section):
    init_from: str
    data_fraction: float = Field(gt=0.0, le=1.0)
    trainable_layers: int = Field(ge=0, le=MAX_TRAINABLE_LAYERS)
    learning_rate: float = Field(gt=0.0, le=1.0)
    epochs: int = Field(ge=1, le=1000)
    swa_fraction: Share


class GateParams(_Section):
    """Limits of the gate. A limit that is left out is not checked; no limit at all fails.

    With `confidence`, the lower bound of the accuracy's interval must reach `min_accuracy`.
    """

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
    def _names_every_class(cls, value: object) -> object:
        """A class missing from a mapping would go unchecked. YAML reads `0:` as a number."""
        if not isinstance(value, dict):
            return value
        named = {str(label): limit for label, limit in value.items()}
        if set(named) != set(LABELS):
            raise ValueError(f"a mapping must name each of the classes {', '.join(LABELS)}")
        return named


class Params(_Section):
    """The content of `params.yaml`."""

    seed: int = Field(ge=0, lt=2**31)
    audit: AuditParams
    split: SplitParams
    preprocess: PreprocessParams
    synthetic: SyntheticParams
    backbone: BackboneParams
    augmentation: AugmentationParams
    features: FeaturesParams
    training: TrainingParams
    phases: dict[str, PhaseParams]
    gate: GateParams

    @model_validator(mode="after")
    def _phases_form_a_chain(self) -> "Params":
        # dvc.yaml has one stage for each phase.
        if tuple(self.phases) != PHASES:
            found = ", ".join(map(str, self.phases)) or "no phase"
            raise ValueError(f"phases must be {', '.join(PHASES)}, in this order, not {found}")
        before = BACKBONE
        for name, phase in self.phases.items():
            if phase.init_from != before:
                raise ValueError(
                    f"phase {name!r} must start from {before!r}, not from {phase.init_from!r}"
                )
            before = name
        return self

    @property
    def last_phase(self) -> str:
        """The phase whose weights become the model."""
        return list(self.phases)[-1]


def load_params(path: Path) -> Params:
    """Read and validate `params.yaml`; an error names each wrong key."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParamsError(
            f"'{path}' cannot be read ({error.strerror}). Run in the root of the checkout, "
            "where params.yaml is."
        ) from error
    except (YAMLError, ValueError, RecursionError) as error:
        fault = " ".join(str(error).split())
        if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
            fault = f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
        raise ParamsError(f"{path.name} is not valid YAML: {fault}.") from error
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        faults = _faults(error)
        raise ParamsError(
            f"{path.name} has {len(faults)} fault(s): {'; '.join(faults)}. Correct these keys."
        ) from error


def _faults(error: ValidationError) -> list[str]:
    """One phrase for each wrong key."""
    found = {}
    for fault in error.errors():
        # Pydantic adds the tag of the union's member, which is not a key of the file.
        keys = [str(part) for part in fault["loc"] if part not in (ONE, EACH)]
        found[".".join(keys) or "the file"] = fault
    missing = [key for key, fault in found.items() if fault["type"] == "missing"]
    phrases = []
    for key, fault in found.items():
        if fault["type"] == "extra_forbidden":
            phrase, meant = _explain_unknown(key, missing)
            missing = [one for one in missing if one != meant]
            phrases.append(f"{key} {phrase}")
        elif fault["type"] != "missing":
            value = f", not {fault['input']!r}" if fault["loc"] else ""
            phrases.append(f"{key}: {fault['msg'].removeprefix('Value error, ')}{value}")
    return phrases + [f"{key} is missing" for key in missing]


def _explain_unknown(key: str, missing: list[str]) -> tuple[str, str | None]:
    """What to do with an unknown key, and the key that was meant."""
    section, _, name = key.rpartition(".")
    in_phase = section.startswith("phases.")
    pattern = f"phases.*.{name}" if in_phase else key
    if pattern in RENAMED:
        new = RENAMED[pattern]
        if new is None:
            return "no longer exists, remove it", None
        meant = f"{section}.{new.rpartition('.')[2]}"
        return f"is now called {meant}", meant
    of_section = Params.model_fields[section].annotation if section and not in_phase else Params
    model = PhaseParams if in_phase else of_section
    names = [f"{section}.{one}".lstrip(".") for one in getattr(model, "model_fields", ())]
    # A required key that is missing was meant more likely than one that is there.
    near = difflib.get_close_matches(key, missing, 1) or difflib.get_close_matches(key, names, 1)
    return (f"is unknown (did you mean {near[0]}?)", near[0]) if near else ("is unknown", None)
