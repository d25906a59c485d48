"""Reports of made-up runs that are well, and how often they are warned of: python tests/healthy_runs.py 5000"""

import sys
from collections import Counter

import numpy as np

from dpo_fast.config import DPOConfig
from dpo_fast.training.warning_signs import WarningSigns

BETA = 0.1
# How the mean log-ratios of chosen and rejected answers move from start to end, in nats.
KINDS = {
    "nothing is learned": (0.0, 0.0),
    "chosen rise, rejected fall": (6.0, -12.0),
    "chosen stay, rejected fall": (0.0, -20.0),
    "both rise, chosen faster": (15.0, 5.0),
    "chosen dip by half a nat": (-0.5, -8.0),
}


def report(chosen, rejected, chosen_len, rejected_len, *, beta=BETA, **more):
    """The row of these pairs: log-ratios in nats, lengths in tokens, one of each per pair."""
    chosen, rejected = beta * np.asarray(chosen), beta * np.asarray(rejected)
    margin, gap = chosen - rejected, np.asarray(chosen_len) - np.asarray(rejected_len)
    varies = margin.std() > 0 and gap.std() > 0
    return {
        "num_pairs": len(chosen),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "rewards/chosen_std": chosen.std(),
        "rewards/rejected_std": rejected.std(),
        "rewards/margins_std": margin.std(),
        "lengths/chosen": np.mean(chosen_len),
        "lengths/rejected": np.mean(rejected_len),
        "lengths/gap_std": gap.std(),
        "lengths/margins_correlation": np.corrcoef(margin, gap)[0, 1] if varies else 0.0,
        **more,
    }


def healthy_run(rng, kind):
    """Rows of one run, and its number of different pairs: any size of report, any noise, margins that go a bit with
    length (correlation up to 0.4), chosen answers up to 1.5 times as long."""
    to_chosen, to_rejected = KINDS[kind]
    pairs_per_report = int(rng.choice([1, 2, 4, 8, 32, 80]))
    num_reports = int(np.clip(2000 // pairs_per_report, 25, 250))
    length, longer = rng.uniform(10, 300), rng.uniform(1.0, 1.5)
    size, correlation, heavy = rng.uniform(0.3, 10), rng.uniform(0, 0.4), rng.random() < 0.3
    rows = []
    for progress in np.linspace(0, 1, num_reports):
        lengths = np.maximum(1, length * np.array([[longer], [1.0]]) * rng.lognormal(0, 0.4, (2, pairs_per_report)))
        noise = rng.standard_t(3, (2, pairs_per_report)) if heavy else rng.normal(size=(2, pairs_per_report))
        noise *= size * (0.1 + progress)
        # Half of it on each side, so that margins have this correlation with the difference of lengths.
        gap = (lengths[0] - lengths[1] - length * (longer - 1)) / (0.4 * length * np.hypot(longer, 1))
        by_length = noise.std() * correlation * gap / np.sqrt(2 * (1 - correlation**2))
        chosen, rejected = progress * to_chosen + noise[0] + by_length, progress * to_rejected + noise[1] - by_length
        rows.append(report(chosen, rejected, *lengths))
    return rows, int(rng.choice([70, 300, 10**5]))


def false_alarms(num_runs, seed=0):
    """For each kind of run, how many of `num_runs` were warned of; and the warnings."""
    rng = np.random.default_rng(seed)
    counts, texts = Counter(dict.fromkeys(KINDS, 0)), []
    for kind in KINDS:
        for _ in range(num_runs):
            rows, num_pairs = healthy_run(rng, kind)
            signs = WarningSigns(DPOConfig(beta=BETA), num_pairs)
            found = [text for row in rows for text in signs.observe(row)]
            counts[kind] += bool(found)
            texts += found
    return counts, texts


if __name__ == "__main__":
    number = int(sys.argv[1])
    counts, texts = false_alarms(number)
    for kind, count in counts.items():
        print(f"{kind:<28} {count} of {number}")
    print(*Counter(text.split(":")[0] for text in texts).items())
