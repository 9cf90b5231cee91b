"""Measures of talking video, on finished pixels and sound; nothing here needs the model's parts.

T frames, height and width in pixels; frames are uint8 RGB.
"""

MEASURES = {"talk": "kit.metrics.settings:MeasureSettings"}
"""What is known of a video, by the name that a recipe gives it."""
