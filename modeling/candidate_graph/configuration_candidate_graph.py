"""Configuration of NCEL and DGCN, graph convolutions over the candidates of a document."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedConfig


class CandidateGraphConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CandidateGraphModel`]. The defaults are NCEL's. DGCN has `graph="dynamic"`, `window=None`,
    `graph_size=100`, `num_graph_layers=7`, `share_layers=True`, `mlp_scale=1`, `loss="margin"`.

    Args:
        vocab_size, word_dim (`int`, *optional*, defaults to 30522 and 300):
            Shape of the table of word vectors.
        train_words (`bool`, *optional*, defaults to `False`):
            Whether to train the word vectors. Set it if they start untrained.
        local_scale (`int` or `float`, *optional*, defaults to 1):
            Value at which the diagonal of the attention over context words starts. About 20 suits word vectors of length 1.
        mlp_sizes (`list[int]`, *optional*, defaults to `[2000]`):
            Widths of the hidden layers between the features of a candidate and its node.
        mlp_scale (`int` or `float`, *optional*, defaults to 0.2):
            Factor of the result.
        graph (`str`, *optional*, defaults to `"static"`):
            The edges between candidates of different mentions. `"static"` (NCEL): cosine of their entities' vectors.
            `"dynamic"` (DGCN): learned from the nodes, anew in each layer. `"none"`: no edges, so that each mention is linked
            alone.
        graph_size (`int`, *optional*, defaults to 1):
            Width of a node. With 1, there is no LayerNorm, which would make one number constant.
        num_graph_layers (`int`, *optional*, defaults to 2):
            Number of graph layers. After every second one, the input of the first of both is added.
        share_layers (`bool`, *optional*, defaults to `False`):
            Whether all layers have the same weights.
        window (`int`, *optional*, defaults to 3):
            Number of mentions on either side, in the order of the document, that a mention is connected to; `None` means all.
        threshold (`int` or `float`, *optional*, defaults to 0.9):
            Cosine below which a static edge is cut.
        rho (`int` or `float`, *optional*, defaults to 0.1):
            Factor of static edges. Each node is connected to itself with weight 1.
        similarity_hidden_size (`int`, *optional*, defaults to 50):
            Width of the layer that merges the similarities of two nodes into a dynamic edge.
        loss (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"`: cross entropy of the gold among the candidates. `"margin"`: hinge, a mean over the other candidates.
        margin (`int` or `float`, *optional*, defaults to 0.1):
            Margin of the hinge.
        dropout (`int` or `float`, *optional*, defaults to 0.1):
            Dropout after the hidden layers.
    """

    model_type: ClassVar[str] = "candidate_graph"

    vocab_size: int = 30522
    word_dim: int = 300
    train_words: bool = False
    local_scale: int | float = 1.0
    mlp_sizes: list[int] | tuple[int, ...] = (2000,)
    mlp_scale: int | float = 0.2
    graph: str = "static"
    graph_size: int = 1
    num_graph_layers: int = 2
    share_layers: bool = False
    window: int | None = 3
    threshold: int | float = 0.9
    rho: int | float = 0.1
    similarity_hidden_size: int = 50
    loss: str = "softmax"
    margin: int | float = 0.1
    dropout: int | float = 0.1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.mlp_sizes = list(self.mlp_sizes)
        for field, values in (("graph", ("none", "static", "dynamic")), ("loss", ("softmax", "margin"))):
            if getattr(self, field) not in values:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, values))}.")
        for field in ("vocab_size", "word_dim", "graph_size", "similarity_hidden_size", "window"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
        if any(size < 1 for size in self.mlp_sizes):
            raise ValueError(f"mlp_sizes={self.mlp_sizes} must be at least 1 each.")
        for field in ("num_graph_layers", "rho", "margin"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        for field in ("local_scale", "mlp_scale"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")


__all__ = ["CandidateGraphConfig"]
