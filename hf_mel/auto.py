"""Registers the shipped methods with the Auto classes of transformers. The only place that knows them by name.

`import hf_mel` runs this module and has to stay light: `hf-mel --help` pays for it, and torch with transformers takes
seconds to import. So a class is registered when the program imports the module of the Auto class that looks it up.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

#: Folder of each method in `modeling/`, which is its model type too → the prefix of its class names.
_METHODS = {
    "autoregressive": "Autoregressive",
    "bi_encoder": "BiEncoder",
    "candidate_graph": "CandidateGraph",
    "context_rnn": "ContextRnn",
    "cross_encoder": "CrossEncoder",
    "extra_trees": "ExtraTrees",
    "ghmfc": "Ghmfc",
    "imn": "Imn",
    "mimic": "Mimic",
    "mm_nel": "MmNel",
    "mmel": "Mmel",
    "modal_fusion": "ModalFusion",
    "pfmel": "Pfmel",
}
#: Auto class → the module of transformers that holds it.
_AUTO_MODULES = {
    "AutoConfig": "transformers.models.auto.configuration_auto",
    "AutoModel": "transformers.models.auto.modeling_auto",
    "AutoModelForPreTraining": "transformers.models.auto.modeling_auto",
    "AutoProcessor": "transformers.models.auto.processing_auto",
}
_PIPELINES = "transformers.pipelines"
#: Prefixes of the modules that have to finish before a class can be registered.
_WATCHED = ("transformers.", "hf_mel.modeling.")


class _Entry(NamedTuple):
    """A class of a method, and the Auto class that looks it up."""

    auto_class: str
    method: str
    module: str
    name: str

    @property
    def configuration(self) -> str:
        """Module of the method's configuration, which is the key of all its classes."""
        return f"hf_mel.modeling.{self.method}.configuration_{self.method}"

    def register(self) -> None:
        """Registers the class, and imports its module if nothing else did."""
        auto_class: Any = getattr(import_module(_AUTO_MODULES[self.auto_class]), self.auto_class)
        key: Any = self.method
        if self.auto_class != "AutoConfig":
            key = getattr(import_module(self.configuration), f"{_METHODS[self.method]}Config")
        auto_class.register(key, getattr(import_module(self.module), self.name), exist_ok=True)


def _entry(auto_class: str, method: str, file: str, name: str) -> _Entry:
    return _Entry(auto_class, method, f"hf_mel.modeling.{method}.{file}_{method}", name)


_ENTRIES = [
    *(_entry("AutoConfig", method, "configuration", f"{prefix}Config") for method, prefix in _METHODS.items()),
    *(_entry("AutoModel", method, "modeling", f"{prefix}Model") for method, prefix in _METHODS.items()),
    *(_entry("AutoProcessor", method, "processing", f"{prefix}Processor") for method, prefix in _METHODS.items()),
    _entry("AutoModelForPreTraining", "imn", "pretraining", "ImnForKnowledgePreTraining"),
    _entry("AutoModelForPreTraining", "pfmel", "modeling", "PfmelForPreTraining"),
]


class _RegisterAfterImport(MetaPathFinder):
    """Lets Python import modules as usual, and registers the entries whose Auto class has been imported.

    The modules of transformers import each other in circles, and the modules of a method import those of transformers
    and each other. So nothing is registered while one of them is still running.
    """

    def __init__(self) -> None:
        self._waiting = list(_ENTRIES)
        self._searching: set[str] = set()
        self._running: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Returns the usual spec with a loader that registers afterwards, or `None` for a module that is not watched."""
        if not f"{name}.".startswith(_WATCHED) or name in self._searching:
            return None
        self._searching.add(name)  # The search below asks this finder again.
        try:
            spec = find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            self._running.add(name)
            try:
                run_module(module)
            finally:
                self._running.discard(name)
            self.register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        """Registers every waiting entry whose Auto class has been imported, unless a watched module is still running."""
        if self._running:
            return
        for entry in list(self._waiting):
            # Registering an entry imports modules, which may register other entries.
            if _AUTO_MODULES[entry.auto_class] in sys.modules and entry in self._waiting:
                self._waiting.remove(entry)
                entry.register()
        if _PIPELINES in sys.modules:
            import_module("hf_mel.linking.pipeline")


def register_methods() -> None:
    """Makes the Auto classes and `transformers.pipeline` know the shipped methods, from now on."""
    if not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        finder = _RegisterAfterImport()
        sys.meta_path.insert(0, finder)
        finder.register()  # transformers may have been imported before
