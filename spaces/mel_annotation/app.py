"""Space of the metric: a form for `compute`, with the card below it."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("hf-mel/mel_annotation"))
