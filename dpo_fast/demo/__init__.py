"""`dpo-fast demo`: the whole loop on this machine.

run   the commands in turn, and the picture
task  the small language that is learnt
"""
