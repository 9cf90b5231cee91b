"""Adapters by the name that a recipe gives them."""

ADAPTERS = {"lora": "kit.adapters.lora:Lora", "full": "kit.adapters.full:Full"}
