"""Samplers by the name that a recipe gives them."""

SAMPLERS = {"talk": "kit.sampling.pipeline:TalkSampler"}
