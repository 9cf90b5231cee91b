"""Training objectives by the name that a recipe gives them."""

OBJECTIVES = {"flow_matching": "kit.objectives.flow_matching:FlowMatching"}
