"""`dpo-fast demo`: the whole loop on this machine.

run     the stages in order
stages  the settings of each stage's command
folder  what a demo writes, and where
show    what it prints and plots
task    the task that is learned, and the model that learns it
"""
