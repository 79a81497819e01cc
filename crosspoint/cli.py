"""The `crosspoint` command: a word chooses a config dataclass, whose fields are the options.

Nothing but this file is imported until the word is known, so `crosspoint info` needs torch and numpy alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import logging
import os
import sys
import traceback
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

__all__ = ["main"]


class _Command(NamedTuple):
    summary: str
    module: str
    config: str
    function: str
    positional: tuple[str, ...] = ()
    example: str = ""


_COMMANDS = {
    "prepare": _Command(
        "make training pairs (points and rendered views) from meshes",
        "crosspoint.data.prepare",
        "PrepareConfig",
        "prepare",
        ("meshes", "out"),
        "crosspoint prepare meshes/ data/ --points 2048 --views 12",
    ),
    "pack": _Command(
        "pack such pairs into memory-mapped shards, which train faster",
        "crosspoint.data.pack",
        "PackConfig",
        "pack",
        ("data", "out"),
        "crosspoint pack data/ packed/",
    ),
    "pretrain": _Command(
        "pre-train an encoder on such pairs, without labels",
        "crosspoint.train",
        "PretrainConfig",
        "pretrain",
        ("data",),
        "crosspoint pretrain data/ --out runs/first",
    ),
    "profile": _Command(
        "say where the time of a pre-training step goes, with a trace",
        "crosspoint.train.profile",
        "ProfileConfig",
        "profile",
        ("data",),
        "crosspoint profile data/ --steps 20",
    ),
    "data check": _Command(
        "report on a folder of data before hours are spent on it",
        "crosspoint.data.check",
        "CheckConfig",
        "check",
        ("root",),
        "crosspoint data check data/",
    ),
    "evaluate svm": _Command(
        "score an encoder: linear SVM on its features of ModelNet40",
        "crosspoint.evaluate.svm",
        "SvmConfig",
        "evaluate_svm",
        ("run",),
        "crosspoint evaluate svm runs/first --data modelnet40/",
    ),
    "evaluate few-shot": _Command(
        "score an encoder: K-way N-shot classification on its features",
        "crosspoint.evaluate.few_shot",
        "FewShotConfig",
        "evaluate_few_shot",
        ("run",),
        "crosspoint evaluate few-shot runs/first --data modelnet40/",
    ),
    "evaluate retrieval": _Command(
        "score an encoder: nearest clouds by its features, with a contact sheet",
        "crosspoint.evaluate.retrieval",
        "RetrievalConfig",
        "evaluate_retrieval",
        ("run",),
        "crosspoint evaluate retrieval runs/first --data modelnet40/",
    ),
    "evaluate cross-modal": _Command(
        "score a run: find the cloud of an image, and the image of a cloud",
        "crosspoint.evaluate.cross_modal",
        "CrossModalConfig",
        "evaluate_cross_modal",
        ("run",),
        "crosspoint evaluate cross-modal runs/first --data held_out_pairs/",
    ),
    "evaluate classify": _Command(
        "fine-tune an encoder for classification, beside random initialisation",
        "crosspoint.evaluate.classify",
        "ClassifyConfig",
        "evaluate_classify",
        ("run",),
        "crosspoint evaluate classify runs/first --data modelnet40/ --out runs/first/modelnet40",
    ),
    "evaluate part-segmentation": _Command(
        "fine-tune an encoder to segment parts of objects, beside random initialisation",
        "crosspoint.evaluate.part_segmentation",
        "PartSegmentationConfig",
        "evaluate_part_segmentation",
        ("run",),
        "crosspoint evaluate part-segmentation runs/parts --data shapenetpart/",
    ),
    "evaluate semantic-segmentation": _Command(
        "fine-tune an encoder to segment rooms, beside random initialisation",
        "crosspoint.evaluate.semantic_segmentation",
        "SemanticSegmentationConfig",
        "evaluate_semantic_segmentation",
        ("run",),
        "crosspoint evaluate semantic-segmentation --data s3dis/ --out runs/s3dis",
    ),
    "sweep": _Command(
        "pre-train and evaluate a list of configurations over seeds, into one table",
        "crosspoint.evaluate.sweep",
        "SweepConfig",
        "sweep",
        ("list", "data", "out"),
        "crosspoint sweep configs/sweeps/objectives.yaml data/ runs/objectives --labelled modelnet40/",
    ),
    "embed": _Command(
        "write the features of cloud files to .npz or .safetensors",
        "crosspoint.evaluate.embed_files",
        "EmbedConfig",
        "embed_files",
        ("run", "out", "clouds"),
        "crosspoint embed runs/first features.npz scans/*.ply",
    ),
    "convert": _Command(
        "convert weights from or to the files of the authors' code",
        "crosspoint.models.official",
        "ConvertConfig",
        "convert",
        ("source", "out"),
        "crosspoint convert best_model.pth weights.safetensors",
    ),
    "bench": _Command(
        "measure this machine against plain PyTorch and other packages (in a checkout)",
        "crosspoint.bench",
        "BenchConfig",
        "bench",
        (),
        "crosspoint bench --quick",
    ),
    "demo": _Command(
        "all of the above on built-in shapes, in minutes",
        "crosspoint.evaluate.demo",
        "DemoConfig",
        "demo",
        (),
        "crosspoint demo",
    ),
}
_INFO = "info"
_INFO_SUMMARY = "say what is installed and usable here, and for what is not, why and what to do"

# What a user can cause and mend; anything else is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 if interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = os.environ.get("CROSSPOINT_TRACEBACK", "0") not in ("", "0")
    if "--traceback" in arguments:
        arguments.remove("--traceback")
        show_traceback = True
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from crosspoint._version import __version__

        print(f"crosspoint {__version__}")
        return 0
    name, rest = _split(arguments)
    if name is None:
        return _unknown(arguments)
    try:
        return _run_info(rest) if name == _INFO else _run(name, rest)
    except KeyboardInterrupt as interrupt:
        print(f"crosspoint {name}: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        if show_traceback:
            traceback.print_exc()
        else:
            print(f"crosspoint {name}: error: {error}", file=sys.stderr)
        return 1


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The command that the first one or two words name, and what follows it."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in _COMMANDS or name == _INFO:
            return name, arguments[words:]
    return None, arguments


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    rows = [(name, command.summary) for name, command in _COMMANDS.items()] + [(_INFO, _INFO_SUMMARY)]
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in rows)
    examples = "\n".join(f"  {command.example}" for command in _COMMANDS.values())
    return f"""usage: crosspoint COMMAND [OPTIONS]

Self-supervised learning on point clouds (CrossPoint), on fused kernels.

commands:
{commands}

`crosspoint COMMAND --help` lists a command's options. All of them take
  --config FILE.yaml   read options from a recipe; those on the command line win over it
  --traceback          show where an error came from (or set CROSSPOINT_TRACEBACK=1)

examples, from meshes to a score:
{examples}"""


def _unknown(arguments: list[str]) -> int:
    valid = [*_COMMANDS, _INFO]
    group = [name for name in valid if name.startswith(f"{arguments[0]} ")]
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(f"usage: crosspoint {arguments[0]} {{{','.join(n.split()[1] for n in group)}}} [OPTIONS]\n")
        for name in group:
            print(f"  crosspoint {name}  {_COMMANDS[name].summary}")
        return 0 if len(arguments) > 1 else 2
    typed = " ".join(arguments[:2] if group else arguments[:1])
    nearest = difflib.get_close_matches(typed, valid, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    print(
        f"crosspoint: unknown command {typed!r}; {hint}The commands are: {', '.join(valid)}", file=sys.stderr
    )
    return 2


def _run(name: str, arguments: list[str]) -> int:
    from crosspoint._optional import require

    command = _COMMANDS[name]
    tyro = require("tyro", extra="train")
    module = importlib.import_module(command.module)
    config_class = getattr(module, command.config)
    recipe, arguments = _take_recipe(arguments)
    default = None
    if recipe is not None:
        from crosspoint.train.config import load_config

        default = load_config(config_class, recipe, absent=tyro.MISSING)
    config = _parse(tyro, name, config_class, default, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    getattr(module, command.function)(config)
    return 0


def _take_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(prog="crosspoint", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml")
    known, rest = parser.parse_known_args(arguments)
    return known.config, rest


def _parse(tyro: Any, name: str, config_class: type, default: Any, arguments: list[str]) -> Any:
    command = _COMMANDS[name]
    parsed_class = _with_positional(tyro, config_class, command.positional)
    if default is not None:
        default = parsed_class(**_fields(default))
    parsed = tyro.cli(
        parsed_class,
        prog=f"crosspoint {name}",
        description=(
            f"{inspect.cleandoc(config_class.__doc__)}\n\n"
            f"Example: {command.example}. Options can also come from a recipe, --config FILE.yaml; those on "
            "the command line win over it."
        ),
        default=default,
        args=arguments,
    )
    return config_class(**_fields(parsed))


def _with_positional(tyro: Any, config_class: type, names: tuple[str, ...]) -> type:
    """`config_class` with the fields `names` marked as positional; the library's own classes know no tyro."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    fields = []
    for field in dataclasses.fields(config_class):
        if field.name in names:
            kinds = {"default": field.default, "default_factory": field.default_factory}
            given = {key: value for key, value in kinds.items() if value is not dataclasses.MISSING}
            metavar = tyro.conf.arg(metavar=field.name.upper())
            hint = Annotated[hints[field.name], tyro.conf.Positional, metavar]
            fields.append((field.name, hint, dataclasses.field(**given)))
    return dataclasses.make_dataclass(config_class.__name__, fields, bases=(config_class,))


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _run_info(arguments: list[str]) -> int:
    if arguments:
        if arguments[0] in ("-h", "--help"):
            print(f"usage: crosspoint info\n\n{_INFO_SUMMARY}")
            return 0
        raise ValueError(f"info takes no options, got {' '.join(arguments)!r}")
    from crosspoint.info import report

    print(report())
    return 0
