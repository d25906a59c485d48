"""Processes that judge answers.

pool    starts them, and ends those that do not come back
worker  judges one answer at a time
"""
