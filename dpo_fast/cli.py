"""The `dpo-fast` command. Heavy imports are deferred until a command needs them."""

from __future__ import annotations

import dataclasses
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

from dpo_fast.config import (
    DemoConfig,
    DPOConfig,
    EvalConfig,
    InspectConfig,
    LabelConfig,
    PairConfig,
    PlanConfig,
    ReportConfig,
    SampleConfig,
    ScoreConfig,
)
from dpo_fast.config_file import check_config_file
from dpo_fast.errors import (
    INTERRUPTED,
    STOPPED,
    USER_MISTAKE,
    PeerError,
    TrainingError,
    UserError,
    exit_code,
    is_interrupt,
)
from dpo_fast.option_names import described


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0, 1 (the run stopped itself, or a file could not be written), 2 (a user's mistake), 75 (a signal stopped the run,
    which can be continued) or 130 (interrupted).
    """
    # These libraries print their own bars and advice; this program has one progress line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    words = normalize(list(sys.argv[1:] if argv is None else argv))
    parser = make_parser(wants_help=not {"-h", "--help"}.isdisjoint(words))
    if not words:
        parser.print_help()
        return 0
    name = words[0]
    try:
        if name in COMMANDS:
            check_config_files(words, COMMANDS[name])
        settings = parser.parse_args(words)[name].as_dict()
        settings.pop("config", None)
        code = COMMANDS[name].run(COMMANDS[name].config(**settings))
    except (UserError, TrainingError) as error:
        if not isinstance(error, PeerError):  # it was said by the process that failed
            what = "error" if isinstance(error, UserError) else "stopped"
            print(f"dpo-fast {name}: {what}: {error}", file=sys.stderr)
        return exit_code(error)
    except (KeyboardInterrupt, Exception) as error:
        if not is_interrupt(error):
            raise
        print(f"dpo-fast {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code or 0


def check_config_files(words: Sequence[str], command: Command) -> None:
    """Refuse a file of `--config` with a mistake in it; the parser would name the first one, and no file.

    Raises:
        UserError: it names the file.
    """
    known = {field.name for field in dataclasses.fields(command.config)}
    for word, following in pairwise([*words, "--"]):
        option, equals, value = word.partition("=")
        if option == "--config" and (equals or not following.startswith("--")):
            check_config_file(value if equals else following, known)


def run_train(config: DPOConfig) -> int:
    """`dpo-fast train`."""
    from dpo_fast.training.launch import launch, needs_launch
    from dpo_fast.training.run import train

    if needs_launch(config):
        return launch(config)
    return STOPPED if train(config).stopped else 0


def run_score(config: ScoreConfig) -> None:
    """`dpo-fast score`."""
    from dpo_fast.analysis.score import score

    score(config)


def run_sample(config: SampleConfig) -> None:
    """`dpo-fast sample`."""
    from dpo_fast.curate.sample import run_sample

    run_sample(config)


def run_label(config: LabelConfig) -> None:
    """`dpo-fast label`."""
    from dpo_fast.curate.label import run_label

    run_label(config)


def run_pair(config: PairConfig) -> None:
    """`dpo-fast pair`."""
    from dpo_fast.curate.pair import run_pair

    run_pair(config)


def run_eval(config: EvalConfig) -> None:
    """`dpo-fast eval`."""
    from dpo_fast.analysis.evaluate import evaluate

    evaluate(config)


def run_inspect(config: InspectConfig) -> None:
    """`dpo-fast inspect`."""
    if config.reference:
        from dpo_fast.analysis.inspection import inspect_rows

        inspect_rows(config)
    else:
        from dpo_fast.analysis.xray import xray_rows

        xray_rows(config)


def run_report(config: ReportConfig) -> None:
    """`dpo-fast report`."""
    from dpo_fast.analysis.run_report import write_report

    write_report(config)


def run_demo(config: DemoConfig) -> None:
    """`dpo-fast demo`."""
    from dpo_fast.demo.run import run_demo

    run_demo(Path(config.out), quick=config.quick, seed=config.seed)


def run_plan(config: PlanConfig) -> None:
    """`dpo-fast plan`."""
    from dpo_fast.planning.command import run_plan
    from dpo_fast.training.optimizers import OPTIMIZERS

    run_plan(config, optimizers=tuple(OPTIMIZERS))


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings, function, help line and usage, and the field that takes a bare first argument.

    The function may return an exit code.
    """

    config: type[Any]
    run: Callable[[Any], int | None]
    help: str
    usage: str
    positional: str | None = None


COMMANDS = {
    "demo": Command(DemoConfig, run_demo, "the whole loop in small, on this machine, with plots", "[--out DIR]"),
    "train": Command(
        DPOConfig, run_train, "preference rows -> checkpoint", "--model M --data D [--output_dir DIR] [--key value ...]"
    ),
    "score": Command(
        ScoreConfig, run_score, "log-probs of a model, per pair and per token", "--model M --data D --out F.jsonl"
    ),
    "sample": Command(
        SampleConfig, run_sample, "prompts -> several answers each", "--model M --data PROMPTS --out F.jsonl"
    ),
    "label": Command(
        LabelConfig,
        run_label,
        "answers -> scores, from signals or people",
        "--data SAMPLES.jsonl --out F.jsonl (--signals S | --by-hand | --terminal)",
    ),
    "pair": Command(PairConfig, run_pair, "scored answers -> preference rows", "--data LABELLED.jsonl --out F.jsonl"),
    "eval": Command(
        EvalConfig,
        run_eval,
        "a trained model against its reference: accuracy, margins, calibration, win rate",
        "--model M --reference R (--data PAIRS | --prompts P --signals S) [--out F.json]",
    ),
    "inspect": Command(
        InspectConfig,
        run_inspect,
        "rows token by token: as they are trained on, or under policy and reference",
        "--model M --data D [--reference R] [--rows 0-20] [--out F.html]",
    ),
    "plan": Command(
        PlanConfig,
        run_plan,
        "what fits in memory and how long it takes, before anything is loaded",
        "--model M [--gpu h100-80] [--gpus K] [--data D] [--json true] [--out F.png]",
    ),
    "report": Command(ReportConfig, run_report, "write report.html for a run", "DIR [--out F.html]", positional="run"),
}


class Parser(ArgumentParser):
    """jsonargparse's parser, but errors take one line and suggest the closest option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit with code 2."""
        known = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        words = _plain_words(message).split()
        names = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
        if words[:1] == ["unrecognized"] and names:
            words = ["unknown options:", described([name.replace("-", "_") for name in names], known)]
        prog = self.prog.replace(" [options]", "")
        print(f"{prog}: error: {' '.join(words)}\nsee: {prog} --help", file=sys.stderr)
        sys.exit(USER_MISTAKE)


def _plain_words(message: str) -> str:
    """Shorten type errors to `--max_length abc: expected int or null`; leave jsonargparse's other messages alone."""
    field = re.search(r'Parser key "(\w+)"', message)
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    types = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", message)
    if not (field and given and types):
        # jsonargparse's versions differ in the case of the first word and in the order of types.
        return message.replace("Unrecognized", "unrecognized")
    names = ["null" if name == "NoneType" else name or choices for name, choices in types]
    expected = " or ".join(sorted(names, key="null".__eq__))
    return f"--{field[1]} {given[1]}: expected {expected}"


def make_parser(*, wants_help: bool = False) -> Parser:
    """The parser of all commands; options are the fields of each command's settings.

    Only `--help` lists the losses, because that imports them and with them PyTorch.
    """
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
        if wants_help:
            _name_choices(subparser)
        subcommands.add_subcommand(name, subparser, help=command.help)
    return parser


def _name_choices(parser: Parser) -> None:
    """Add all losses, optimizers and signals to the help of the options that name them."""
    for action in parser._actions:
        if action.dest == "signals":
            from dpo_fast.curate.signals.registry import known_signals

            action.help = f"{action.help} Signals: {known_signals()}"
        if action.dest == "optim":
            from dpo_fast.training.optimizers import OPTIMIZERS

            action.help = f"{action.help} Optimizers: {', '.join(OPTIMIZERS)}"
        if action.dest == "loss_type":
            from dpo_fast.losses import LOSSES

            action.help = f"{action.help} Losses: {', '.join(sorted(LOSSES))}"


def normalize(argv: list[str]) -> list[str]:
    """Accept dashes for underscores in option names, and let a boolean option without a value mean true."""
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        return argv
    fields = {field.name: field.type for field in dataclasses.fields(command.config)}
    normal, words = argv[:1], argv[1:]
    if command.positional and words and not words[0].startswith("-"):
        words[:1] = [f"--{command.positional}", words[0]]
    for word, following in pairwise([*words, "--"]):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in fields:
            normal.append(word)
            continue
        normal.append(f"--{name}{equals}{value}")
        if fields[name] in ("bool", "bool | None") and not equals and following.startswith("--"):
            normal.append("true")
    return normal


if __name__ == "__main__":
    sys.exit(main())
