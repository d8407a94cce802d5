"""GENRE and "Autoregressive", rerankers that score an entity by the probability of generating its name.

The score of a candidate is the mean log-probability of its name's tokens, given the mention in its context. It is computed
exactly, by reading the whole name at once; [`AutoregressiveModel.generate_names`] searches a trie of names instead.
`README.md` in this folder says what of both originals is known, and where this code differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, EncoderDecoderConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .configuration_autoregressive import AutoregressiveConfig
from .trie_autoregressive import NameTrie

#: Number of names to decode at once without gradients, on a CPU and on a GPU. Their logits are as wide as the vocabulary.
_BLOCK_NAMES = (32, 256)


@dataclass
class AutoregressiveOutput(ModelOutput):
    """Output of [`AutoregressiveModel`], for M mentions with up to C candidates.

    Args:
        loss (`torch.Tensor` []): If `labels` are given, the smoothed negative log-likelihood of the golds' names, a mean over
            tokens, and with `correction` the cross entropy of the gold among the classifier's logits.
        scores (`torch.Tensor` [M, C]): Higher is better; -inf where a mention has no candidate.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class Memory(NamedTuple):
    """The context that the decoder reads for R mentions.

    Args:
        states (`torch.Tensor` [R, L, h]): The encoder's states.
        mask (`torch.Tensor` [R, L]): 1 for real tokens.
        start (`torch.Tensor` [R, 3, h], *optional*): Initial hidden state, initial cell and fed vector of the LSTM.
    """

    states: torch.Tensor
    mask: torch.Tensor
    start: torch.Tensor | None = None

    def rows(self, numbers: torch.Tensor) -> Memory:
        """Returns the memory of the mentions with these numbers."""
        start = None if self.start is None else self.start[numbers]
        return Memory(self.states[numbers], self.mask[numbers], start)


class LstmDecoder(nn.Module):
    """Decoder of "Autoregressive": an LSTM that starts from a mention, over the word table of the encoder."""

    def __init__(self, hidden_size: int, vocab_size: int, dropout: float, correction: bool):
        super().__init__()
        self.start_fc1, self.start_fc2 = (
            nn.Linear(2 * hidden_size, hidden_size),
            nn.Linear(hidden_size, 3 * hidden_size),
        )
        self.lstm = nn.LSTM(2 * hidden_size, hidden_size, batch_first=True)
        self.dense, self.norm = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = nn.Dropout(dropout)
        if correction:
            self.correct_fc1, self.correct_fc2 = nn.Linear(2 * hidden_size, hidden_size), nn.Linear(hidden_size, 1)

    def start(self, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Returns initial hidden state, initial cell and fed vector [R, 3, h], from the states [R, h] of the mention's first
        and last token."""
        hidden = self.dropout(F.relu(self.start_fc1(torch.cat([first, last], -1))))
        return self.start_fc2(hidden).unflatten(-1, (3, -1))

    def forward(self, start: torch.Tensor, embedded: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor):
        """Reads names.

        Args:
            start (`torch.Tensor` [R, 3, h]): Result of `start`.
            embedded (`torch.Tensor` [R, T, h]): Word vectors of the tokens that are read.
            lengths (`torch.Tensor` [R]): Number of them.
            table (`torch.Tensor` [V, h]): Word vectors of the vocabulary.

        Returns:
            `tuple`: Logits [R, T, V] of the next tokens, and logits [R] of the classifier, or `None` without one.
        """
        hidden, cell, fed = start.unbind(1)
        inputs = torch.cat([embedded, fed.unsqueeze(1).expand_as(embedded)], -1)
        packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, (_, final) = self.lstm(packed, (hidden.unsqueeze(0).contiguous(), cell.unsqueeze(0).contiguous()))
        states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=embedded.shape[1])
        logits = self.norm(F.gelu(self.dense(self.dropout(states)))) @ table.T + self.bias
        if not hasattr(self, "correct_fc1"):
            return logits, None
        corrected = self.dropout(F.relu(self.correct_fc1(torch.cat([fed, final[0]], -1))))
        return logits, self.correct_fc2(corrected).squeeze(-1)


class AutoregressiveModel(PreTrainedModel):
    """GENRE or "Autoregressive" as a reranker that scores each pair alone.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("runs/genre_flags").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("runs/genre_flags")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows)])).scores  # [1, C] # doctest: +SKIP
    ```
    """

    config: AutoregressiveConfig
    config_class = AutoregressiveConfig
    base_model_prefix = "autoregressive"
    main_input_name = "pair_input_ids"
    accepts_loss_kwargs = False  # the loss is a batch mean, which the Trainer must scale for gradient accumulation
    _no_split_modules = []
    # For the encoder and the pretrained decoder. An LSTM has no attention.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    #: Pretrained submodules. The trainer can give all other parameters another learning rate.
    backbone_names: tuple[str, ...] = ("text_model",)
    example_unit = "mention"
    pairs_are_independent = True

    def __init__(self, config: AutoregressiveConfig):
        super().__init__(config)
        if config.name_decoder == "pretrained":
            self.text_model = AutoModelForSeq2SeqLM.from_config(config.text_config)
        else:
            self.text_model = _build_backbone(config.text_config, False)
            vocab_size, hidden_size = self.text_model.get_input_embeddings().weight.shape
            self.name_decoder = LstmDecoder(hidden_size, vocab_size, config.dropout, config.correction)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    init.orthogonal_(parameter)
                else:
                    init.zeros_(parameter)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LstmDecoder):
            init.zeros_(module.bias)

    @classmethod
    def from_backbones(cls, text: str | None = None, **config) -> AutoregressiveModel:
        """Builds a model with pretrained parts.

        Args:
            text (`str`): Hub id or folder of a sequence-to-sequence model, or of an encoder. With `name_decoder="pretrained"`, an
                encoder gets an untrained decoder of its own kind and width.
            config: Fields of [`AutoregressiveConfig`].
        """
        if text is None:
            raise ValueError("from_backbones needs a pretrained model. Give its Hub id or folder.")
        kind = AutoConfig.from_pretrained(text)
        is_complete = bool(getattr(kind, "is_encoder_decoder", False))
        if config.get("name_decoder", "pretrained") == "pretrained" and is_complete:
            source: Any = AutoModelForSeq2SeqLM.from_pretrained(text)
            fields = source.config.to_dict()
        else:
            layers = config.get("num_encoder_layers")
            cut = {} if layers is None else {"num_hidden_layers": layers}
            source = AutoModel.from_pretrained(text, **cut)
            fields = source.config.to_dict()
            if config.get("name_decoder", "pretrained") == "pretrained":
                decoder = fields | {"is_decoder": True, "add_cross_attention": True}
                decoder |= {
                    "num_hidden_layers": config.get("num_decoder_layers", AutoregressiveConfig.num_decoder_layers)
                }
                fields = EncoderDecoderConfig(encoder=dict(fields), decoder=decoder).to_dict()
        for part in (fields, fields.get("encoder"), fields.get("decoder")):
            if part is not None:
                part.pop("_name_or_path", None)  # may be a local path; the weights are saved with this model
        model = cls(AutoregressiveConfig(**{"text_config": fields} | config))
        target = model.text_model
        if fields["model_type"] == "encoder-decoder" and not is_complete:
            target = target.encoder
            model.backbone_names = ("text_model.encoder",)
        names = target.state_dict()
        target.load_state_dict({k: v for k, v in source.state_dict().items() if k in names}, strict=False)
        return model

    def forward(
        self,
        pair_input_ids: torch.LongTensor,
        pair_attention_mask: torch.Tensor,
        pair_ends: torch.LongTensor,
        pair_mask: torch.Tensor,
        pair_entity: torch.LongTensor,
        pair_name_ids: torch.LongTensor,
        pair_context: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> AutoregressiveOutput:
        """Scores the candidates of M mentions.

        Args:
            pair_input_ids, pair_attention_mask (`torch.Tensor` [M, L]): The mentions in their contexts.
            pair_ends (`torch.Tensor` [M, 2]): Positions of the mention's first and last token.
            pair_mask (`torch.Tensor` [M, C]): False where a mention has no C-th candidate.
            pair_entity (`torch.Tensor` [M, C]): Number of each candidate's name among N names; -1 for padding.
            pair_name_ids (`torch.Tensor` [N, T]): The names, from the start token to the end token, padded with -1.
            pair_context (`torch.Tensor` [M], *optional*): Ignored, because every pair is scored alone.
            labels (`torch.Tensor` [M], *optional*): Column of each mention's gold; -100 excludes a mention from the
                loss.
        """
        mask = pair_mask.bool()
        scores = torch.full(mask.shape, -torch.inf, device=mask.device)
        mentions, _ = mask.nonzero(as_tuple=True)
        if not len(mentions):
            loss = None if labels is None else next(self.parameters()).sum() * 0.0
            return AutoregressiveOutput(loss=loss, scores=scores)
        memory = self.encode(pair_input_ids, pair_attention_mask, pair_ends)
        names = pair_name_ids[pair_entity[mask]]
        golds = None
        if labels is not None:
            golds = (torch.arange(mask.shape[1], device=mask.device) == labels.unsqueeze(1))[mask]
        block = len(names) if torch.is_grad_enabled() else _BLOCK_NAMES[mask.device.type == "cuda"]
        likelihoods, corrections, smoothed, num_tokens = [], [], [], 0
        for part in torch.arange(len(names), device=mask.device).split(block):
            logits, targets, correction = self._read(memory.rows(mentions[part]), names[part])
            likelihoods.append(_mean_log_probability(logits, targets))
            if correction is not None:
                corrections.append(correction)
            if golds is not None and golds[part].any():
                wanted = targets[golds[part]]
                smoothed.append(
                    F.cross_entropy(
                        logits[golds[part]].flatten(0, 1),
                        wanted.flatten(),
                        ignore_index=-1,
                        reduction="sum",
                        label_smoothing=self.config.label_smoothing,
                    )
                )
                num_tokens += int((wanted >= 0).sum())
        total = torch.cat(likelihoods)
        classified = torch.cat(corrections) if corrections else None
        scores[mask] = (total if classified is None else total + classified).float()
        loss = None
        if labels is not None:
            loss = sum(smoothed, total.sum() * 0.0) / max(num_tokens, 1)
            rows = (labels >= 0).nonzero()[:, 0]
            if classified is not None and len(rows):
                logits = torch.full(mask.shape, -torch.inf, device=mask.device)
                logits[mask] = classified.float()
                loss = loss + F.cross_entropy(logits[rows], labels[rows])
        return AutoregressiveOutput(loss=loss, scores=scores)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, ends: torch.Tensor) -> Memory:
        """Returns the memory of M mentions, from `pair_input_ids`, `pair_attention_mask` and `pair_ends`."""
        if self.config.name_decoder == "pretrained":
            encoder = self.text_model.get_encoder()
            return Memory(
                encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask
            )
        states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        start = self.name_decoder.start(states[rows, ends[:, 0]], states[rows, ends[:, 1]])
        return Memory(states, attention_mask, start)

    def _read(self, memory: Memory, names: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Reads names [R, T] of R mentions.

        Returns:
            `tuple`: Logits [R, T - 1, V] (float32), the tokens [R, T - 1] that they predict, padded with -1, and the logits
            [R] of the classifier, or `None`.
        """
        inputs, targets = names[:, :-1], names[:, 1:]
        # The last token is only predicted. What is read after a shorter name has no influence.
        read = inputs.clamp(min=0)
        if self.config.name_decoder == "pretrained":
            output = self.text_model(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory.states),
                attention_mask=memory.mask,
                decoder_input_ids=read,
                use_cache=False,
            )
            return output.logits.float(), targets, None
        table = self.text_model.get_input_embeddings()
        lengths = (targets >= 0).sum(1).clamp(min=1)
        logits, correction = self.name_decoder(memory.start, table(read), lengths, table.weight)
        return logits.float(), targets, correction

    @torch.no_grad()
    def generate_names(self, memory: Memory, trie: NameTrie, num_beams: int = 5) -> list[list[tuple[int, float]]]:
        """Generates names of a trie for R mentions by constrained beam search.

        Tokens that no name continues with have probability 0; the others are not scaled up. With as many beams as names,
        the result is the order of all names by their exact scores, without the classifier's correction.

        Args:
            memory: Result of `encode`.
            trie ([`NameTrie`]): The names.
            num_beams (`int`, *optional*, defaults to 5): Number of prefixes that are kept.

        Returns:
            `list` for each mention of tuples of the number of a name and its mean log-probability, the best first, at most
            `num_beams` distinct names.
        """
        results = []
        for row in range(len(memory.states)):
            one = memory.rows(torch.tensor([row], device=memory.states.device))
            # The start token is given and has no probability.
            beams: list[tuple[tuple[int, ...], float]] = [((token,), 0.0) for token in trie.next_tokens(())]
            finished: list[tuple[tuple[int, ...], float]] = []
            while beams:
                live = []
                for prefix, total in beams:
                    allowed = trie.next_tokens(prefix)
                    if allowed:
                        live.append((prefix, total, allowed))
                if not live:
                    break
                device = memory.states.device
                # A further token is there only to be predicted.
                prefixes = torch.tensor([[*prefix, prefix[-1]] for prefix, _, _ in live], device=device)
                logits, _, _ = self._read(one.rows(torch.zeros(len(live), dtype=torch.long, device=device)), prefixes)
                log_probabilities = logits[:, -1].log_softmax(-1)
                grown = [
                    ((*prefix, token), total + float(log_probabilities[k, token]))
                    for k, (prefix, total, allowed) in enumerate(live)
                    for token in allowed
                ]
                grown.sort(key=lambda beam: -beam[1])
                beams = grown[:num_beams]
                finished += [beam for beam in beams if beam[0] in trie.names_of]
            finished.sort(key=lambda beam: -beam[1] / (len(beam[0]) - 1))
            results.append(
                [
                    (number, total / (len(name) - 1))
                    for name, total in finished[:num_beams]
                    for number in trie.names_of[name]
                ]
            )
        return results


def _mean_log_probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean log-probability [R] of targets [R, T], padded with -1, given logits [R, T, V]."""
    real = targets >= 0
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)


# Copied from modeling/mimic/modeling_mimic.py
def _build_backbone(config, pooling_layer: bool) -> PreTrainedModel:
    """Builds an untrained encoder; `pooling_layer` is ignored by encoders whose pooling layer is not optional."""
    try:
        return AutoModel.from_config(config, add_pooling_layer=pooling_layer)
    except TypeError:  # the encoder has no argument `add_pooling_layer`
        return AutoModel.from_config(config)


__all__ = ["AutoregressiveModel"]
