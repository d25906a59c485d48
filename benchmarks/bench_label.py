"""Time `dpo-fast label` on 100,000 answers with all built-in text signals.

    python benchmarks/bench_label.py --out benchmarks/results/label.json

The answers are generated from a seed and resemble what a model replies when asked for JSON with a number: JSON that
matches the schema or does not, JSON in a Markdown fence, prose, Python, truncated text. The timing covers the whole
command as a user runs it: reading, judging, logging, writing. Scores are compared with what the generator knows about
each answer; if one is wrong, no time is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import environment

PACKAGES = ("dpo-fast", "jsonschema", "regex")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "total": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
    },
    "required": ["name", "total"],
    "additionalProperties": False,
}
WORDS = [
    "the",
    "answer",
    "total",
    "of",
    "red",
    "apples",
    "and",
    "green",
    "pears",
    "in",
    "seven",
    "boxes",
    "is",
    "about",
]


def words(rng: random.Random, number: int) -> str:
    """Random prose."""
    return " ".join(rng.choices(WORDS, k=number))


def thing(rng: random.Random) -> dict[str, Any]:
    """An object that matches the schema."""
    tags = [words(rng, 1) for _ in range(rng.randrange(8))]
    return {"name": words(rng, 2), "total": rng.randrange(1000), "tags": tags}


def fitting(rng: random.Random) -> str:
    """JSON that matches the schema, on one line or several."""
    return json.dumps(thing(rng), indent=rng.choice([None, 2]))


def other_json(rng: random.Random) -> str:
    """JSON that does not match the schema."""
    return json.dumps(rng.choice([[thing(rng) for _ in range(5)], thing(rng) | {"more": words(rng, 30)}, 17]))


def python(rng: random.Random) -> str:
    """A few functions."""
    line = "def {}_{}(x):\n    for i in range(x):\n        x += i * {}\n    return [x, 'done']\n"
    return "\n".join(line.format(rng.choice(WORDS[3:6]), n, rng.random()) for n in range(rng.randrange(1, 9)))


KINDS = {
    "fitting": fitting,
    "other json": other_json,
    "fenced": lambda rng: f"```json\n{fitting(rng)}\n```",
    "prose": lambda rng: f"The {words(rng, rng.randrange(5, 200))} {rng.randrange(1000)}.",
    "python": python,
    "cut off": lambda rng: fitting(rng)[:-3],
}


def generate(num_rows: int, answers_per_row: int, seed: int) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Rows, and the kind of each answer."""
    rng = random.Random(seed)
    rows, kinds = [], []
    for number in range(num_rows):
        of_row = rng.choices(list(KINDS), k=answers_per_row)
        responses = [KINDS[kind](rng) for kind in of_row]
        row = {"prompt": f"Prompt {number}", "responses": responses, "gold": rng.randrange(1000), "word": "apples"}
        rows.append(row | {"exact": responses[0], "votes": [rng.random() for _ in responses]})
        kinds.append(of_row)
    return rows, kinds


def signals(schema: Path) -> list[str]:
    """All signals that need neither a model nor a user's program."""
    return [
        *("compiles:python", "json", "json:object", "json:array", f"json_schema:{schema}"),
        *(r"regex:(?i)total\W+\d+", "number:gold", "number:gold:squared", "exact:exact", "contains:word"),
        *("length:20-500", "field:votes"),
    ]


def check(labelled: list[dict[str, Any]], kinds: list[list[str]], schema: str) -> None:
    """Compare the scores with what the generator knows."""
    for row, of_row in zip(labelled, kinds, strict=True):
        found = row["signals"]
        assert found[schema] == [kind == "fitting" for kind in of_row]
        assert found["json"] == [kind in ("fitting", "other json") for kind in of_row]
        assert all(score == 1 for score, kind in zip(found["compiles:python"], of_row, strict=True) if kind == "python")
        assert found["field:votes"] == row["votes"]
        assert found["contains:word"] == ["apples" in response for response in row["responses"]]
        assert found["length:20-500"] == [20 <= len(response) <= 500 for response in row["responses"]]
        assert found["exact:exact"] == [response == row["responses"][0] for response in row["responses"]]
        assert None not in row["scores"]


def main() -> int:
    """Generate, label, check, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 12_500), ("answers", 8), ("seed", 0), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--out", type=Path, help="write a JSON file here")
    args = parser.parse_args()
    rows, kinds = generate(args.rows, args.answers, args.seed)
    sizes = sorted(len(response) for row in rows for response in row["responses"])
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schema.json").write_text(json.dumps(SCHEMA))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        specs = signals(folder / "schema.json")
        command = [sys.executable, "-m", "dpo_fast.cli", "label", "--data", str(folder / "rows.jsonl")]
        command += ["--out", str(folder / "out.jsonl"), "--signals", json.dumps(specs), "--overwrite", "true"]
        command += ["--num_workers", str(args.workers)]
        for _ in range(args.rounds):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        labelled = [json.loads(line) for line in (folder / "out.jsonl").open()]
        check(labelled, kinds, specs[4])
    print(f"{len(sizes)} answers of {sizes[0]} to {sizes[-1]} characters (median {sizes[len(sizes) // 2]}),")
    print(f"{len(specs)} signals, {args.workers} workers, {os.cpu_count()} processors:")
    print(", ".join(f"{second:.1f} s" for second in seconds))
    if args.out:
        shape = {"rows": args.rows, "answers": args.answers, "seed": args.seed, "workers": args.workers}
        lengths = {"shortest": sizes[0], "median": sizes[len(sizes) // 2], "longest": sizes[-1]}
        names = [spec.partition(f":{name}")[0] for spec in specs]
        results = {"environment": environment(PACKAGES), **shape, "characters": lengths, "signals": names}
        results |= {"processors": os.cpu_count(), "seconds": seconds}
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
