"""Base models by the name that a recipe gives them."""

BASES = {"wan": "kit.models.wan_base:WanBase"}
