"""Training the frozen networks around a denoiser, for small bases of our own.

Tasks by the name that a recipe gives them.
"""

TASKS = {
    "video": "kit.pretraining.video:VideoCoding",
    "speech": "kit.pretraining.speech:SpeechFeatures",
    "words": "kit.pretraining.words:WordFeatures",
}
