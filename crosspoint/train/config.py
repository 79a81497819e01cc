"""The recipe of a pre-training run, and recipes as YAML files."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from crosspoint._files import replace_file
from crosspoint._optional import require
from crosspoint.models import CrossPointConfig

__all__ = ["PretrainConfig", "config_from_dict", "config_to_dict", "flatten", "load_config", "save_config"]

Config = TypeVar("Config")


@dataclass
class PretrainConfig:
    """Pre-train an encoder with CrossPoint on pairs of point clouds and rendered images.

    Writes a run folder: config.yaml, weights.safetensors, state.pt, log.jsonl, tensorboard/ and README.md (a
    model card). The defaults are the authors' recipe.
    """

    data: str = "generated"
    """Folder with ShapeNet/ and ShapeNetRendering/ (`crosspoint prepare` makes one from meshes), what `crosspoint pack`
    made of one, or "generated": built-in shapes, made under OUT/data."""
    out: str = "runs/pretrain"
    """Run folder to write."""
    resume: bool = False
    """Continue the run in OUT from its last checkpoint; start it if there is none yet."""
    seed: int = 0
    """One seed for the initial weights, the order of the shapes, the views and the augmentations."""
    epochs: int = 100
    """Passes over the shapes; the learning rate falls along a cosine over all of them."""
    batch_size: int = 20
    """Shapes per step, of all processes together. What is left of an epoch's shuffle after the last full batch waits
    for the next epoch: a small batch would give its anchors few negatives."""
    part_size: int | None = None
    """Encode this many shapes at a time, in each process, and each twice: for batches whose activations do not fit. The
    losses still compare the whole batch, but batch norm sees parts. None: the whole batch at once."""
    exchange: Literal["gather", "ring"] = "gather"
    """How several processes compare their embeddings: "gather" all on each, or, where those do not fit, pass them on
    in a "ring"."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes hold the model: "ddp", each the whole; "fsdp" (FSDP2), each its share of every parameter,
    gradient and optimizer state. The same numbers."""
    activation_checkpointing: bool = False
    """Compute the encoders' blocks again for the backward pass in place of keeping their activations: less memory, one
    more forward pass, the same numbers."""
    points: int = 2048
    """Points per cloud."""
    image_size: int = 224
    """Height and width of the images, in pixels."""
    views: int = 1
    """Rendered views of each shape in a step, drawn anew every epoch; their projections are averaged."""
    crop: float | None = None
    """Least share of the area in random crops of the images (the paper has them; 0.2, say). None: whole images."""
    optimizer: Literal["adam", "lars", "lamb"] = "adam"
    """Adam; or, for large batches, LARS (arXiv 1708.03888) or LAMB (arXiv 1904.00962)."""
    lr: float = 1e-3
    """Learning rate in the first epoch; of LARS some hundred times that of Adam, of LAMB about that of Adam."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """"linear" or "sqrt": lr is that of a batch of 20, and grows so with batch_size."""
    warmup_epochs: int = 0
    """Epochs in which the rate rises from 0, step by step."""
    weight_decay: float = 1e-6
    """L2 penalty in the optimizer."""
    up: Literal["y", "z"] = "y"
    """Up axis of the clouds: augmentation rotates about it."""
    workers: int = 2
    """Processes that load data; 0 loads in the training process. Changes no result."""
    device: str = "auto"
    """"auto" (the first GPU, under torchrun one for each process, else the CPU) or a torch device such as "cpu" or
    "cuda:1"."""
    amp: bool = False
    """Compute the forward pass in bfloat16 where autocast allows it."""
    compile: bool = False
    """Compile the passes of the model and its losses by torch.compile, as one graph. The same numbers, to rounding; but
    dropout is drawn otherwise. One process."""
    channels_last: bool = False
    """Keep images and the image encoder's weights in the order NHWC, which tensor cores read. The same numbers, to
    rounding; but dropout of feature maps, which the ResNets do not have, draws in that order."""
    cuda_graph: bool = False
    """Launch the kernels of a step's forward and backward passes as one CUDA graph: for steps that are short for what
    their launches take. One process with a GPU."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: one after every epoch. The end always gets one."""
    log_every: int = 10
    """Steps between lines of log.jsonl. The last step of an epoch always gets one."""
    model: CrossPointConfig = field(default_factory=lambda: CrossPointConfig(k=15))
    """The point encoder, the image encoder and the loss."""

    def validate(self) -> None:
        """Raise ValueError, naming the option, if a value cannot work."""
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, allowed, rule in (
            ("lr", self.lr > 0, "be positive"),
            ("weight_decay", self.weight_decay >= 0, "not be negative"),
            ("optimizer", self.optimizer in ("adam", "lars", "lamb"), "be 'adam', 'lars' or 'lamb'"),
            ("lr_scaling", self.lr_scaling in ("none", "linear", "sqrt"), "be 'none', 'linear' or 'sqrt'"),
            ("exchange", self.exchange in ("gather", "ring"), "be 'gather' or 'ring'"),
            ("parallel", self.parallel in ("ddp", "fsdp"), "be 'ddp' or 'fsdp'"),
            (
                "channels_last",
                not (self.channels_last and self.parallel == "fsdp"),
                "be off with parallel 'fsdp', which keeps shares of contiguous weights",
            ),
            (
                "cuda_graph",
                not (self.cuda_graph and (self.part_size is not None or self.activation_checkpointing)),
                "be off with part_size and with activation_checkpointing, which save random states on the host",
            ),
            (
                "compile",
                not (self.compile and (self.part_size is not None or self.activation_checkpointing)),
                "be off with part_size and with activation_checkpointing, which go through the model in pieces",
            ),
            (
                "compile",
                not (self.compile and self.cuda_graph),
                "be off with cuda_graph: nobody has tried both",
            ),
            ("up", self.up in ("y", "z"), "be 'y' or 'z'"),
            (
                "part_size",
                self.part_size is None
                or (self.part_size > 0 and self.batch_size // -(-self.batch_size // self.part_size) > 1),
                "leave each of the even parts of a batch two shapes, for batch norm",
            ),
            ("crop", self.crop is None or 0 < self.crop <= 1, "be a share of the area in (0, 1], or none"),
        ):
            if not allowed:
                raise ValueError(f"{name} must {rule}, got {getattr(self, name)!r}")


# A batch of one shape has no negatives.
_LEAST = {
    "seed": 0,
    "epochs": 1,
    "batch_size": 2,
    "points": 1,
    "image_size": 1,
    "views": 1,
    "warmup_epochs": 0,
    "workers": 0,
    "checkpoint_every": 0,
    "log_every": 1,
}


def load_config(cls: type[Config], path: str | Path, *, absent: Any = MISSING) -> Config:
    """The `cls` that a YAML file describes; keys it leaves out keep their defaults.

    Raises ValueError, naming the key, for keys that `cls` does not have, values of the wrong type, and keys
    without a default that are left out, unless `absent` is given to stand for them.
    """
    yaml = require("yaml", extra="train")
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    try:
        return config_from_dict(cls, {} if values is None else values, absent=absent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_config(path: str | Path, config: Any) -> None:
    """Write a config dataclass as YAML that `load_config` reads back to an equal one."""
    yaml = require("yaml", extra="train")
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    replace_file(path, lambda file: file.write(text.encode()))


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts, lists and scalars."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def config_from_dict(cls: type[Config], values: Any, *, absent: Any = MISSING) -> Config:
    """The inverse of `config_to_dict`; checks as `load_config` does."""
    converted = _convert_fields(cls, values, "")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in converted and _default(f) is MISSING]
    if missing and absent is MISSING:
        raise ValueError(f"{missing[0]} is missing and has no default")
    return cls(**converted, **dict.fromkeys(missing, absent))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _convert_fields(cls: type, values: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} must hold `key: value` lines, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    converted = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            raise ValueError(f"unknown key {name}; {_nearest(str(key), hints, prefix)}")
        if dataclasses.is_dataclass(hints[key]):
            inner = _convert_fields(hints[key], value, f"{name}.")
            # What a nested block leaves out is as the outer default has it.
            default = _default(fields[key])
            converted[key] = (
                hints[key](**inner) if default is MISSING else dataclasses.replace(default, **inner)
            )
        else:
            converted[key] = _convert(value, hints[key], name)
    return converted


def _nearest(key: str, hints: dict[str, Any], prefix: str) -> str:
    """What an unknown key may have meant: the same name one level deeper, or one spelled like it."""
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint) and key in typing.get_type_hints(hint):
            return f"did you mean {prefix}{name}.{key}?"
    close = difflib.get_close_matches(key, hints, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"valid keys: {', '.join(hints)}"


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _convert(value, option, key)
            except ValueError as error:
                failure = error
        raise failure
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{key} must be one of {', '.join(map(repr, args))}, got {value!r}")
    if origin in (list, tuple):
        if isinstance(value, (list, tuple)):
            return origin(_convert(item, args[0], f"{key}[{i}]") for i, item in enumerate(value))
    elif hint is float:
        # YAML 1.1 reads 1e-3, without a point, as a string.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif isinstance(value, hint):
        return value
    raise ValueError(f"{key} must be {_TYPE_NAMES.get(hint, hint)}, got {value!r}")


_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "empty",
}
