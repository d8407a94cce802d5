"""The transformers pipeline of the task "multimodal-entity-linking", a wrapper of [`~hf_mel.EntityLinker`]."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

#: The name of the task.
TASK = "multimodal-entity-linking"


class MultimodalEntityLinkingPipeline(Pipeline):
    """Links mentions to the entities of a knowledge base.

    ```python
    >>> import hf_mel
    >>> from transformers import pipeline
    >>> linker = pipeline("multimodal-entity-linking", model="org/mimic", kb="org/wikimel-kb")  # doctest: +SKIP
    >>> linker({"text": "Swift on stage.", "mention": "Swift", "image": "photo.jpg"}, top_k=3)  # doctest: +SKIP
    ```

    A call takes one mention or a list of mentions, as [`~hf_mel.EntityLinker`] does. It returns one dict or a list of
    dicts, the output of [`~hf_mel.linking.results.LinkResult.to_dict`].

    Args:
        kb ([`~hf_mel.KnowledgeBase`], `str` or `os.PathLike`): A knowledge base that this model built, its folder, or its
            Hub id.
        kb_revision (`str`, *optional*): Branch, tag or commit of a knowledge base on the Hub.
        nil_threshold, name_weight (`float`, *optional*): See [`~hf_mel.EntityLinker`].
        top_k (`int`, *optional*, defaults to 10): Number of candidates to return. Also an argument of every call.
        kwargs: See `transformers.Pipeline`.
    """

    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False
    _load_video_processor: Any = False

    def __init__(
        self,
        *args: Any,
        kb: Any = None,
        kb_revision: str | None = None,
        nil_threshold: float | None = None,
        name_weight: float | None = None,
        **kwargs: Any,
    ):
        from hf_mel.errors import KnowledgeBaseError
        from hf_mel.kb.knowledge_base import KnowledgeBase
        from hf_mel.linking.linker import EntityLinker

        if kb is None:
            raise KnowledgeBaseError(
                "No knowledge base was given.",
                remedy='Pass kb="FOLDER or Hub id". To build one, run hf-mel kb build.',
            )
        super().__init__(*args, **kwargs)
        # The linker computes in float32, and transformers may load the weights in half precision.
        self.model.float()
        processor: Any = self.processor
        if isinstance(kb, (str, os.PathLike)):
            kb = KnowledgeBase.from_pretrained(kb, revision=kb_revision)
        self.linker = EntityLinker(self.model, processor, kb, nil_threshold=nil_threshold, name_weight=name_weight)

    def _sanitize_parameters(self, top_k: int | None = None, **_: Any):
        return {}, ({} if top_k is None else {"top_k": top_k}), {}

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Links one mention or a list of mentions.

        Args:
            inputs (mapping, sequence of mappings or `datasets.Dataset`, *optional*): The `mentions` of
                [`~hf_mel.EntityLinker.__call__`].
            kwargs: Other arguments of [`~hf_mel.EntityLinker.__call__`]: `text`, `mention`, `start`, `end` and `image`
                of a single mention, `top_k`, `batch_size`.

        Returns:
            `dict` for one mention, or a list of `dict`.
        """
        options: dict[str, Any] = {"top_k": 10, **self._forward_params, **kwargs}
        if self._batch_size:
            options.setdefault("batch_size", self._batch_size)
        linked: Any = self.linker(inputs, **options)
        return [result.to_dict() for result in linked] if isinstance(linked, list) else linked.to_dict()

    # The base class requires the three methods below, which process one input. `__call__` replaces them, because the
    # linker processes batches.

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """Returns the mention unchanged."""
        return {"mention": input_}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        return self(input_tensors["mention"], **forward_parameters)

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> Any:
        """Returns the result unchanged."""
        return model_outputs


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=MultimodalEntityLinkingPipeline, pt_model=AutoModel, type="multimodal"
)
