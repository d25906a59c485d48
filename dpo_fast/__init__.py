"""Preference training at the speed of the bare matrix products."""
