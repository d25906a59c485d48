"""The `dpo-fast` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from dpo_fast.config import DemoConfig, DPOConfig, ScoreConfig, TrainingError, UserError

RUN_FAILED = 1
USER_MISTAKE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (the run stopped itself) or 2 (a user's mistake)."""
    # These libraries draw bars and print advice of their own; this program has one progress line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = make_parser().parse_args(normalize(list(sys.argv[1:] if argv is None else argv)))
    name = arguments.subcommand
    settings = arguments[name].as_dict()
    settings.pop("config", None)
    command = COMMANDS[name]
    try:
        command.run(command.config(**settings))
    except UserError as error:
        print(f"dpo-fast {name}: error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except TrainingError as error:
        print(f"dpo-fast {name}: stopped: {error}", file=sys.stderr)
        return RUN_FAILED
    except KeyboardInterrupt:
        print(f"dpo-fast {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_train(config: DPOConfig) -> None:
    """`dpo-fast train`."""
    from dpo_fast.trainer import train

    train(config)


def run_score(config: ScoreConfig) -> None:
    """`dpo-fast score`."""
    from dpo_fast.score import score

    score(config)


def run_demo(config: DemoConfig) -> None:
    """`dpo-fast demo`."""
    from dpo_fast.demo import run_demo

    run_demo(Path(config.out), quick=config.quick, seed=config.seed)


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings, what runs it, a line of help and its usage."""

    config: type[Any]
    run: Callable[[Any], None]
    help: str
    usage: str


COMMANDS = {
    "demo": Command(DemoConfig, run_demo, "the whole loop on this machine, small, with pictures", "[--out DIR]"),
    "train": Command(
        DPOConfig, run_train, "preference rows -> checkpoint", "--model M --data D [--output_dir DIR] [--key value ...]"
    ),
    "score": Command(
        ScoreConfig, run_score, "log-probs of a model, per pair and per token", "--model M --data D --out F.jsonl"
    ),
}


class Parser(ArgumentParser):
    """jsonargparse's parser with an error of one line that names the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print and leave with exit code 2."""
        known = [option for action in self._actions for option in action.option_strings]
        words = _plain_words(message).split()
        guesses = [
            near for word in words if word.startswith("--") for near in difflib.get_close_matches(word, known, 1)
        ]
        hint = f" (did you mean {guesses[0]}?)" if "unrecognized" in message and guesses else ""
        prog = self.prog.replace(" [options]", "")
        print(f"{prog}: error: {' '.join(words)}{hint}\nsee: {prog} --help", file=sys.stderr)
        sys.exit(USER_MISTAKE)


def _plain_words(message: str) -> str:
    """jsonargparse's message on a value of a wrong type as `--max_length abc: expected int or null`; others as is."""
    field = re.search(r'Parser key "(\w+)"', message)
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    types = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", message)
    if not (field and given and types):
        return message
    expected = " or ".join("null" if name == "NoneType" else name or choices for name, choices in types)
    return f"--{field[1]} {given[1]}: expected {expected}"


def make_parser() -> Parser:
    """The parser of all commands; options are the fields of each command's settings."""
    from importlib.metadata import version

    parser = Parser(
        prog="dpo-fast", allow_abbrev=False, description="Preference training at the speed of the bare matrix products."
    )
    parser.add_argument("--version", action="version", version=f"dpo-fast {version('dpo-fast')}")
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        usage = f"dpo-fast {name} {command.usage}"
        subparser = Parser(prog=f"dpo-fast {name}", usage=usage, description=command.help, allow_abbrev=False)
        subparser.add_argument("--config", action="config", help="YAML file with any of these settings")
        subparser.add_class_arguments(command.config)
        subcommands.add_subcommand(name, subparser, help=command.help)
    return parser


def normalize(argv: list[str]) -> list[str]:
    """Dashes and underscores in option names are the same, and a yes-or-no option alone means yes."""
    fields = {field.name: field.type for command in COMMANDS.values() for field in dataclasses.fields(command.config)}
    normal = []
    for word, following in pairwise([*argv, "--"]):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.replace("-", "_") not in fields:
            normal.append(word)
            continue
        name = name.replace("-", "_")
        normal.append(f"--{name}{equals}{value}")
        if fields[name] == "bool" and not equals and following.startswith("--"):
            normal.append("true")
    return normal


if __name__ == "__main__":
    sys.exit(main())
