"""ET, a reranker that is fitted without gradients: a forest of extremely randomised trees over features of a pair.

scikit-learn fits the forest. Its nodes are kept in tensors, so a fitted model is saved as safetensors, and is loaded and used
without scikit-learn. `README.md` in this folder says what of the original is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_extra_trees import ExtraTreesConfig

#: Number of texts to encode at once, on a CPU and on a GPU.
_BLOCK_TEXTS = (64, 512)


@dataclass
class ExtraTreesOutput(ModelOutput):
    """Output of [`ExtraTreesModel`], for M mentions with up to C candidates.

    Args:
        loss (`torch.Tensor` []): Mean negative log-likelihood of the pairs, if `labels` are given. It has no gradient.
        scores (`torch.Tensor` [M, C]): Probability that the mention means the candidate; -inf where a mention has no
            candidate.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class Forest(nn.Module):
    """Binary decision trees in tensors. Node numbers count through all N nodes of the T trees.

    A row goes to the left child if its value of `feature` is at most `threshold`. `left` is -1 in a leaf, whose `value` is
    the probability of the positive class.
    """

    left: torch.Tensor
    right: torch.Tensor
    feature: torch.Tensor
    root: torch.Tensor

    def __init__(self, num_trees: int, num_nodes: int):
        super().__init__()
        for name in ("left", "right"):
            self.register_buffer(name, torch.full((num_nodes,), -1))
        self.register_buffer("feature", torch.zeros(num_nodes, dtype=torch.int64))
        # Parameters, because transformers asks those for the device and dtype of a model.
        self.threshold = nn.Parameter(torch.zeros(num_nodes), requires_grad=False)
        self.value = nn.Parameter(torch.full((num_nodes,), 0.5), requires_grad=False)
        self.register_buffer("root", torch.zeros(num_trees, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the mean over the trees of the probability of each row of `x` [P, d], [P].

        Raises:
            ValueError: A child has a lower number than its node, so that there may be a cycle.
        """
        x = x.to(self.threshold.dtype)
        node = self.root.expand(len(x), -1)
        while True:
            child = self.left[node]
            inner = child >= 0
            if not inner.any():
                return self.value[node].mean(1)
            goes_left = x.gather(1, self.feature[node]) <= self.threshold[node]
            child = torch.where(goes_left, child, self.right[node])
            if (child <= node)[inner].any():
                raise ValueError("The forest is damaged: a node has a child that does not come after it.")
            node = torch.where(inner, child, node)


class ExtraTreesModel(PreTrainedModel):
    """ET as a reranker that scores each pair alone.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("runs/et_flags")  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("runs/et_flags")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows)])).scores  # [1, C] # doctest: +SKIP
    ```
    """

    config: ExtraTreesConfig
    config_class = ExtraTreesConfig
    base_model_prefix = "extra_trees"
    main_input_name = "pair_features"
    accepts_loss_kwargs = False  # the loss is a batch mean
    _no_split_modules = []
    # For the encoders. A forest has no attention.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    #: Pretrained submodules.
    backbone_names = ("text_model", "vision_model")
    example_unit = "mention"
    pairs_are_independent = True
    image_features_are_fixed = True

    def __init__(self, config: ExtraTreesConfig):
        super().__init__(config)
        if config.text_config is not None:
            self.text_model = _build_backbone(config.text_config, False)
        if config.vision_config is not None:
            self.vision_model = _build_backbone(config.vision_config, False)
        self.forest = Forest(config.n_estimators, config.num_nodes)
        self.post_init()
        self.train()  # freezes the encoders

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Forest):  # an unfitted forest; a checkpoint has its own
            init.constant_(module.left, -1)
            init.constant_(module.right, -1)
            init.constant_(module.value, 0.5)
            for buffer in (module.feature, module.threshold, module.root):
                init.zeros_(buffer)

    def train(self, mode: bool = True) -> ExtraTreesModel:
        """Sets the training mode, except for the encoders. Nothing has a gradient."""
        super().train(mode)
        self.requires_grad_(False)
        for name in self.backbone_names:
            if hasattr(self, name):
                getattr(self, name).eval()
        return self

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> ExtraTreesModel:
        """Builds an unfitted model with pretrained encoders.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of a text and an image encoder. Of a CLIP model, its image
                encoder is used.
            config: Fields of [`ExtraTreesConfig`].
        """
        encoders = {}
        for side, name in (("text", text), ("vision", vision)):
            if name is not None:
                encoder = AutoModel.from_pretrained(name)
                encoder = getattr(encoder, f"{side}_model", encoder)
                fields = encoder.config.to_dict()
                fields.pop("_name_or_path", None)  # may be a local path; the weights are saved with this model
                config.setdefault(f"{side}_config", fields)
                encoders[f"{side}_model"] = encoder
        model = cls(ExtraTreesConfig(**config))
        for name, encoder in encoders.items():
            target = getattr(model, name)
            names = target.state_dict()
            target.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in names})
        return model

    @property
    def reads_list_scores(self) -> bool:
        """Whether the scores need `pair_list_score`."""
        return self.config.list_scores

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns features [I, d] of I images [I, 3, H, W], the pooled outputs of the image encoder."""
        if not hasattr(self, "vision_model"):
            raise ValueError("This model sees no images. Give its configuration a vision_config.")
        output = self.vision_model(pixel_values=pixel_values)
        states, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if states.dim() == 4:  # a CNN's feature map [I, d, H, W]
            return states.mean((2, 3)) if pooled is None else pooled.flatten(1)
        return states[:, 0] if pooled is None else pooled

    @torch.no_grad()
    def pair_features(
        self,
        pair_features: torch.Tensor,
        pair_mask: torch.Tensor,
        pair_context: torch.Tensor | None = None,
        pair_list_score: torch.Tensor | None = None,
        pair_text_ids: torch.LongTensor | None = None,
        pair_text_mask: torch.Tensor | None = None,
        pair_mention_text: torch.LongTensor | None = None,
        pair_entity_text: torch.LongTensor | None = None,
        pair_mention_image: torch.LongTensor | None = None,
        pair_entity_image: torch.LongTensor | None = None,
        pair_pixel_values: torch.Tensor | None = None,
        pair_image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns all features [M, C, d] of M mentions with up to C candidates; 0 where `pair_mask` is False.

        Args:
            pair_features (`torch.Tensor` [M, C, f]): Features that the processor makes.
            pair_mask (`torch.Tensor` [M, C]): False where a mention has no C-th candidate.
            pair_context (`torch.Tensor` [M], *optional*): Ignored.
            pair_list_score (`torch.Tensor` [M, C], *optional*): Score of the list.
            pair_text_ids, pair_text_mask (`torch.Tensor` [T, L], *optional*): The T distinct texts of both sides.
            pair_mention_text, pair_entity_text (`torch.Tensor` [M] and [M, C], *optional*): Numbers among them.
            pair_mention_image, pair_entity_image (`torch.Tensor` [M] and [M, C], *optional*): Numbers among the I images;
                -1 for a missing image.
            pair_pixel_values (`torch.Tensor` [I, 3, H, W], *optional*): The distinct images.
            pair_image_features (`torch.Tensor` [I, d], *optional*): Outputs of `encode_images`, instead of the images.

        Raises:
            ValueError: An input that the configuration asks for is missing.
        """
        mask = pair_mask.bool()
        columns = [pair_features.float()]
        if self.config.list_scores:
            if pair_list_score is None:
                raise ValueError("The model reads the score of the list, but the rows of the candidates have none.")
            columns.append(pair_list_score.float().unsqueeze(-1))
        if hasattr(self, "text_model"):
            if pair_text_ids is None or pair_text_mask is None:
                raise ValueError("The model reads texts, but the batch has none. Give the processor use_text=True.")
            vectors = F.normalize(self._text_vectors(pair_text_ids, pair_text_mask), dim=-1)
            cosine = (vectors[pair_mention_text].unsqueeze(1) * vectors[pair_entity_text]).sum(-1)
            columns.append(cosine.unsqueeze(-1))
        if hasattr(self, "vision_model"):
            if pair_mention_image is None or pair_entity_image is None:
                raise ValueError("The model sees images, but the batch has none. Give the processor use_images=True.")
            if pair_image_features is None and pair_pixel_values is not None:
                pair_image_features = self.encode_images(pair_pixel_values)
            similarity = torch.zeros_like(columns[0][..., 0])
            if pair_image_features is not None:
                vectors = F.normalize(pair_image_features.float(), dim=-1)
                similarity = (
                    vectors[pair_mention_image.clamp(min=0)].unsqueeze(1) * vectors[pair_entity_image.clamp(min=0)]
                ).sum(-1)
                seen = (pair_mention_image >= 0).unsqueeze(1) & (pair_entity_image >= 0)
                similarity = similarity.masked_fill(~seen, 0.0)
            columns.append(similarity.unsqueeze(-1))
        return torch.cat(columns, -1).masked_fill(~mask.unsqueeze(-1), 0.0)

    def _text_vectors(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the mean states [T, d] of T texts."""
        block = _BLOCK_TEXTS[ids.device.type == "cuda"]
        parts = []
        for part, part_mask in zip(ids.split(block), mask.split(block), strict=True):
            states = self.text_model(input_ids=part, attention_mask=part_mask).last_hidden_state
            parts.append(masked_mean(states.float(), part_mask))
        return torch.cat(parts)

    def fit(self, features: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> None:
        """Fits the forest.

        Args:
            features (`torch.Tensor` [P, d]): Features of P pairs.
            labels (`torch.Tensor` [P]): True for a pair of a mention and its gold.
            seed (`int`, *optional*, defaults to 0): Seed of the random splits.

        Raises:
            ImportError: scikit-learn is not installed.
            ValueError: All pairs have the same label.
        """
        try:
            from sklearn.ensemble import ExtraTreesClassifier
        except ImportError as error:
            raise ImportError('Fitting a forest needs scikit-learn. Run pip install "hf_mel[trees]".') from error
        if bool(labels.all()) or not bool(labels.any()):
            raise ValueError("A forest needs pairs with the gold and pairs with another entity.")
        config = self.config
        classifier = ExtraTreesClassifier(
            n_estimators=config.n_estimators,
            max_depth=config.max_depth,
            min_samples_leaf=config.min_samples_leaf,
            max_features=config.max_features,
            random_state=seed,
        )
        classifier.fit(features.cpu().float().numpy(), labels.cpu().bool().numpy())
        self._set_trees([estimator.tree_ for estimator in classifier.estimators_])
        config.num_features = features.shape[1]

    def _set_trees(self, trees) -> None:
        """Replaces the forest by the trees of scikit-learn."""
        sizes = torch.tensor([tree.node_count for tree in trees])
        roots = sizes.cumsum(0) - sizes
        forest = Forest(len(trees), int(sizes.sum()))
        forest.root.copy_(roots)
        for tree, first, size in zip(trees, roots.tolist(), sizes.tolist(), strict=True):
            nodes = slice(first, first + size)
            for name, children in (("left", tree.children_left), ("right", tree.children_right)):
                number = torch.as_tensor(children)
                getattr(forest, name)[nodes] = torch.where(number >= 0, number + first, -1)
            forest.feature[nodes] = torch.as_tensor(tree.feature).clamp(min=0)
            forest.threshold[nodes] = _rounded_down(torch.as_tensor(tree.threshold))
            counts = torch.as_tensor(tree.value)[:, 0]  # shares or counts of both classes, by version
            forest.value[nodes] = (counts[:, 1] / counts.sum(1)).float()
        self.config.num_nodes = int(sizes.sum())
        self.forest = forest.to(self.forest.value.device)

    def forward(
        self,
        pair_features: torch.Tensor,
        pair_mask: torch.Tensor,
        labels: torch.LongTensor | None = None,
        **pair_inputs: Any,
    ) -> ExtraTreesOutput:
        """Scores the candidates of M mentions.

        Args:
            pair_features, pair_mask, pair_inputs: As in [`ExtraTreesModel.pair_features`].
            labels (`torch.Tensor` [M], *optional*): Column of each mention's gold; -100 excludes a mention from the
                loss.
        """
        mask = pair_mask.bool()
        features = self.pair_features(pair_features, mask, **pair_inputs)
        if self.config.num_features not in (None, features.shape[-1]):
            raise ValueError(
                f"The forest was fitted on {self.config.num_features} features, but the batch has {features.shape[-1]}. "
                "Use the processor that is saved with the model."
            )
        scores = torch.full(mask.shape, -torch.inf, device=mask.device)
        scores[mask] = self.forest(features[mask]).float()
        loss = None
        if labels is not None:
            used = mask & (labels >= 0).unsqueeze(1)
            gold = torch.arange(mask.shape[1], device=mask.device) == labels.unsqueeze(1)
            probability = scores[used].clamp(1e-6, 1 - 1e-6)  # a leaf may be certain and wrong
            loss = F.binary_cross_entropy(probability, gold[used].float()) if used.any() else probability.sum()
        return ExtraTreesOutput(loss=loss, scores=scores)


def _rounded_down(threshold: torch.Tensor) -> torch.Tensor:
    """Returns the largest float32 values that are at most `threshold` (float64), which float32 values compare to alike."""
    rounded = threshold.float()
    lower = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.double() > threshold, lower, rounded)


# Copied from modeling/mimic/modeling_mimic.py
def _build_backbone(config, pooling_layer: bool) -> PreTrainedModel:
    """Builds an untrained encoder; `pooling_layer` is ignored by encoders whose pooling layer is not optional."""
    try:
        return AutoModel.from_config(config, add_pooling_layer=pooling_layer)
    except TypeError:  # the encoder has no argument `add_pooling_layer`
        return AutoModel.from_config(config)


# Copied from modeling/mimic/scoring_mimic.py
def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of [B, L, d] over the L positions where `mask` [B, L] is 1."""
    mask = mask.to(x.dtype).unsqueeze(-1)
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


__all__ = ["ExtraTreesModel"]
