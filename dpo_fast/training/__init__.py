"""The training loop.

run            `train`: rows -> plan -> policy -> reference -> a `Trainer`
as_planned     the plan against the memory there is
plan           batch, token budget, precision and steps, decided once
ranks          who this process is, and what is summed over processes
adapters       what an adapter starts from, and what is written at its end
references     the reference of a run
loop           steps, evaluation, checkpoints, the final model
step           what a pack adds to a step
reporter       metrics file, progress line, warnings
signals        SIGTERM, Ctrl-C and SIGHUP
run_folder     one run and one process in a folder
resume         which settings may change, and what must be the same
settings       what is refused before anything runs
guards         what stops a run
metrics        what a run reports
optimizers     optimizers by name, and schedules
fused_adamw    the kernel of `adamw_8bit_fused` as a PyTorch optimizer
optimizer_states  conversions between the states of three optimizers
gradients      clipping, and the release of gradients during the backward
checkpoint     what a run is resumed from
warning_signs  what a run is warned of
"""
