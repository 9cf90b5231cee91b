"""Training parts by the name that a recipe gives them."""

OPTIMIZERS = {
    "adamw": "kit.training.optim:AdamW",
    "muon": "kit.training.optim:MuonSettings",
}
DROPOUTS = {"conditions": "kit.training.dropout:ConditionDropout"}
TRAINERS = {"lightning": "kit.training.trainer:Training"}
PREVIEWS = {"talk": "kit.training.previews:PreviewSettings"}
