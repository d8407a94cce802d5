"""NCEL and DGCN: graph convolutions over the candidates of all mentions of a document."""

from .configuration_candidate_graph import CandidateGraphConfig
from .modeling_candidate_graph import CandidateGraphModel
from .processing_candidate_graph import CandidateGraphProcessor

__all__ = ["CandidateGraphConfig", "CandidateGraphModel", "CandidateGraphProcessor"]
