"""`params.yaml`, validated."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tasks.errors import ParamsError


def _no_switch(value: object) -> object:
    """YAML reads `yes` and `on` as true, which would pass for 1, often the most there is."""
    if isinstance(value, bool):
        raise ValueError("must not be true or false")
    return value


Share = Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(_no_switch)]
ONE, EACH = "one", "each"
Shares = Annotated[
    Annotated[Share, Tag(ONE)] | Annotated[dict[str, Share], Tag(EACH)],
    Discriminator(lambda value: EACH if isinstance(value, dict) else ONE),
]
"""One share for every class, or one for each."""
HeldOut = Annotated[float, Field(gt=0.0, lt=0.5)]

BACKBONE = "backbone"
PHASES = ("base", "fine_tune", "full")
MAX_TRAINABLE_LAYERS = 16
"""Layers of EfficientNetB0 above `block6d_add`, where the trunk is cut off."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _switches_are_no_numbers(cls, value: object, info: ValidationInfo) -> object:
        switch = cls.model_fields[str(info.field_name)].annotation is bool
        return value if switch else _no_switch(value)


class AuditParams(_Section):
    hash_distance: int = Field(ge=0, le=32)
    twin_rms: float = Field(ge=0.0, le=64.0)


class SplitParams(_Section):
    val: HeldOut
    test: HeldOut


class PreprocessParams(_Section):
    detail: int = Field(ge=16, le=224)


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
    """Limits; one that is left out is not checked, and none at all fails.

    Args:
        confidence: level of every interval; where it is set, the lower bound of the
            accuracy's interval is held against `min_accuracy`, else its value.
        min_recall: one limit for every class, or one for each.
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
    def _every_class_is_named(cls, value: object) -> object:
        """A class that a mapping forgets would go unchecked; YAML reads `0:` as a number."""
        if not isinstance(value, dict):
            return value
        named = {str(label): limit for label, limit in value.items()}
        if set(named) != set(LABELS):
            raise ValueError(f"a mapping must name each of the classes {', '.join(LABELS)}")
        return named


class Params(_Section):
    """The whole of `params.yaml`."""

    seed: int = Field(ge=0, lt=2**31)
    audit: AuditParams
    split: SplitParams
    preprocess: PreprocessParams
    backbone: BackboneParams
    augmentation: AugmentationParams
    features: FeaturesParams
    training: TrainingParams
    phases: dict[str, PhaseParams]
    gate: GateParams

    @model_validator(mode="after")
    def _phases_form_a_chain(self) -> "Params":
        # dvc.yaml has a stage for each of them.
        if tuple(self.phases) != PHASES:
            raise ValueError(
                f"phases must be {', '.join(PHASES)}, in this order. "
                f"Received: {', '.join(map(str, self.phases)) or 'none'}"
            )
        before = BACKBONE
        for name, phase in self.phases.items():
            if phase.init_from != before:
                raise ValueError(
                    f"phase {name!r} must start from {before!r}, the one before it. "
                    f"Received: {phase.init_from!r}"
                )
            before = name
        return self

    @property
    def last_phase(self) -> str:
        """Name of the phase whose weights become the model."""
        return list(self.phases)[-1]


RENAMED = {
    "augmentation.far": "augmentation.zoom_out_prob",
    "augmentation.farthest": "augmentation.zoom_out_min",
    "augmentation.channel": "augmentation.color_jitter",
    "features.views": "features.augmented_copies",
    "training.style_mixing": "training.mixstyle_prob",
    "training.erasing": "training.random_erasing_prob",
    "training.calibrate": "training.temperature, a number",
    "phases.*.starts_from": "phases.*.init_from",
    "phases.*.averaging": "phases.*.swa_fraction",
    "gate.max_leaks": "gate.max_cross_split_duplicates",
}
"""Parameters of earlier versions, and what they are called now."""
REMOVED = (
    "augmentation.backdrop",
    "training.weight_decay",
    "training.label_smoothing",
    "phases.*.schedule",
)
"""Parameters of earlier versions that no longer exist."""


class _Loader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win, in silence."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # before what is merged into it
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def load_params(path: Path) -> Params:
    """Read and check `params.yaml`.

    Args:
        path: the file.

    Returns:
        The frozen parameters.

    Raises:
        ParamsError: the file is missing, is not YAML, or has an unknown,
            missing or out-of-range key; the message names each.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506
    except OSError as error:
        raise ParamsError(
            f"Parameters cannot be read ({error.strerror}). Received: '{path}'. "
            "Run from the checkout's root, where params.yaml lies."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = " ".join(str(error).split())
        raise ParamsError(f"{path.name} is not valid YAML: {place}. Mend that line.") from error
    _reject_old_names(path, content)
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise ParamsError(_explain(path, error)) from error


def _explain(path: Path, error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        # Pydantic names the choice that it took, too, which is no key of the file.
        keys = [str(part) for part in fault["loc"] if part not in (ONE, EACH)]
        where = ".".join(keys) or "the file"
        whole = fault["type"] == "missing" or not fault["loc"]
        received = "" if whole else f" (received {fault['input']!r})"
        faults.append(f"{where}: {fault['msg'].removeprefix('Value error, ')}{received}")
    return (
        f"{path.name} has {len(faults)} fault(s): {'; '.join(faults)}. Mend or remove these keys."
    )


def _reject_old_names(path: Path, content: Any) -> None:
    sections = content.items() if isinstance(content, dict) else ()
    found = []
    for name, section in sections:
        phases = isinstance(section, dict) and name == "phases"
        for key in _keys(section.values() if phases else [section]):
            old = f"phases.*.{key}" if phases else f"{name}.{key}"
            if old in RENAMED:
                found.append(f"{old} is now {RENAMED[old]}")
            elif old in REMOVED:
                found.append(f"{old} no longer exists, remove it")
    if found:
        raise ParamsError(f"{path.name} is of an earlier version: {'; '.join(found)}.")


def _keys(sections: Iterable[Any]) -> list[str]:
    """Keys of all these mappings, each once."""
    return list(dict.fromkeys(key for one in sections if isinstance(one, dict) for key in one))


LABELS: tuple[str, ...] = ("0", "1", "2", "3", "4", "5")
