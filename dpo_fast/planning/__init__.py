"""What fits on which GPU and what it costs, from a model's configuration alone.

shapes      a model's sizes, from its configuration on the meta device or by name
hardware    GPUs: memory, products per second, bandwidth
setting     how a model is trained, and what its packs hold
memory      bytes at the peak of a step: the closed formula
measured    efficiencies and optimizers, each with its source
roofline    seconds of a step
choose      the fastest setting that fits, and the next best
forecast    the plan of a run: refuses, compares with the first step
view        the plan as a table and as a picture
command     `dpo-fast plan`
"""
