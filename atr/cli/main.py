"""The command `atr`: plans costs, writes experiments, checks reducers and models, exports, lists."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand; exit with 2 for wrong parameters, 1 for a file that cannot be read or written."""
    options = _parser().parse_args(arguments)
    from atr.config import ConfigError

    try:
        options.run(options)
    except ConfigError as error:
        print(f"atr {options.command}: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        sys.exit(f"atr {options.command}: {' '.join(str(error).split())}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="atr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="estimate what the current parameters will cost")
    plan.set_defaults(run=_plan)
    overlay = commands.add_parser("overlay", help="write an experiment's values into params.yaml")
    overlay.add_argument("file", help="a ready-made experiment, such as experiments/llava-next.yaml")
    overlay.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="section.key=value",
        help="a value that overrides the file's; may be repeated",
    )
    overlay.set_defaults(run=_overlay)
    for command in (plan, overlay):
        command.add_argument("--params", default="params.yaml", metavar="FILE", help="default: params.yaml")
    check = commands.add_parser("check", help="check that a reducer meets the built-in ones' requirements")
    check.add_argument("reducers", nargs="+", metavar="reducer", help="name, file, or package.module:Class")
    check.set_defaults(run=_check)
    family = commands.add_parser("check-family", help="prove on a tiny copy that a model type is served")
    family.add_argument("model", metavar="folder-or-type", help="a local checkpoint, or a model_type")
    family.set_defaults(run=_check_family)
    families = commands.add_parser("families", help="print the model types that are supported, and how")
    families.add_argument("--markdown", action="store_true", help="print the page docs/families.md")
    families.set_defaults(run=_families)
    export = commands.add_parser("export", help="write tower, selector and projector as one graph")
    export.add_argument("--vlm", required=True, metavar="FOLDER", help="a LLaVA-1.5: folder or hub id")
    export.add_argument("--selector", required=True, metavar="FOLDER", help="folder or hub id")
    export.add_argument("--keep", required=True, help="fraction (0.4) or count (230) of kept tokens")
    export.add_argument("--to", required=True, choices=("torch", "onnx", "openvino"))
    export.add_argument("--check", metavar="IMAGES", help="folder of images: compare the kept indices")
    export.add_argument("folder", metavar="OUT", help="a new folder")
    export.set_defaults(run=_export)
    reruns = commands.add_parser("reruns", help="list the stages that a change to a file reruns")
    reruns.add_argument("files", nargs="*", metavar="file", help="default: all code and params.yaml")
    reruns.set_defaults(run=_reruns)
    return parser


def _plan(options: Namespace) -> None:
    from atr.cli import disk, plan
    from atr.stages import PRETRAIN_FEATURES

    costs = plan.load_plan(options.params)
    disks = disk.inspect_disks(PRETRAIN_FEATURES.parents[1])
    print("\n".join(plan.lines(costs, disks)))
    for warning in plan.warnings(costs, disks):
        print(f"warning: {warning}", file=sys.stderr)


def _overlay(options: Namespace) -> None:
    from atr.cli import overlay

    changes = overlay.apply(options.file, options.settings, options.params)
    for key, (before, after) in changes.items():
        print(f"{key}: {before} -> {after}")
    print(f"{Path(options.params)}: {len(changes)} values changed")


def _check(options: Namespace) -> None:
    from atr.reduction.conformance import check

    sys.exit(check(options.reducers))


def _check_family(options: Namespace) -> None:
    from atr.cli.check_family import check_family

    sys.exit(check_family(options.model))


def _families(options: Namespace) -> None:
    from atr.cli import families

    print(families.page() if options.markdown else "\n".join(families.family_lines()))


def _export(options: Namespace) -> None:
    from atr.cli.export import export

    given = (options.vlm, options.selector, options.keep, options.to, options.folder, options.check)
    sys.exit(export(*given))


def _reruns(options: Namespace) -> None:
    from atr.cli.reruns import rerun_lines

    print("\n".join(rerun_lines(options.files)))


if __name__ == "__main__":
    main()
