"""Evidence: where semantic RSMs say more than baselines, by one command.

Begin with `factors.py`, which changes one thing at a time around a base setting, and `study.py`, which runs it beside
the paper's experiments on the same models and pictures. `differences.py` says what an interval allows to be said.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.evidence.differences import Verdicts, gains
    from rsm_probe.evidence.factors import FactorsConfig
    from rsm_probe.evidence.study import EvidenceConfig
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = ["EvidenceConfig", "FactorsConfig", "Verdicts", "gains"]
