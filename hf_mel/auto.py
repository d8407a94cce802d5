"""The one place that knows the shipped methods: registers each with transformers' Auto classes on import."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor

from hf_mel.modeling.imn.configuration_imn import ImnConfig
from hf_mel.modeling.imn.modeling_imn import ImnForKnowledgePreTraining, ImnModel
from hf_mel.modeling.imn.processing_imn import ImnProcessor
from hf_mel.modeling.mimic.configuration_mimic import MimicConfig
from hf_mel.modeling.mimic.modeling_mimic import MimicModel
from hf_mel.modeling.mimic.processing_mimic import MimicProcessor
from hf_mel.modeling.mm_nel.configuration_mm_nel import MmNelConfig
from hf_mel.modeling.mm_nel.modeling_mm_nel import MmNelModel
from hf_mel.modeling.mm_nel.processing_mm_nel import MmNelProcessor
from hf_mel.modeling.mmel.configuration_mmel import MmelConfig
from hf_mel.modeling.mmel.modeling_mmel import MmelModel
from hf_mel.modeling.mmel.processing_mmel import MmelProcessor
from hf_mel.modeling.pfmel.configuration_pfmel import PfmelConfig
from hf_mel.modeling.pfmel.modeling_pfmel import PfmelForPreTraining, PfmelModel
from hf_mel.modeling.pfmel.processing_pfmel import PfmelProcessor

_METHODS = [
    (ImnConfig, ImnModel, ImnProcessor),
    (MimicConfig, MimicModel, MimicProcessor),
    (MmNelConfig, MmNelModel, MmNelProcessor),
    (MmelConfig, MmelModel, MmelProcessor),
    (PfmelConfig, PfmelModel, PfmelProcessor),
]

for _config, _model, _processor in _METHODS:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, _processor, exist_ok=True)

AutoModelForPreTraining.register(ImnConfig, ImnForKnowledgePreTraining, exist_ok=True)
AutoModelForPreTraining.register(PfmelConfig, PfmelForPreTraining, exist_ok=True)
