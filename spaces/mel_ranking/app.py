"""The metric's Space: a form around `compute`, with the card below it."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("hf-mel/mel_ranking"))
