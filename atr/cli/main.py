"""The command `atr`: what an experiment costs, and ready-made experiments laid over params.yaml."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand; exits with 2 for wrong parameters, 1 for a file that cannot be read or written."""
    asked = _parser().parse_args(arguments)
    from atr.config import ConfigError

    try:
        asked.run(asked)
    except ConfigError as error:
        print(f"atr {asked.command}: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        sys.exit(f"atr {asked.command}: {' '.join(str(error).split())}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="atr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="what the current parameters will cost, before anything runs")
    plan.set_defaults(run=_plan)
    overlay = commands.add_parser("overlay", help="write the values of an experiment into params.yaml")
    overlay.add_argument("file", help="a ready-made experiment, such as experiments/llava-next.yaml")
    overlay.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="section.key=value",
        help="one more value, which wins over the file's; may be given again",
    )
    overlay.set_defaults(run=_overlay)
    for command in (plan, overlay):
        command.add_argument("--params", default="params.yaml", metavar="FILE", help="default: params.yaml")
    return parser


def _plan(asked: Namespace) -> None:
    from atr.cli import disk, plan
    from atr.stages import PRETRAIN_FEATURES

    costs = plan.load_plan(asked.params)
    disks = disk.inspect_disks(PRETRAIN_FEATURES.parents[1])
    print("\n".join(plan.lines(costs, disks)))
    for warning in plan.warnings(costs, disks):
        print(f"warning: {warning}", file=sys.stderr)


def _overlay(asked: Namespace) -> None:
    from atr.cli import overlay

    changes = overlay.apply(asked.file, asked.settings, asked.params)
    for key, (before, after) in changes.items():
        print(f"{key}: {before} -> {after}")
    print(f"{Path(asked.params)}: {len(changes)} values changed")


if __name__ == "__main__":
    main()
