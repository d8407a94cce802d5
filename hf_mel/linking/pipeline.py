"""`transformers.pipeline("multimodal-entity-linking", model=…, kb=…)`: an [`~hf_mel.EntityLinker`] as a pipeline."""

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

    A call takes one mention or a list of them (as [`~hf_mel.EntityLinker`] does) and gives one dict, or a list of them
    (`LinkResult.to_dict()`): `entity_id`, `is_nil`, `candidates` with their scores, …

    Args:
        kb (`KnowledgeBase`, `str` or `os.PathLike`): The knowledge base, its folder or its Hub id, built by this model.
        kb_revision (`str`, *optional*): Branch, tag or commit of a knowledge base on the Hub.
        nil_threshold (`float`, *optional*): As in [`~hf_mel.EntityLinker`].
        top_k (`int`, *optional*): How many candidates to give; also an argument of each call. 10 if not given.
        kwargs: As in `transformers.Pipeline`.
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
        **kwargs: Any,
    ):
        from hf_mel.errors import KnowledgeBaseError
        from hf_mel.kb.knowledge_base import KnowledgeBase
        from hf_mel.linking.linker import EntityLinker

        if kb is None:
            raise KnowledgeBaseError(
                "no knowledge base was given.", remedy='Pass kb="FOLDER or Hub id"; hf-mel kb build makes one.'
            )
        super().__init__(*args, **kwargs)
        # Scores and knowledge bases are float32, whatever the weights are stored in.
        self.model.float()
        processor: Any = self.processor
        if isinstance(kb, (str, os.PathLike)):
            kb = KnowledgeBase.from_pretrained(kb, revision=kb_revision)
        self.linker = EntityLinker(self.model, processor, kb, nil_threshold=nil_threshold)

    def _sanitize_parameters(self, top_k: int | None = None, **_: Any):
        return {}, ({} if top_k is None else {"top_k": top_k}), {}

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Links one mention, or many.

        Args:
            inputs (mapping, sequence of mappings or `datasets.Dataset`, *optional*): As in [`~hf_mel.EntityLinker`].
            kwargs: `text`, `mention`, `start`, `end`, `image` for one mention in words; `top_k`; `batch_size`.

        Returns:
            `dict` for one mention, or a list of them.
        """
        options: dict[str, Any] = {"top_k": 10, **self._forward_params, **kwargs}
        if self._batch_size:
            options.setdefault("batch_size", self._batch_size)
        result: Any = self.linker(inputs, **options)
        return [one.to_dict() for one in result] if isinstance(result, list) else result.to_dict()

    # The base class wants three steps, one input at a time. The linker does all of them, a batch at a time.

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """The mention as it is."""
        return {"mention": input_}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        return self(input_tensors["mention"], **forward_parameters)

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> Any:
        """The result as it is."""
        return model_outputs


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=MultimodalEntityLinkingPipeline, pt_model=AutoModel, type="multimodal"
)
