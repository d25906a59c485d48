"""The packed layout: groups of a prompt and its answers, laid side by side.

layout   Group, PackedBatch, pack: the one layout that everything else shares, with a diagram
bins     best fit decreasing, and which groups make a step
balance  rows dealt to processes so that their packs cost alike
budget   tokens of a pack
"""
