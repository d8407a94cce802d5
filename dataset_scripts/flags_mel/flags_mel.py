"""FlagsMEL: a small generated data set of multimodal entity linking, with strata that say which modality decides.

Nothing is downloaded: entities, sentences and pictures come from the modules beside this one and a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

import datasets

from hf_mel.errors import MelError
from hf_mel.schema import NIL, NO_SPAN, entity_features, mention_features, post_features

from .countries import BY_QID, COUNTRIES

# For flags.py: `datasets` 3 copies only the modules that the script itself imports (and reads no comment beside them).
from .drawing import BASIC_COLOURS as BASIC_COLOURS
from .flags import clean_flag
from .photo import Shot, photographs
from .planning import SPLIT_SIZES, plan_documents, plan_mentions, plan_posts
from .sentences import mention_type

_CITATION = """\
@misc{flagsmel,
  title  = {{FlagsMEL}: a generated data set of multimodal entity linking},
  author = {{The hf\\_mel contributors}},
  year   = {2026},
}
"""

_DESCRIPTION = """\
Ambiguous mentions of states and territories ("Congo", "the Dominicans", "the hosts") with photograph-like pictures of
flags. Each mention belongs to a stratum: the text decides, the image decides, or both are needed.
"""


class FlagsMelConfig(datasets.BuilderConfig):
    """One of the tables `mentions`, `documents`, `entities` and `posts`.

    Args:
        seed (`int`, defaults to 0): Of the sentences and the pictures. Entities and their flags do not depend on it.
        documents (`bool` or "true" or "false", defaults to `False`): Whether a build writes the table `documents` too.
            The digest of a data set is that of all its tables, so that scores on the others name the same data as
            before only without it.
    """

    def __init__(self, seed: int = 0, documents: bool | str = False, **kwargs: Any):
        super().__init__(version=datasets.Version("1.0.0"), **kwargs)
        self.seed, self.documents = seed, documents


class FlagsMel(datasets.GeneratorBasedBuilder):
    """FlagsMEL's builder: `FlagsMel("mentions", cache_dir=…).download_and_prepare()`, then `.as_dataset()`."""

    BUILDER_CONFIG_CLASS = FlagsMelConfig
    BUILDER_CONFIGS = [
        FlagsMelConfig(name="mentions", description="One row per mention."),
        FlagsMelConfig(name="documents", description="The same mentions and their photographs, by document."),
        FlagsMelConfig(name="entities", description="The knowledge base, with clean flags."),
        FlagsMelConfig(name="posts", description="Short texts about the entities."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    NAME = "flags_mel"
    TITLE = "FlagsMEL"
    LICENSE = "cc0-1.0"
    LANGUAGES = ["en"]
    HOMEPAGE = "https://huggingface.co/datasets/hf-mel/flags_mel"
    CITATION = _CITATION
    TASK = "states and territories named in sentences with photograph-like pictures of their flags"
    DOWNLOAD = "nothing: it is generated"
    REDISTRIBUTION = ""
    NEEDS_RAW = False
    #: The same for every seed; how many photographs `documents` has is not.
    OFFICIAL_COUNTS = {
        "mentions": SPLIT_SIZES,
        "entities": {"kb": sum(country.in_kb for country in COUNTRIES)},
        "posts": {"kb": len(plan_posts(0))},
    }

    @classmethod
    def configs_in(cls, data_dir: Any, options: Mapping[str, Any]) -> list[str]:
        """The configurations that are built: `documents` where it is asked for."""
        wanted = str(options.get("documents", False)).lower()
        if wanted not in ("true", "false"):
            raise MelError(f"the option documents={options['documents']!r} is neither true nor false.")
        return [config.name for config in cls.BUILDER_CONFIGS if config.name != "documents" or wanted == "true"]

    def _info(self) -> datasets.DatasetInfo:
        features = {
            "mentions": mention_features(stratum=datasets.Value("string")),
            "documents": mention_features(
                document_id=datasets.Value("string"),
                modality=datasets.Value("string"),
                stratum=datasets.Value("string"),
            ),
            "entities": entity_features(),
            "posts": post_features(),
        }
        return datasets.DatasetInfo(
            description=_DESCRIPTION,
            features=features[self.config.name],
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            citation=self.CITATION,
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        splits = SPLIT_SIZES if self.config.name in ("mentions", "documents") else ("kb",)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = {
            "mentions": self._mentions,
            "documents": self._documents,
            "entities": self._entities,
            "posts": self._posts,
        }[self.config.name]
        yield from enumerate(rows(split))

    def _mentions(self, split: str) -> Iterator[dict[str, Any]]:
        contexts = plan_mentions(self.config.seed, split)
        images = _images([context.shot for context in contexts])
        for number, (context, image) in enumerate(zip(contexts, images, strict=True)):
            context_id = f"{split}-{number:04d}"
            for i, mention in enumerate(context.mentions):
                yield {
                    "mention_id": f"{context_id}-{i}",
                    "context_id": context_id,
                    "text": context.text,
                    "mention": context.text[mention.start : mention.end],
                    "start": mention.start,
                    "end": mention.end,
                    "mention_type": mention_type(mention.surface),
                    "topic": context.topic,
                    "image": image,
                    "entity_id": mention.qid if BY_QID[mention.qid].in_kb else NIL,
                    "candidates": [],
                    "stratum": context.stratum,
                }

    def _documents(self, split: str) -> Iterator[dict[str, Any]]:
        """Of each document its sentences, then its photographs of flags, which are visual mentions."""
        of_context: dict[str, list[dict[str, Any]]] = {}
        for row in self._mentions(split):
            of_context.setdefault(row["context_id"], []).append(row)
        contexts = list(of_context.values())
        for number, members in enumerate(plan_documents(self.config.seed, split)):
            document = {"document_id": f"{split}-d{number:04d}"}
            for row in (row for member in members for row in contexts[member]):
                yield {**row, **document, "modality": "text", "image": None}
            for first in (contexts[member][0] for member in members):
                if first["stratum"] == "text":  # a scene, or no picture at all
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

    def _entities(self, split: str) -> Iterator[dict[str, Any]]:
        countries = [country for country in COUNTRIES if country.in_kb]
        flown = _images([Shot(seed=i, flag=country.qid, calm=True) for i, country in enumerate(countries)])
        for country, image in zip(countries, flown, strict=True):
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

    def _posts(self, split: str) -> Iterator[dict[str, Any]]:
        posts = plan_posts(self.config.seed)
        for number, (post, image) in enumerate(zip(posts, _images([post.shot for post in posts]), strict=True)):
            yield {"post_id": f"post-{number:04d}", "entity_id": post.qid, "text": post.text, "image": image}


def _images(shots: list[Shot | None]) -> Iterator[dict[str, Any] | None]:
    """A cell of an image column for each shot, `None` where there is none."""
    pictures = photographs([shot for shot in shots if shot is not None])
    for shot in shots:
        yield None if shot is None else {"bytes": next(pictures), "path": None}


BUILDER_CLASS = FlagsMel
