"""Prompts that ask for JSON, for the loop in docs/curate.md. Training and held-out prompts share no subject.

python benchmarks/json_prompts.py --train prompts.jsonl --held_out held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SUBJECTS = {
    "a book": ["title", "author", "year", "pages"],
    "a planet": ["name", "moons", "radius_km", "has_rings"],
    "a recipe": ["dish", "minutes", "servings", "ingredients"],
    "a pet": ["name", "species", "age", "weight_kg"],
    "a city": ["name", "country", "population", "river"],
    "a song": ["title", "artist", "seconds", "genre"],
    "a bicycle": ["brand", "gears", "color", "price"],
    "a film": ["title", "director", "year", "rating"],
    "a tree": ["species", "height_m", "evergreen", "age"],
    "a job offer": ["role", "company", "salary", "remote"],
    "a train trip": ["from", "to", "departure", "stops"],
    "a phone": ["model", "memory_gb", "color", "price"],
    "a customer": ["name", "email", "orders", "is_member"],
    "a football match": ["home", "away", "score", "stadium"],
    "a mountain": ["name", "height_m", "country", "first_ascent"],
    "a hotel room": ["number", "beds", "price", "has_view"],
    "a plant": ["name", "water_days", "light", "edible"],
    "a lesson": ["subject", "teacher", "room", "minutes"],
    "a painting": ["title", "painter", "year", "museum"],
    "a parcel": ["id", "weight_kg", "destination", "express"],
}
REQUESTS = (
    "Describe {subject} as a JSON object with the keys {keys}. Reply with JSON only.",
    "Write one JSON object for {subject} with these keys: {keys}. No explanation.",
    "Return {subject} in JSON. Keys: {keys}. Output only the JSON object.",
    "I need {subject} as JSON, with {keys}. Answer with the object alone.",
    "Give me a JSON record of {subject} with the fields {keys}. Nothing else.",
)
TRAIN_SUBJECTS = 8


def make_prompts(subjects: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` distinct prompts about `subjects`, with two to four keys each."""
    found: dict[str, None] = {}
    while len(found) < count:
        subject = subjects[len(found) % len(subjects)]
        keys = rng.sample(SUBJECTS[subject], rng.randint(2, 4))
        found[rng.choice(REQUESTS).format(subject=subject, keys=", ".join(keys))] = None
    return list(found)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held_out", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=40)
    parser.add_argument("--num_held_out", type=int, default=60)
    arguments = parser.parse_args()
    rng = random.Random(0)
    subjects = rng.sample(sorted(SUBJECTS), len(SUBJECTS))
    for path, own, count in (
        (arguments.train, subjects[:TRAIN_SUBJECTS], arguments.num_train),
        (arguments.held_out, subjects[TRAIN_SUBJECTS:], arguments.num_held_out),
    ):
        rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in make_prompts(own, count, rng)]
        path.write_text("".join(rows))


if __name__ == "__main__":
    main()
