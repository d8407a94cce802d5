"""FlagsMEL: a small generated data set of multimodal entity linking, with strata that say which modality decides.

The builder downloads nothing. Entities, sentences and pictures come from the modules beside this one and from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import datasets

from hf_mel.dataset_scripts.builder import ReleaseBuilder, mention_row
from hf_mel.errors import MelError
from hf_mel.schema import NIL, NO_SPAN

from .countries import BY_QID, COUNTRIES

# For flags.py and planning.py: `datasets` 3 copies only the modules that the script itself imports (and reads no comment
# beside them).
from .drawing import BASIC_COLOURS as BASIC_COLOURS
from .flags import clean_flag
from .look_alikes import picture_set as picture_set
from .photo import Shot, photographs
from .planning import SPLIT_SIZES, plan_documents, plan_mentions, plan_posts
from .sentences import mention_type


@dataclass
class FlagsMelConfig(datasets.BuilderConfig):
    """One of the tables `mentions`, `documents`, `entities` and `posts`.

    Args:
        seed (`int`, defaults to 0): Seed of the sentences and the pictures. Entities and their flags do not depend on it.
        documents (`bool` or "true" or "false", defaults to `False`): Whether a build writes the table `documents`, too.
            The digest of a data set covers all its tables, so a build with `documents` has another digest.
    """

    seed: int = 0
    documents: bool | str = False


class FlagsMel(ReleaseBuilder):
    """Builder of FlagsMEL: `FlagsMel("mentions", cache_dir=…).download_and_prepare()`, then `.as_dataset()`."""

    NAME = "flags_mel"
    TITLE = "FlagsMEL"
    TASK = "states and territories named in sentences with photograph-like pictures of their flags"
    LICENSE = "cc0-1.0"
    LANGUAGES = ("en",)
    HOMEPAGE = "https://huggingface.co/datasets/hf-mel/flags_mel"
    DOWNLOAD = "nothing: it is generated"
    REDISTRIBUTION = ""
    CITATION = """\
@misc{flagsmel,
  title  = {{FlagsMEL}: a generated data set of multimodal entity linking},
  author = {{The hf\\_mel contributors}},
  year   = {2026},
}"""
    NEEDS_RAW = False
    #: The same for every seed. The number of photographs in `documents` depends on the seed.
    OFFICIAL_COUNTS = {
        "mentions": SPLIT_SIZES,
        "entities": {"kb": sum(country.in_kb for country in COUNTRIES)},
        "posts": {"kb": len(plan_posts(0))},
    }

    SPLITS = tuple(SPLIT_SIZES)
    CONFIGS = {
        "mentions": "One row per mention.",
        "documents": "The same mentions and their photographs, by document.",
        "entities": "The knowledge base, with clean flags.",
        "posts": "Short texts about the entities.",
    }
    COLUMNS = {
        "mentions": {"stratum": datasets.Value("string")},
        "documents": {
            "document_id": datasets.Value("string"),
            "modality": datasets.Value("string"),
            "stratum": datasets.Value("string"),
        },
    }
    BUILDER_CONFIG_CLASS = FlagsMelConfig

    @classmethod
    def configs_in(cls, data_dir: Any, options: Mapping[str, Any]) -> list[str]:
        """Returns the configurations to build, with `documents` only if the option asks for it."""
        documents = str(options.get("documents", False)).lower()
        if documents not in ("true", "false"):
            raise MelError(
                f"The option documents={options['documents']!r} is neither true nor false.",
                remedy="Give true or false.",
            )
        return [config for config in cls.CONFIGS if config != "documents" or documents == "true"]

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the rows of `mentions`, or of `documents`."""
        return self._document_mentions(split) if self.config.name == "documents" else self._mentions(split)

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the knowledge base: of each entity its clean flag, then the flag flying."""
        countries = [country for country in COUNTRIES if country.in_kb]
        flying = _image_cells([Shot(seed=i, flag=country.qid, calm=True) for i, country in enumerate(countries)])
        for country, image in zip(countries, flying, strict=True):
            file = BytesIO()
            clean_flag(country.qid).save(file, "PNG")
            yield {
                "entity_id": country.qid,
                "name": country.name,
                "description": country.description,
                "attributes": country.attributes,
                "aliases": list(country.aliases),
                "images": [{"bytes": file.getvalue(), "path": None}, image],
            }

    def posts(self) -> Iterator[dict[str, Any]]:
        """Yields the posts about the entities."""
        posts = plan_posts(self.config.seed)
        images = _image_cells([post.shot for post in posts])
        for number, (post, image) in enumerate(zip(posts, images, strict=True)):
            yield {"post_id": f"post-{number:04d}", "entity_id": post.qid, "text": post.text, "image": image}

    def _mentions(self, split: str) -> Iterator[dict[str, Any]]:
        contexts = plan_mentions(self.config.seed, split)
        images = _image_cells([context.shot for context in contexts])
        for number, (context, image) in enumerate(zip(contexts, images, strict=True)):
            context_id = f"{split}-{number:04d}"
            for i, mention in enumerate(context.mentions):
                yield mention_row(
                    mention_id=f"{context_id}-{i}",
                    context_id=context_id,
                    text=context.text,
                    mention=context.text[mention.start : mention.end],
                    start=mention.start,
                    end=mention.end,
                    mention_type=mention_type(mention.surface),
                    topic=context.topic,
                    image=image,
                    entity_id=mention.qid if BY_QID[mention.qid].in_kb else NIL,
                    stratum=context.stratum,
                )

    def _document_mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the sentences of each document, then its photographs of flags, which are visual mentions."""
        rows_by_context: dict[str, list[dict[str, Any]]] = {}
        for row in self._mentions(split):
            rows_by_context.setdefault(row["context_id"], []).append(row)
        contexts = list(rows_by_context.values())
        for number, members in enumerate(plan_documents(self.config.seed, split)):
            document = {"document_id": f"{split}-d{number:04d}"}
            for row in (row for member in members for row in contexts[member]):
                yield {**row, **document, "modality": "text", "image": None}
            for first in (contexts[member][0] for member in members):
                if first["stratum"] == "text":  # its picture shows a scene, or is missing
                    continue
                visual_id = f"{first['context_id']}-v"
                yield {
                    **first,
                    **document,
                    "mention_id": visual_id,
                    "context_id": visual_id,
                    "text": "",
                    "mention": "",
                    "start": NO_SPAN,
                    "end": NO_SPAN,
                    "mention_type": "",
                    "modality": "image",
                }


def _image_cells(shots: list[Shot | None]) -> Iterator[dict[str, Any] | None]:
    """Yields a cell of an image column for each shot, `None` for `None`."""
    pictures = photographs([shot for shot in shots if shot is not None])
    for shot in shots:
        yield None if shot is None else {"bytes": next(pictures), "path": None}


BUILDER_CLASS = FlagsMel
