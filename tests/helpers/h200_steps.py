"""Steps that were measured on an H200: `benchmarks/results/h200-step-2026-11-26.json`, part `8b dpo-fast 8`.

The packs are those that gpu_step.py's rows fall into (72 rows, seed 42, budget 8192): 654.64 tokens a pair, as there.
"""

from __future__ import annotations

from dpo_fast.planning.setting import PackLoad, Setting

SETTING = Setting(weight_bytes=2, optim="adamw_8bit")
PEAK_GIB = 81.103
# Step -> its packs and its milliseconds; the last one's are a profile's, and the efficiencies are fitted to it.
STEPS: dict[int, tuple[list[PackLoad], float]] = {
    4: ([PackLoad(4501, 6501, 3501, 1153822, 1656035, 140, 8)], 661.0),
    5: ([PackLoad(2445, 4465, 1435, 422004, 438107, 69, 8)], 488.5),
    6: ([PackLoad(7152, 8534, 6461, 2452941, 4258111, 244, 8)], 886.1),
    7: ([PackLoad(5732, 8674, 4261, 2091000, 2913249, 210, 8)], 755.1),
    8: ([PackLoad(7955, 10461, 6702, 3205674, 5282187, 299, 7), PackLoad(270, 292, 259, 24105, 44970, 6, 1)], 1070.3),
    9: ([PackLoad(4537, 8659, 2476, 1308688, 1340465, 150, 8)], 666.3),
}
FITTED_TO = 9
