"""Publishing models, data sets, knowledge bases, metrics and Spaces on the Hub.

```python
from hf_mel.hub.publish import model_publication, publish

commit, comparison = publish(model_publication("runs/mimic_flags", "me/mimic-flags"), private=True)
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.hub.publish.dataset_repo import dataset_publication as dataset_publication
    from hf_mel.hub.publish.kb_repo import kb_publication as kb_publication
    from hf_mel.hub.publish.model_repo import model_publication as model_publication
    from hf_mel.hub.publish.publication import Publication as Publication
    from hf_mel.hub.publish.space_repo import space_publication as space_publication
    from hf_mel.hub.publish.upload import Comparison as Comparison
    from hf_mel.hub.publish.upload import compare as compare
    from hf_mel.hub.publish.upload import publish as publish

_EXPORTS = {
    "Comparison": "hf_mel.hub.publish.upload",
    "Publication": "hf_mel.hub.publish.publication",
    "compare": "hf_mel.hub.publish.upload",
    "dataset_publication": "hf_mel.hub.publish.dataset_repo",
    "kb_publication": "hf_mel.hub.publish.kb_repo",
    "model_publication": "hf_mel.hub.publish.model_repo",
    "publish": "hf_mel.hub.publish.upload",
    "space_publication": "hf_mel.hub.publish.space_repo",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)
