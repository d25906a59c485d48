"""The packed layout: groups of a prompt and its answers, laid side by side.

layout   Group, PackedBatch, pack: the one layout that everything else shares, with a diagram
bins     best-fit decreasing, and which groups form a step
balance  deals rows to processes so that their packs cost about the same
budget   token budget of a pack
"""
