"""Processes that judge answers.

pool       hands out rows, and replaces processes that die or hang
handle     one such process, seen from outside
worker     the process itself: judges one answer at a time
heartbeat  which answer it is at, in shared memory
"""
