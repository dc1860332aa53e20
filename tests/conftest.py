"""Hypothesis draws the same examples in every run, without a time limit for one."""

from hypothesis import settings

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("fixed")
