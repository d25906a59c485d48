"""The loop.

run            `train`: from rows to a prepared loop
loop           steps, reports, checkpoints, the final model
step           what a pack adds to a step
settings       what no run can have
guards         what stops a run
metrics        what a run reports
optimizers     optimizers and schedules
checkpoint     what can be resumed
warning_signs  what a run is warned of
"""
